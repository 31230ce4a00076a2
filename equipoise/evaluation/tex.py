"""Texts as LaTeX prints them with any of its engines and font encodings, and its own words never read in them."""

import unicodedata

from equipoise.evaluation.visible import visible

_SIGNS = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%", "_": "\\_",
    "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "|": "\\textbar{}", "[": "{[}", "]": "{]}", '"': "''", "’": "'", "‘": "`", "“": "``", "”": "''", "–": "--",
    "—": "---", "…": "\\ldots{}", "¡": "!`", "¿": "?`", "§": "\\S{}", "¶": "\\P{}", "£": "\\pounds{}",
    "©": "\\copyright{}", "ß": "\\ss{}", "æ": "\\ae{}", "Æ": "\\AE{}", "œ": "\\oe{}", "Œ": "\\OE{}", "ø": "\\o{}",
    "Ø": "\\O{}", "ł": "\\l{}", "Ł": "\\L{}", "ı": "\\i{}",
}  # fmt: skip
_MATHS = {
    "−": "-", "↑": "\\uparrow", "↓": "\\downarrow", "→": "\\rightarrow", "←": "\\leftarrow", "‖": "\\Vert",
    "·": "\\cdot", "×": "\\times", "÷": "\\div", "±": "\\pm", "≥": "\\geq", "≤": "\\leq", "≈": "\\approx",
    "«": "\\ll", "»": "\\gg", "¬": "\\neg", "⌊": "\\lfloor", "⌋": "\\rfloor", "°": "^\\circ", "₀": "_0",
    "¹": "^1", "²": "^2", "³": "^3", "α": "\\alpha", "β": "\\beta", "γ": "\\gamma", "δ": "\\delta",
    "ε": "\\varepsilon", "λ": "\\lambda", "µ": "\\mu", "μ": "\\mu", "π": "\\pi", "σ": "\\sigma", "τ": "\\tau",
    "Δ": "\\Delta", "Σ": "\\Sigma",
}  # fmt: skip
_MARKS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0323": "d", "\u0327": "c", "\u0331": "b",
}  # fmt: skip
"""Combining marks with the letter or sign of LaTeX's command that puts them over, or under, what comes before."""


def latex_text(text: str) -> str:
    """`text` so that LaTeX prints it as it is, on one line, in ASCII: Latin letters with their marks; "?" for a letter
    of another script, emoji and whatever else its fonts lack."""
    out: list[str] = []
    for c in unicodedata.normalize("NFC", " ".join(visible(text).split())):
        if unicodedata.combining(c):  # one that goes with no letter as a single character
            out = [*out[:-1], _marked(out[-1], c) or out[-1]] if out and out[-1] != " " else out
        else:
            base, *marks = list(unicodedata.normalize("NFD", c))
            out.append(_marked(_sign(base), *marks) or "?")
    return "".join(out)


def _sign(c: str) -> str:
    if c in _MATHS:
        return f"${_MATHS[c]}$"
    return _SIGNS.get(c) or (c if " " <= c <= "~" else "")


def _marked(text: str, *marks: str) -> str:
    """With the marks; empty where LaTeX has none of that kind everywhere."""
    for mark in marks:
        text = f"\\{_MARKS[mark]}{{{text}}}" if text and mark in _MARKS else ""
    return text
