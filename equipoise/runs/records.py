"""What a record says of how something was made, and how two records differ."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise import __version__
from equipoise.protocol.difference import apart
from equipoise.protocol.task import PROTOCOL, Task, task_from_document
from equipoise.runs.command import typed

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
"""Whose versions decide what a model computes."""


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in document.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """`key: old → new` for every setting that differs, but for those in `free`, which may (dotted keys)."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in (a | b) if k not in free and a.get(k) != b.get(k)]
    return [f"{k.rpartition('.')[2].replace('_', '-')}: {apart(str(a.get(k)), str(b.get(k)))}" for k in keys]


def task_on_record(settings: Mapping[str, Any], where: str) -> Task:
    """The task under the key `task` of recorded settings; the default one where they have none, as records had before
    tasks were files. `where` names the record in the UserError that is raised for what is no task."""
    document = settings.get("task")
    return PROTOCOL if document is None else task_from_document(document, where)


def software(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The command and the versions it ran with; in a checkout, the commit and whether its source had been changed."""
    return {
        "command": typed(),
        "equipoise": __version__,
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    } | checkout(Path(__file__).resolve().parents[2])


SOURCE = (
    "equipoise/**/*.py",
    "equipoise/py.typed",
    "equipoise/evaluation/probes/*",
    "equipoise/evaluation/templates/*",
    "equipoise/protocol/tasks/*.yaml",
    "equipoise/ppo/curves.json",
    "equipoise/ppo/recorded/*",
    "equipoise/methods/ctrlg/packaged/*",
    "equipoise/plugins/lm_eval/*.yaml",
)
"""What of the package, were it in no commit yet, would change what a program does."""


def checkout(root: Path) -> dict[str, Any]:
    """The commit of the git checkout at `root`, and whether tracked files were changed or the package has source that
    is in no commit. What else lies there, outputs for one, is not of the program. Empty where git cannot tell."""
    if not (root / ".git").exists() or not shutil.which("git"):
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    added = _git(root, "ls-files", "--others", "--", *(f":(glob){pattern}" for pattern in SOURCE))
    if commit is None or changed is None or added is None:
        return {}
    return {"commit": commit, "uncommitted_changes": bool(changed or added)}


def origin(root: Path) -> str | None:
    """The public address that the checkout at `root` came from, without credentials; None where it has none."""
    address = _git(root, "remote", "get-url", "origin") if (root / ".git").exists() and shutil.which("git") else None
    found = re.fullmatch(
        r"(?:https?://(?:[^@/]*@)?|(?:ssh://)?git@)([\w-]+(?:\.[\w-]+)+)[:/]([\w./~-]+?)(?:\.git)?/?", address or ""
    )
    return f"https://{found[1]}/{found[2]}" if found else None


def _git(root: Path, *words: str) -> str | None:
    """What git prints; None where it refuses."""
    git = ["git", "--no-optional-locks", "-C", str(root), *words]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance() -> dict[str, Any]:
    """`software`, and the machine that models compute on."""
    import torch  # only here: what computes nothing need not wait for it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return software() | {"gpu": gpu, "threads": torch.get_num_threads()}
