"""What the method text cites is in the entries, and only that; the entries are as BibTeX reads them."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from equipoise import __version__
from equipoise.evaluation import citations
from equipoise.evaluation.citations import INSTALLED, cited, in_latex, in_words, software, sources, study
from equipoise.evaluation.paper import bibtex, methods_latex, methods_text
from equipoise.evaluation.results import Evaluation
from equipoise.protocol.task import PROTOCOL, Task, packaged_tasks, read_task
from equipoise.protocol.word_lists import is_english
from equipoise.runs.records import origin
from tests.evaluation.hostile import TEXTS, example
from tests.tasks import foreign_task

ROOT = Path(__file__).parents[2]


def entries(bib: str) -> dict[str, dict[str, str]]:
    """Key to fields. A strict reader: braces balance, also those behind a backslash, as BibTeX counts them; a field a
    line; nothing between entries."""
    out: dict[str, dict[str, str]] = {}
    for text in bib.strip().split("\n\n"):
        head, *lines, end = text.splitlines()
        found = re.fullmatch(r"@(article|misc)\{([a-z0-9]+),", head)
        assert found and end == "}" and found[2] not in out, text
        fields = {}
        for line in lines:
            field = re.fullmatch(r"  (\w+) *= \{(.*)\},", line)
            assert field and field[1] not in fields, line
            depth = 0
            for c in field[2]:
                depth += (c == "{") - (c == "}")
                assert depth >= 0, line
            assert depth == 0 and field[2].isascii(), line
            fields[field[1]] = field[2]
        out[found[2]] = fields
    return out


def of_task(task: Task) -> Evaluation:
    evaluation = example()
    return dataclasses.replace(evaluation, settings=evaluation.settings | {"task": task.document()})


@pytest.mark.parametrize(
    "task", [*map(read_task, packaged_tasks()), foreign_task(), foreign_task(sources=[*TEXTS[:5]])]
)
def test_every_key_that_is_cited_has_an_entry_and_every_entry_is_cited(task: Task) -> None:
    evaluation = of_task(task)
    keys = re.findall(r"\\cite\{([^}]*)\}", methods_latex(evaluation, ()))
    # Beside the task's sources, the study and the software: log-odds, quadrature, and words where they are English.
    beside = 5 if is_english(task.frame) else 2
    assert set(keys) == set(entries(bibtex(evaluation))) and len({*keys}) == 2 + len(task.sources) + beside
    text = " ".join(methods_text(evaluation, ()))
    assert "\\cite" not in text and not re.search("[\ue000-\ue002]", text)


def test_the_study_and_the_software_have_year_and_address() -> None:
    fields = entries(bibtex(example()))
    assert fields["mahesh2025"]["url"] == "https://arxiv.org/abs/2510.22084" and fields["mahesh2025"]["year"] == "2025"
    assert fields["mahesh2025"]["eprint"] == "2510.22084" and fields["mahesh2025"]["archiveprefix"] == "arXiv"
    assert fields["equipoise"]["year"] == "2026" and __version__ in fields["equipoise"]["note"]
    assert fields["gaucher2011"] == {
        "author": "Gaucher, D. and Friesen, J. and Kay, A. C.",
        "year": "2011",
        "title": "{Evidence that gendered wording in job advertisements exists and sustains gender inequality}",
        "journal": "Journal of Personality and Social Psychology",
        "volume": "101",
        "number": "1",
        "pages": "109--128",
    }


def test_the_software_is_cited_as_its_citation_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {name: document[name] for name in INSTALLED} == INSTALLED and document["version"] == __version__
    by_file = software()
    monkeypatch.setattr(citations, "ROOT", tmp_path)  # as where only the package is installed
    assert software().fields | {"url": None} == dict(by_file.fields) | {"url": None}
    (tmp_path / "CITATION.cff").write_text(
        "title: T\nauthors: [{family-names: Doe, given-names: J.}, {name: Us}]\n"
        "date-released: 2031-05-06\nrepository-code: https://example.org/e\ndoi: 10.1/x\n"
    )
    (fields,) = entries(software().bibtex()).values()
    assert (fields["author"], fields["year"], fields["url"], fields["doi"]) == (
        "Doe, J. and {Us}", "2031", "https://example.org/e", "10.1/x",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/lab/equipoise.git", "https://example.org/lab/equipoise"),
        ("https://user:secret@example.org/lab/equipoise", "https://example.org/lab/equipoise"),
        ("git@example.org:lab/equipoise.git", "https://example.org/lab/equipoise"),
        ("ssh://git@example.org/lab/equipoise", "https://example.org/lab/equipoise"),
        ("/srv/equipoise", None),
        ("../equipoise", None),
        (None, None),
    ],
)
def test_without_one_on_file_the_address_is_where_the_checkout_came_from(
    remote: str | None, address: str | None, tmp_path: Path
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    assert origin(tmp_path) == address


@pytest.mark.parametrize(
    ("source", "short"),
    [
        (PROTOCOL.sources[0], "Gaucher et al. (2011)"),
        ("Fiske, S. T., Cuddy, A. J. C., Glick, P., Xu, J. (2002). JPSP 82(6).", "Fiske et al. (2002)"),
        ("Müller-Lüdenscheidt, A., & O'Neill, B. (2020). Words.", "Müller-Lüdenscheidt and O'Neill (2020)"),
        ("Kay, A. (1999a). Words.", "Kay (1999)"),
        ("Our own list, 2024.", "Our own list, 2024"),
        ("A. Kay, B. Fiske (1999). Words.", "A. Kay, B. Fiske (1999). Words"),
    ],
)
def test_sources_are_cited_by_their_authors_where_these_are_plain(source: str, short: str) -> None:
    assert cited(source) == short


def test_a_source_that_is_no_article_is_a_note_as_it_stands() -> None:
    (entry,) = sources(["Müller & {Söhne} (2020)."])
    assert entry.key == "source1" and entry.kind == "misc"
    (fields,) = entries(entry.bibtex()).values()
    assert fields["note"] == '{M\\"{u}ller \\& \\textbraceleft{}S\\"{o}hne\\textbraceright{} (2020).}'


def test_sources_alike_in_author_and_year_have_keys_of_their_own() -> None:
    first = "Müller, A. (2020). One. Journal, 1(2), 3–4."
    second = "Müller, A., & Kay, B. C. (2020). Two? Journal, 1."
    mahesh = "Mahesh, X. (2025). Other. Journal, 2(1)."
    found = sources([first, second, mahesh])
    assert [entry.key for entry in found] == ["muller2020", "muller2020source2", "mahesh2025source3"]
    assert [entry.kind for entry in found] == ["article"] * 3
    assert found[1].fields["title"] == "Two?" and '= {M\\"{u}ller, A. and Kay, B. C.},' in found[1].bibtex()


@pytest.mark.parametrize("text", TEXTS)
def test_no_source_breaks_the_entries_or_the_text(text: str) -> None:
    (entry,) = sources([text])
    assert len(entries(entry.bibtex())) == 1
    paragraph = f"after {entry.mark()}, and 5 %"
    assert in_latex(paragraph) == f"after~\\cite{{{entry.key}}}, and 5 \\%"
    assert in_words(paragraph) == f"after {cited(text)}, and 5 %"


def test_a_citation_without_words_leaves_no_gap() -> None:
    assert in_words(f"equipoise 1 {software().mark()}.") == "equipoise 1."
    assert in_latex(f"the study {study().mark()} and more") == "the study~\\cite{mahesh2025} and more"
    assert in_words(f"the study {study().mark()} and more") == "the study (arXiv 2510.22084) and more"


def test_the_task_of_the_study_alone_has_its_sources() -> None:
    assert "gaucher2011" in bibtex(of_task(PROTOCOL)) and "gaucher" not in bibtex(of_task(foreign_task())).lower()
