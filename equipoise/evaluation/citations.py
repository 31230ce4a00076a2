"""What a method text cites: the mark that stands for a citation in it, and the entries for BibTeX."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise import __version__
from equipoise.documents import read_yaml
from equipoise.errors import UserError
from equipoise.evaluation.reference import STUDY
from equipoise.evaluation.tex import latex_text
from equipoise.evaluation.visible import visible
from equipoise.runs.records import origin

ROOT = Path(__file__).parents[2]
INSTALLED: Mapping[str, Any] = {
    "title": "equipoise: PPO fine-tuning toward balanced occupational descriptions",
    "authors": [{"name": "The equipoise contributors"}],
    "date-released": "2026-11-28",
}
"""What CITATION.cff says, for where only the package is installed."""


@dataclass(frozen=True)
class Entry:
    """One entry of BibTeX."""

    kind: str
    key: str
    fields: Mapping[str, object]
    """Texts, not yet of LaTeX; the author is a list of people as in CITATION.cff. One that is None is left out."""
    cited: str
    """How a text without a bibliography says it: "Gaucher et al. (2011)"."""

    def mark(self) -> str:
        """What stands for the citation in a paragraph, for `in_words` or `in_latex` to replace."""
        return f"\ue000{self.key}\ue001{self.cited}\ue002"

    def bibtex(self) -> str:
        """The entry, in ASCII. Braces keep a title's capitals."""
        lines = []
        for name, value in self.fields.items():
            if value is not None:
                plain = str(value) if name == "url" else _balanced(str(value))
                text = _people(value) if isinstance(value, list) else plain
                text = f"{{{text}}}" if name in ("title", "note") else text
                lines.append(f"  {name:<7} = {{{text}}},")
        return "\n".join([f"@{self.kind}{{{self.key},", *lines, "}", ""])


def _balanced(text: str) -> str:
    """As LaTeX prints it; BibTeX counts braces, also those behind a backslash."""
    return latex_text(text).replace("\\{", "\\textbraceleft{}").replace("\\}", "\\textbraceright{}")


_MARK = re.compile("\\s*\ue000([a-z0-9]+)\ue001([^\ue002]*)\ue002")


def in_words(text: str) -> str:
    """A paragraph with its citations in words."""
    return _MARK.sub(lambda hit: f" {hit[2]}" if hit[2] else "", text)


def in_latex(text: str) -> str:
    """A paragraph for LaTeX, with \\cite where it cites."""
    pieces = _MARK.split(text)  # text, key, words, text, …
    cites = [*(f"~\\cite{{{key}}}" for key in pieces[1::3]), ""]
    texts = map(_spaced, pieces[::3])
    return "".join(f"{piece}{cite}" for piece, cite in zip(texts, cites, strict=True))


def _spaced(piece: str) -> str:
    """With a space at its beginning kept."""
    return (" " if piece[:1].isspace() else "") + latex_text(piece)


def software() -> Entry:
    """This program, by its CITATION.cff in a checkout. Its address is named there, or is where the checkout is from."""
    try:
        document = read_yaml(ROOT / "CITATION.cff", "the citation")
    except UserError:
        document = INSTALLED
    address = document.get("repository-code") or document.get("url") or origin(ROOT)
    fields = {
        "author": document["authors"],
        "title": document["title"],
        "year": str(document["date-released"])[:4],
        "doi": document.get("doi"),
        "url": address,
        "note": f"Software, version {__version__}",
    }
    return Entry("misc", "equipoise", fields, "")


def study() -> Entry:
    """The public study whose formulas and numbers stand beside ours."""
    number = STUDY.removeprefix("arXiv ")
    fields = {
        "author": [{"family-names": "Mahesh", "given-names": "Atij"}],
        "title": "Compositional Bias Control in Large Language Models: Preference Learning Fails, Supervision Succeeds",
        "year": "2025",
        "journal": f"arXiv preprint arXiv:{number}",
        "eprint": number,
        "archiveprefix": "arXiv",
        "primaryclass": "cs.CL",
        "url": f"https://arxiv.org/abs/{number}",
    }
    return Entry("article", "mahesh2025", fields, f"({STUDY})")


def sources(texts: Sequence[str]) -> list[Entry]:
    """Entries for a task's sources. One that is written as "Author, A. (2011). Title. Journal, 101(1), 109–128." gets
    its fields, any other is a note as it stands."""
    out: list[Entry] = []
    for i, text in enumerate(texts, 1):
        kind, fields = _read(visible(text))
        people = fields.get("author")
        first = people[0]["family-names"] if isinstance(people, list) else ""
        name = re.sub(r"[^a-z]", "", unicodedata.normalize("NFKD", first).lower())
        key = f"{name}{fields['year']}" if name else f"source{i}"
        taken = {"equipoise", "mahesh2025", *(entry.key for entry in out)}
        out.append(Entry(kind, key if key not in taken else f"{key}source{i}", fields, cited(text)))
    return out


_APA = re.compile(
    r"(?P<author>\S.*?) \((?P<year>[12]\d{3})[a-z]?\)\. (?P<title>[^.?!]+[?!]?)[.]? (?P<journal>[^.,\d]+), "
    r"(?P<volume>\d+)(?:\((?P<number>[\d–-]+)\))?(?:, (?P<pages>[\d–-]+))?\.?"
)
_PERSON = re.compile(r"([^\W\d_][\w'’ -]*), ((?:[^\W\d_]\.[ -]?)+)(?:,? (?:& )?|$)")


def _read(text: str) -> tuple[str, dict[str, object]]:
    """The kind of entry and its fields."""
    found = _APA.fullmatch(" ".join(text.split()))
    if found is None or _PERSON.sub("", found["author"]):
        # What BibTeX sorts an entry without an author by.
        return "misc", {"key": " ".join(text.split()[:1]).strip(",."), "note": text}
    people = [
        {"family-names": family, "given-names": given.strip()} for family, given in _PERSON.findall(found["author"])
    ]
    return "article", {**found.groupdict(), "author": people}


def cited(source: str) -> str:
    """A citation as it stands in a text, "Gaucher et al. (2011)", where the source begins with its authors' surnames
    and initials and has a year in brackets; else the source as it is."""
    source = visible(source)
    year = re.search(r"\(([12]\d{3})[a-z]?\)", source)
    names = re.findall(r"([^\W\d_][\w'’ -]*), [^\W\d_]\.", source[: year.start()]) if year else []
    if year is None or not names or not source.startswith(names[0]):
        return source.rstrip(". ")
    who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
    return f"{who} ({year[1]})"


def _people(people: Sequence[Mapping[str, str]]) -> str:
    """Authors as BibTeX joins them; a body of people, which has no family name, in braces."""
    return " and ".join(
        f"{{{_balanced(p['name'])}}}"
        if "name" in p
        else f"{_balanced(p['family-names'])}, {_balanced(p['given-names'])}"
        for p in people
    )
