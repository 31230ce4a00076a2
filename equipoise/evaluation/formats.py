"""A table as Markdown and as LaTeX. Whatever a name or a note holds is shown as it is, never read as markup."""

import re
import textwrap
from collections.abc import Iterable, Sequence

from equipoise.evaluation.tables import Cell, Table, whole
from equipoise.evaluation.tex import latex_text
from equipoise.evaluation.visible import shortened, visible


def markdown(table: Table) -> str:
    """A GitHub table. Whatever Markdown or HTML would read in a text is escaped."""
    rows = [[markdown_text(whole(cell)) for cell in row] for row in table.rows]
    for row in table.published:
        cells = [*(markdown_text(whole(cell)) for cell in row[1:]), *[""] * (len(table.heads) - len(row))]
        rows.append([f"{markdown_text(row[0].text)} †", *cells])
    lines = [_pipes(map(markdown_text, table.heads)), _pipes(["---", *["---:"] * (len(table.heads) - 1)])]
    lines += [_pipes(row) for row in rows]
    notes = [markdown_text(note) for note in table.notes]
    notes += [f"† {markdown_text(text)}" for text in _remarks(table)]
    return "\n".join([markdown_text(table.caption), "", *lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _remarks(table: Table) -> list[str]:
    """Where published rows are from and why they cannot be compared: rows with the same reason together."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row, source, reason in zip(table.published, table.sources, table.reasons, strict=True):
        rows.setdefault((source, reason), []).append(row[0].text)
    return [f"{'; '.join(names)} ({source}): {reason}" for (source, reason), names in rows.items()]


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_text(text: str) -> str:
    """`text` so that Markdown shows it as it is, on one line."""
    text = " ".join(visible(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)


def latex(table: Table, label: str, *, wide: bool) -> str:
    """A booktabs table, ready for `\\input`: over both columns of a page where it is `wide`, else within one. Needs the
    packages booktabs and graphicx.

    Names and heads are broken over lines; intervals stand below their values; what is too wide still is made smaller.
    """
    environment, most, gap = ("table*", 16, 2) if wide else ("table", 11, 3)
    size = "\\footnotesize" if wide else "\\small"
    lines = [
        "% \\usepackage{booktabs,graphicx} in the preamble",
        f"\\begin{{{environment}}}",
        f"\\centering{size}\\setlength{{\\tabcolsep}}{{{gap}pt}}",
        f"\\caption{{{latex_text(table.caption)}}}",
        f"\\label{{{label}}}",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{@{{}}l{'c' * (len(table.heads) - 1)}@{{}}}}",
        "\\toprule",
        _row([_head(head) for head in table.heads]),
        "\\midrule",
    ]
    rows = [_row([_latex_name(row[0], most), *map(_latex_cell, row[1:])]) for row in table.rows]
    lines += ["\n\\addlinespace[2pt]\n".join(rows)] if rows else []
    if table.published:
        published = []
        for row in table.published:
            cells = [f"{_latex_name(row[0], most)}\\textsuperscript{{\\dag}}", *map(_latex_cell, row[1:])]
            published.append(_row([*cells, *[""] * (len(table.heads) - len(row))]))
        lines += ["\\midrule", "\n\\addlinespace[2pt]\n".join(published)]
    lines += ["\\bottomrule", "\\end{tabular}}"]
    notes = [latex_text(note) for note in table.notes]
    notes += [f"\\textsuperscript{{\\dag}}{latex_text(text)}" for text in _remarks(table)]
    if notes:
        lines += [
            "\\par\\smallskip",
            "\\begin{minipage}{\\linewidth}\\raggedright\\scriptsize",
            *(f"{n}\\par" for n in notes),
        ]
        lines.append("\\end{minipage}")
    return "\n".join([*lines, f"\\end{{{environment}}}"]) + "\n"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _latex_name(cell: Cell, most: int) -> str:
    """A method's name, at most three lines of it."""
    return _wrapped(shortened(" ".join(visible(cell.text).split()), 3 * most - 4), most, "l")


def _head(text: str) -> str:
    """A column's heading, whose words stay whole where they are words: "combinations ↑" needs 14 columns."""
    return _wrapped(text, max(13, *(min(20, len(word)) for word in _signed(text).split(" "))), "c")


def _signed(text: str) -> str:
    """On one line, a sign kept with the word before it."""
    return re.sub(r" ([%↑↓])", "\u00a0\\1", " ".join(visible(text).split()))


def _wrapped(text: str, most: int, place: str) -> str:
    """Broken between words, and within one only where it is longer than a line."""
    text = _signed(text)
    lines = textwrap.wrap(text, most, break_on_hyphens=place == "l")
    return _stacked([latex_text(line) for line in lines], place)


def _latex_cell(cell: Cell) -> str:
    interval = [f"{{\\scriptsize {latex_text(cell.interval)}}}"] if cell.interval else []
    return _stacked([latex_text(cell.text), *interval], "c")


def _stacked(lines: Sequence[str], place: str) -> str:
    """Lines one below the other: centred (`c`) or from the left (`l`)."""
    at = "" if place == "c" else "[l]"
    return f"\\shortstack{at}{{" + "\\\\".join(lines) + "}" if len(lines) > 1 else "".join(lines)
