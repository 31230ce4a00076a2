"""How this program is called again from the shell that called it."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """`equipoise` where a shell finds this very installation by that name, else its Python with `-m equipoise`."""
    python = Path(sys.executable)
    found = shutil.which("equipoise")
    if found is not None and Path(found).parent == python.parent:
        return "equipoise"
    here = shutil.which("python")
    if here is not None and Path(here) == python:
        return "python -m equipoise"
    near = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
    return f"{shlex.quote(near)} -m equipoise"
