"""What is written for LaTeX: texts that hold none of its commands, tables that are whole and fit a page's columns."""

import dataclasses
import itertools
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest

from equipoise.evaluation import fairness_tables, tables
from equipoise.evaluation.formats import latex
from equipoise.evaluation.paper import bibtex, methods_latex
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.tables import Cell, Table
from equipoise.evaluation.tex import latex_text
from tests.evaluation.hostile import TEXTS, example, renamed

TEX = shutil.which("pdflatex")

# Texts.


def plain(tex: str) -> str:
    """What LaTeX prints of a text, by a reader of just those commands that texts may hold; any other fails."""
    signs = {"textbackslash": "\\", "textasciicircum": "^", "textasciitilde": "~", "textless": "<", "textgreater": ">",
             "textbar": "|", "ldots": "…", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "o": "ø", "O": "Ø",
             "l": "ł", "L": "Ł", "i": "ı", "S": "§", "P": "¶", "pounds": "£", "copyright": "©"}  # fmt: skip
    marks = dict(zip("`'^~=u.\"rHvdcb", "̧̣̱̀́̂̃̄̆̇̈̊̋̌", strict=True))
    tex = re.sub(r"\\([A-Za-z]+)\{\}", lambda hit: f"\ue000{ord(signs[hit[1]]):04x}", tex)
    tex = re.sub(r"\\([{}$&#%_])", lambda hit: f"\ue000{ord(hit[1]):04x}", tex)
    tex = re.sub(r"\{([][])\}", lambda hit: f"\ue000{ord(hit[1]):04x}", tex)
    tex = re.sub(r"\$(\^?\\[A-Za-z]+|[_^]\d|-)\$", "¤", tex)
    while hit := re.search(r"\\([`'^~=.\"]|[urHvdcb](?=\{))\{([^{}\\]+)\}", tex):
        tex = tex.replace(hit[0], hit[2] + marks[hit[1]])
    assert not set("\\{}$&#%_^~") & set(tex), tex
    return unicodedata.normalize("NFC", re.sub("\ue000(....)", lambda hit: chr(int(hit[1], 16)), tex))


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_texts_hold_no_command_of_latex(text: str) -> None:
    shown = latex_text(text)
    assert "\n" not in shown and shown.isascii()
    plain(shown)


@pytest.mark.parametrize(
    "text",
    [
        "Müller-Lüdenscheidt",
        "Łukasz Ørsted",
        "ǖ ễ Ǻ",
        "naïve façade, Dvořák",
        "5 % & [x]_{1} <a|b> \\ ^ ~ # $",
        "q̂ = p̄",
    ],
)
def test_latin_texts_are_printed_as_they_are(text: str) -> None:
    assert plain(latex_text(text)) == unicodedata.normalize("NFC", text)


def test_letters_of_other_scripts_are_one_question_mark_each() -> None:
    assert latex_text("한국 שלום 🙂 ąđ") == "?? ???? ? ??"


def test_signs_that_reports_use_are_printed() -> None:
    text = "KL(π‖π₀) ≥ kl(c‖p₀) = c·ln(c/p₀) + (1−c) ± 2² × 3 ↑↓ “so” isn’t …"
    assert "?" not in latex_text(text) and latex_text("p₀ ≥ −1") == r"p$_0$ $\geq$ $-$1"
    assert latex_text("“so” isn’t 1–2") == "``so'' isn't 1--2"


# Tables.


def read(tex: str) -> tuple[str, str, list[list[str]]]:
    """(environment, label, cells of each row) of a table, by a strict reader."""
    found = re.fullmatch(
        r"% \\usepackage\{booktabs,graphicx\} in the preamble\n"
        r"\\begin\{(table\*?)\}\n\\centering\\(?:small|footnotesize)\\setlength\{\\tabcolsep\}\{\dpt\}\n"
        r"\\caption\{.*\}\n\\label\{([a-z:-]+)\}\n"
        r"\\resizebox\{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi\}\{!\}\{%\n"
        r"\\begin\{tabular\}\{@\{\}(lc*)@\{\}\}\n\\toprule\n(.*)\n\\bottomrule\n\\end\{tabular\}\}\n"
        r"(?:\\par\\smallskip\n\\begin\{minipage\}\{\\linewidth\}\\raggedright\\scriptsize\n(?:.*\\par\n)+\\end\{minipage\}\n)?"
        r"\\end\{(table\*?)\}\n",
        tex,
        re.S,
    )
    assert found and found[1] == found[5], tex
    depth = 0
    for c in re.sub(r"\\\\|\\[{}]", "", tex):
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0
    rows = []
    for line in found[4].splitlines():
        if line not in (r"\midrule", r"\addlinespace[2pt]"):
            assert line.endswith(r" \\"), line
            rows.append(re.split(r"(?<!\\) ?& ?", line.removesuffix(r" \\")))
    assert {len(row) for row in rows} == {len(found[3])}
    return found[1], found[2], rows


def test_a_small_table() -> None:
    table = Table("100 %", ("method", "x, % ↑"), ((Cell("a_b"), Cell("1.0", "[0.5, 1.5]")), (Cell("c"), Cell("–"))))
    environment, label, rows = read(latex(table, "tab:x", wide=False))
    assert (environment, label) == ("table", "tab:x")
    assert rows == [
        ["method", r"x, \% $\uparrow$"],
        [r"a\_b", r"\shortstack{1.0\\{\scriptsize {[}0.5, 1.5{]}}}"],
        ["c", "--"],
    ]
    assert r"\caption{100 \%}" in latex(table, "tab:x", wide=False)
    assert read(latex(table, "tab:x", wide=True))[0] == "table*"


def test_long_heads_and_names_are_broken_between_words_and_signs_stay_with_theirs() -> None:
    table = Table("", ("method", "generations per accepted, % ↑"), ((Cell("Generate-and-Filter " * 30), Cell("")),))
    _, _, (head, row) = read(latex(table, "tab:x", wide=False))
    assert head[1] == r"\shortstack{generations\\per\\accepted, \% $\uparrow$}"
    assert row[0] == r"\shortstack[l]{Generate-\\and-F\ldots{}ate-\\and-Filter}"


def test_published_rows_fill_the_width_of_the_table() -> None:
    rows = ((Cell("A"), Cell("1")), (Cell("B"), Cell("2")))
    table = Table("", ("method", "x", "y"), (), rows, ("paper", "paper"), ("not comparable: why",) * 2)
    _, _, (_, first, second) = read(latex(table, "tab:x", wide=True))
    assert first == [r"A\textsuperscript{\dag}", "1", ""] and second[0].startswith("B")


def test_in_short_it_is_the_headline_metrics_with_their_intervals() -> None:
    evaluation = example()
    table = tables.in_short(evaluation)
    assert table.heads == ("method", "strict success, % ↑", "effective pairs ↑", "median NLL, bundled, nats/token ↓")
    assert [cell.text for cell in table.rows[2]] == ["PPO", "90.0", "27.8", "2.88"]
    assert table.rows[2][1].interval == "[74.9, 98.0]" and "of 40 sentences a method" in table.caption
    methods = evaluation.methods | {"PPO": dataclasses.replace(evaluation.methods["PPO"], n=7)}
    assert "of 7 to 40 sentences" in tables.in_short(dataclasses.replace(evaluation, methods=methods)).caption


def both(evaluation: Evaluation) -> dict[str, str]:
    return {
        "headline.tex": latex(tables.in_short(evaluation), "tab:headline", wide=False),
        "headline-wide.tex": latex(tables.headline(evaluation), "tab:headline-wide", wide=True),
        "fairness.tex": latex(_fairness(evaluation), "tab:fairness", wide=True),
        "methods.tex": methods_latex(evaluation, ()),
        "references.bib": bibtex(evaluation),
    }


def _fairness(evaluation: Evaluation) -> tables.Table:
    table = fairness_tables.in_short(evaluation)
    assert table is not None
    return table


def named(names: list[str]) -> Evaluation:
    evaluation = example()
    methods = dict(zip(names, itertools.cycle(evaluation.methods.values()), strict=False))
    return dataclasses.replace(evaluation, methods=methods)


TEN = ["Prompt-Only", "Generate-and-Filter", "Ctrl-G (AND), SmolLM2-135M", "SFT (LoRA)", "PPO, varied",
       "PPO, bundled-cpu", "DPO", "INLP", "Llama-3.1-8B-Instruct", "My own method, second try"]  # fmt: skip


@pytest.mark.parametrize("evaluation", [example(), named(TEN), named(list(TEXTS))], ids=["three", "ten", "hostile"])
def test_every_table_is_whole(evaluation: Evaluation) -> None:
    files = both(evaluation)
    environments = [read(files[name])[:2] for name in ("headline.tex", "headline-wide.tex", "fairness.tex")]
    assert environments == [("table", "tab:headline"), ("table*", "tab:headline-wide"), ("table*", "tab:fairness")]


PAGE = r"""\documentclass[twocolumn]{article}
\usepackage{booktabs,graphicx,url}
\begin{document}
\input{methods.tex}
Tables~\ref{tab:headline}, \ref{tab:headline-wide} and~\ref{tab:fairness}.
\let\fit\resizebox
\renewcommand{\resizebox}[3]{\sbox0{#3}\typeout{NATURAL \the\wd0\space OF \the\linewidth}\fit{#1}{#2}{#3}}
\input{headline.tex}
\input{headline-wide.tex}
\input{fairness.tex}
\bibliographystyle{plain}
\bibliography{references}
\end{document}
"""


@pytest.mark.skipif(TEX is None or shutil.which("bibtex") is None, reason="needs TeX")
@pytest.mark.parametrize("evaluation", [example(), named(TEN), named(list(TEXTS))], ids=["three", "ten", "hostile"])
def test_a_page_of_two_columns_is_typeset_with_nothing_undefined_or_too_wide(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    for name, text in (both(evaluation) | {"page.tex": PAGE}).items():
        (tmp_path / name).write_text(text, encoding="ascii")
    log = ""
    for command in ("pdflatex", "bibtex", "pdflatex", "pdflatex"):
        arguments = [command, *(["-interaction=nonstopmode"] if command == "pdflatex" else []), "page"]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, errors="replace")
        log = done.stdout
        assert done.returncode == 0 and "\n!" not in log and "Warning--" not in log, log[-3000:]
    assert "undefined" not in log and "multiply" not in log
    (column, width), (page, text_width), (fair, _) = re.findall(r"NATURAL ([\d.]+)pt\s?OF ([\d.]+)pt", log)
    assert float(text_width) == 469 and min(float(page), float(fair)) > float(column)
    # Within one column it is made smaller nowhere, not in the narrowest of the usual templates either (219 pt).
    assert float(width) == 229.5 and (float(column) <= 219 or TEXTS[0] in evaluation.methods)
    assert "Overfull" not in "".join(log.partition("headline.tex")[1:])


@pytest.mark.skipif(TEX is None, reason="needs TeX")
@pytest.mark.parametrize("fonts", ["", r"\usepackage[T1]{fontenc}"])
def test_every_character_below_0250_and_every_sign_is_typeset(fonts: str, tmp_path: Path) -> None:
    words = [latex_text(chr(c)) for c in [*range(0x21, 0x250), *map(ord, "₀≥≤≈‖π↑↓…“”’‘–—−⌊⌋ΔΣλ")]]
    page = rf"\documentclass{{article}}{fonts}\begin{{document}}" + "\n\n".join(words) + r"\end{document}"
    (tmp_path / "page.tex").write_text(page, encoding="ascii")
    command = ["pdflatex", "-draftmode", "-interaction=nonstopmode", "page"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and "\n!" not in done.stdout, done.stdout[-2000:]


def test_every_name_is_told_apart_in_the_tables() -> None:
    evaluation = renamed(example(), lambda old: f"A method with a name that is quite long, of {old}")
    _, _, rows = read(both(evaluation)["headline.tex"])
    assert len({row[0] for row in rows}) == 4
