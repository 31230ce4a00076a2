"""A table as Markdown and as LaTeX. Whatever a name or a note holds is shown as it is, never read as markup."""

import re
import textwrap
from collections.abc import Iterable, Sequence

from equipoise.evaluation.tables import Cell, Table, whole
from equipoise.evaluation.visible import visible


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


def latex(table: Table) -> str:
    """A booktabs table, ready for `\\input`; needs the packages booktabs and graphicx, and UTF-8 input.

    Heads are broken over lines and intervals stand below their values; what is still too wide is made smaller.
    """
    columns = "l" + "c" * (len(table.heads) - 1)
    lines = [
        "% \\usepackage{booktabs,graphicx} in the preamble",
        "\\begin{table}",
        "\\centering\\footnotesize\\setlength{\\tabcolsep}{4pt}",
        f"\\caption{{{latex_text(table.caption)}}}",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(_latex_head, table.heads)) + " \\\\",
        "\\midrule",
    ]
    lines += [" & ".join(map(_latex_cell, row)) + " \\\\" for row in table.rows]
    if table.published:
        lines.append("\\midrule")
        for row in table.published:
            cells = [f"{latex_text(row[0].text)}\\textsuperscript{{\\dag}}", *map(_latex_cell, row[1:])]
            cells += [""] * (len(table.heads) - len(row))
            lines.append(" & ".join(cells) + " \\\\")
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
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _latex_head(text: str) -> str:
    lines = textwrap.wrap(" ".join(visible(text).split()), 13, break_long_words=False, break_on_hyphens=False)
    return _stacked([latex_text(line) for line in lines])


def _latex_cell(cell: Cell) -> str:
    interval = [f"{{\\scriptsize {latex_text(cell.interval)}}}"] if cell.interval else []
    return _stacked([latex_text(cell.text), *interval])


def _stacked(lines: Sequence[str]) -> str:
    return "\\shortstack{" + "\\\\".join(lines) + "}" if len(lines) > 1 else "".join(lines)


_LATEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%", "_": "\\_",
    "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "|": "\\textbar{}", "[": "{[}", "]": "{]}", '"': "''", "–": "--", "−": "$-$", "↑": "$\\uparrow$",
    "↓": "$\\downarrow$", "‖": "$\\Vert$", "δ": "$\\delta$", "’": "'", "…": "\\ldots{}",
}  # fmt: skip


def latex_text(text: str) -> str:
    """`text` so that LaTeX prints it as it is, on one line; emoji and the like, which its fonts lack, as "?"."""
    text = " ".join(visible(text).split())
    return "".join(_LATEX.get(c) or (c if c < "\u0250" else "?") for c in text)
