"""The HTML file: asks the network for nothing, runs nothing but its own script, and shows every text as it is."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from equipoise.evaluation.assemble import report
from equipoise.evaluation.config import ReportConfig
from equipoise.evaluation.page import json_block
from tests.evaluation import hostile

Attributes = list[tuple[str, str | None]]
pytestmark = pytest.mark.usefixtures("no_pdf")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """What a browser would make of the file: elements, attributes, the texts of styles and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Attributes) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self.blocks.append((tag, dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Attributes) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"script", "style"}:
            tag, attributes, text = self.blocks[-1]
            self.blocks[-1] = (tag, attributes, text + data)
        else:
            self.text += data

    @property
    def samples(self) -> dict[str, Any]:
        (block,) = (text for _, attributes, text in self.blocks if attributes.get("id") == "samples-data")
        return dict(json.loads(block))


@pytest.fixture(scope="module")
def page(no_pdf: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on hostile names and texts, with a training run."""
    folder = tmp_path_factory.mktemp("hostile")
    run = hostile.training_run(folder / "run")
    output = folder / "out" / "report.html"
    report(ReportConfig((str(hostile.hostile(folder / "in")),), output, (run,)))
    return output


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_nothing_in_the_file_names_anything_outside_it(parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in {"href", "src", "srcset", "action", "data", "poster", "xlink:href", "background"}:
                assert value is not None and value.startswith(("#", "data:")), (tag, name, value)
            elif value is not None and "url(" in value:
                assert set(re.findall(r"url\((.)", value)) == {"#"}, (tag, name, value)
    style = next(text for tag, _, text in parsed.blocks if tag == "style")
    assert "url(" not in style and "@import" not in style


def test_the_policy_allows_the_one_style_and_the_one_script_by_hash_and_nothing_else(parsed: Page) -> None:
    (policy,) = (a["content"] for t, a in parsed.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag in ("style", "script"):
        texts = [text for kind, attributes, text in parsed.blocks if kind == tag and "type" not in attributes]
        assert len(texts) == 1
        digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert not {"unsafe-inline", "unsafe-eval"} & set(re.findall(r"unsafe-\w+", policy))


def test_what_the_policy_would_block_is_not_used(parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag


def test_hostile_names_and_texts_add_no_element(parsed: Page) -> None:
    assert sum(tag == "script" for tag, _ in parsed.elements) == 2  # the data and the page's own
    assert not [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert not parsed.open
    assert "alert(4)" in parsed.text  # shown


def test_the_file_is_plain_utf8_without_controls_or_half_characters(page: Path) -> None:
    text = page.read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_every_id_is_there_once_and_every_link_within_the_page_leads_somewhere(parsed: Page) -> None:
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.elements:
        for name in ("href", "xlink:href"):
            target = attributes.get(name) or ""
            assert not target.startswith("#") or target[1:] in ids, target


def test_every_sentence_is_in_the_data_with_its_terms_where_a_browser_counts_them(parsed: Page) -> None:
    data = parsed.samples
    assert len(data["rows"]) == 120
    found = set()
    for row in data["rows"]:
        units = row[3].encode("utf-16-le")
        spans = row[-1]
        for i in range(0, len(spans), 3):
            start, end, kind = spans[i : i + 3]
            found.add((units[2 * start : 2 * end].decode("utf-16-le").lower(), kind))
    assert found == {("bold", 0), ("caring", 1)}


def test_a_text_of_ten_thousand_characters_is_kept_whole(parsed: Page) -> None:
    assert max(len(row[3]) for row in parsed.samples["rows"]) == 10_000


def test_nul_and_direction_marks_and_half_characters_are_made_visible(parsed: Page) -> None:
    texts = {row[3] for row in parsed.samples["rows"]}
    assert "a␀b␇c" in texts
    assert "lone � surrogate � bold and caring" in texts
    assert "�reversed� שלום bold مرحبا caring" in texts


def test_a_data_block_cannot_be_left() -> None:
    document = {"a": ["</script><!--", "\u2028&amp;", "\\u003c"]}
    block = json_block(document)
    assert not set("<>&\u2028\u2029") & set(block)
    assert json.loads(block) == document


def test_every_figure_says_in_words_what_it_shows(parsed: Page) -> None:
    drawings = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert len(drawings) >= 9
    for attributes in drawings:
        assert attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20
    assert sum(tag == "figcaption" for tag, _ in parsed.elements) == len(drawings)


def test_alerts_of_a_run_are_listed_with_evidence_and_remedy_as_text(parsed: Page) -> None:
    assert "one-class plateau, step 9: compliance/one 0.61" in " ".join(parsed.text.split())
    assert "warm start <b>now</b>" in parsed.text
    assert "<i>x</i>" in parsed.text
    assert "resume at step 20" in parsed.text


def test_the_same_evaluation_gives_the_same_bytes(page: Path, html: str, tmp_path: Path) -> None:
    source = page.parent.parent
    report(ReportConfig((str(source / "in"),), tmp_path / "report.html", (source / "run",)))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    for path in sorted((page.parent / "report_files").iterdir()):
        assert (tmp_path / "report_files" / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_cell_of_the_figures_files_is_a_formula(page: Path) -> None:
    for path in (page.parent / "report_files").glob("*.csv"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("=", "+", "@", '"=', '"@')), (path.name, line)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_fills_the_sample_table_and_blocks_nothing(page: Path, tmp_path: Path) -> None:
    assert CHROMIUM
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = Page(done.stdout)
    assert "120 of 120 sentences (100.0 %), page 1 of 5" in shown.text
    assert sum(tag == "option" for tag, _ in shown.elements) == 3 + 3 + 4 + 5  # "all", methods, occupations, outcomes
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
