"""How every figure is drawn and written: one look; PNG, SVG, PDF and the CSV of its numbers, the same bytes each time.

Colours are Okabe and Ito's (M. Okabe and K. Ito, *Color Universal Design*, 2008) and cividis for heat maps; whatever a
colour says, a marker, a dash pattern or a printed number says too, so that a figure can be read in grey.
"""

import csv
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from equipoise.evaluation.visible import visible

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#B8A800")
"""Okabe and Ito's eight, their yellow darkened so that it shows on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "*")
DASHES: tuple[tuple[float, tuple[float, ...]], ...] = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
GREY = "#555555"
DPI = 160

STYLE: dict[Any, Any] = {  # matplotlib's own type for it spells out every key
    # Text stays text: it can be read aloud, searched and copied, and needs no font file.
    "svg.fonttype": "none",
    "svg.hashsalt": "equipoise",
    "pdf.fonttype": 42,  # TrueType within the file: what publishers ask for, where Type 3 is turned down
    "font.family": "DejaVu Sans",  # matplotlib's own, so that every machine lays out alike
    "font.size": 9.0,
    "text.hinting": "none",  # else a text's width, and with it the layout, depends on the resolution
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class Look(NamedTuple):
    """How one method looks in every figure."""

    colour: str
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name, by its place: no two share colour and marker for the first 24."""
    return {
        name: Look(OKABE_ITO[i % len(OKABE_ITO)], MARKERS[(i + i // len(OKABE_ITO)) % len(MARKERS)])
        for i, name in enumerate(names)
    }


@dataclass(frozen=True)
class Plot:
    """A figure to be: what it shows in words, its numbers, and how to draw them."""

    name: str
    """The stem of its files."""
    title: str
    caption: str
    alt: str
    """What a reader who cannot see it needs to know."""
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    draw: Callable[[], Figure]
    dense: bool = False
    """Whether it is too full for a phone's width, and scrolls there."""


class Drawn(NamedTuple):
    """A figure as it is to be written. `svg` is the markup to put into a page."""

    plot: Plot
    svg: str
    files: Mapping[str, str | bytes]
    """NAME.svg, NAME.png, NAME.pdf and NAME.csv."""


def figure_of(plot: Plot) -> Figure:
    """The figure alone, for whoever shows or changes it."""
    with matplotlib.rc_context(STYLE):
        return plot.draw()


def draw(plot: Plot) -> Drawn:
    """The figure, its markup and its files."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name may hold any character
        figure = plot.draw()
        svg, png, pdf = io.StringIO(), io.BytesIO(), io.BytesIO()
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for all formats
        figure.savefig(png, format="png", dpi=DPI)
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
        FigureCanvasPdf(figure).print_pdf(pdf, metadata={"Title": visible(plot.title), "CreationDate": None})
    files: dict[str, str | bytes] = {
        f"{plot.name}.svg": svg.getvalue(),
        f"{plot.name}.png": png.getvalue(),
        f"{plot.name}.pdf": pdf.getvalue(),
        f"{plot.name}.csv": as_csv(plot.columns, plot.rows),
    }
    return Drawn(plot, inline(svg.getvalue(), plot.name, plot.alt), files)


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """RFC 4180; a missing number is an empty cell. A name that a spreadsheet would run gets an apostrophe before it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _csv_cell(cell: object) -> object:
    if isinstance(cell, str):
        cell = visible(cell)
        return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
    return "" if cell is None else cell


def inline(svg: str, name: str, alt: str) -> str:
    """matplotlib's SVG made fit for a page: no prologue, no styles (a strict policy blocks them), ids of its own.

    Every `style="fill: #fff"` becomes `fill="#fff"`; an SVG property means the same as an attribute.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r' style="([^"]*)"', lambda hit: _attributes(hit[1]), body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    label = _escape(alt)
    # `stroke-linejoin` and `-linecap` are what the dropped style sheet said of every element.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" '
        f'role="img" aria-label="{label}" stroke-linejoin="round" stroke-linecap="butt">{rest.strip()}'
    )


def _attributes(style: str) -> str:
    out = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":  # a shorthand, which has no attribute: weight, size and family are what matplotlib sets
            weight = re.search(r"\b(bold|[1-9]00)\b", value)
            size = re.search(r"([\d.]+)px", value)
            out += [f'font-weight="{weight[1]}"'] if weight else []
            out += [f'font-size="{size[1]}"'] if size else []
        elif key:
            out.append(f'{key}="{value}"')
    return "".join(f" {attribute}" for attribute in out)


def _escape(text: str) -> str:
    for raw, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(raw, entity)
    return text


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, laid out so that nothing is cut off."""
    return Figure(figsize=(width, height), layout="constrained")


def empty(message: str, width: float = 5.2, height: float = 1.0) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes)
    return figure


def heat(
    axes: Axes,
    table: Sequence[Sequence[float | None]],
    x: Sequence[str],
    y: Sequence[str],
    *,
    top: float,
    cell: Callable[[float], str],
    size: float = 7.0,
) -> None:
    """A heat map in cividis from 0 to `top`, every cell with its number in it, missing ones with a dash."""
    values = [[float("nan") if v is None else v for v in row] for row in table]
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#ffffff")
    # Drawn, not put in as a picture, so that cells have sharp edges at any size; lines of their colour hide the seams.
    edges = [[i - 0.5 for i in range(len(names) + 1)] for names in (x, y)]
    masked = np.ma.masked_invalid(values)
    axes.pcolormesh(*edges, masked, cmap=colours, vmin=0, vmax=top or 1, edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xticks(range(len(x)), x, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(y)), y)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            dark = value is not None and value < 0.55 * (top or 1)
            text = "–" if value is None else cell(value)
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")


def widen(values: Sequence[float], axes: Axes) -> None:
    """Give values that differ by no more than rounding an axis as wide as one of them has, not one of that rounding,
    whose ticks no one can read."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    low, high, size = min(finite), max(finite), max(map(abs, finite))
    if 0 < high - low <= 1e-6 * size:
        axes.set_ylim(low - 0.05 * size, high + 0.05 * size)


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A name for files for each method: its letters and digits, with a number where two would be alike."""
    out: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "method"
        slug, i = stem, 1
        while slug in out.values():
            i += 1
            slug = f"{stem}-{i}"
        out[name] = slug
    return out


def legend_below(figure: Figure, handles: Sequence[Artist], columns: int = 2) -> None:
    """A legend under everything, for which the figure becomes higher: of one column where a label is long."""
    longest = max((len(str(each.get_label())) for each in handles), default=0)
    columns = 1 if longest > 34 else max(1, min(columns, len(handles)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * max(0, math.ceil(len(handles) / columns) - 2))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)
