"""What a start of a run makes, so that one which is refused leaves nothing behind."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

CURVES = "events.out.tfevents.*"


class Made:
    """Folders and files that were not there before."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """`folders` are about to be made, with those that they lie in."""
        each = {path for folder in folders for path in (folder, *folder.parents)}
        self._folders = sorted((path for path in each if not path.exists()), key=lambda path: -len(path.parts))
        self._files: list[Path] = []
        self._board, self._curves = Path(), set[Path]()

    def about_to_write(self, files: Iterable[Path], board: Path) -> None:
        """To be called with the locks held: of `files`, and of the curves in `board`, what is not there now will be
        this start's."""
        self._files = [path for path in files if not os.path.lexists(path)]
        self._board, self._curves = board, set(board.glob(CURVES))

    def remove_files(self) -> None:
        """To be called with the locks still held, and the files closed."""
        curves = set(self._board.glob(CURVES)) - self._curves
        for path in (*self._files, *(curves if self._files else ())):
            with suppress(OSError):
                path.unlink()
        self._files = []

    def remove_folders(self) -> None:
        """Those that are empty; to be called with the locks released, whose files lie in them."""
        for path in self._folders:
            with suppress(OSError):
                path.rmdir()
