"""For tests of whole reports, which draw ten figures in four formats each."""

from collections.abc import Iterator
from typing import Any

import pytest

from equipoise.evaluation import plots


class Unwritten:
    """In the place of the canvas that writes PDF: half of a report's time is spent on subsets of its font."""

    def __init__(self, _: Any) -> None: ...

    def print_pdf(self, out: Any, **_: Any) -> None:
        out.write(b"%PDF, left out by tests that do not look into it")


@pytest.fixture(scope="module")
def no_pdf() -> Iterator[None]:
    """Every figure's PDF is a few bytes. `test_figures` looks at real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "FigureCanvasPdf", Unwritten)
        yield
