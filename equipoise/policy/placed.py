"""A finished model moved into its folder, whole or not at all; and whose files are in the way there."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from equipoise import __version__
from equipoise.errors import UserError
from equipoise.policy.adapter_config import CONFIG as ADAPTER_CONFIG
from equipoise.policy.adapter_config import WEIGHTS as ADAPTER_WEIGHTS
from equipoise.policy.card import is_card
from equipoise.policy.source import TASK
from equipoise.runs.exported import RECORD, exported_to, is_plain, is_unchanged, read_record, with_contents
from equipoise.runs.ownership import marked, read_run_record

WEIGHTS = "model.safetensors"
PARTIAL = ".equipoise-export"
EXPORTED = (
    *(WEIGHTS, "config.json", "generation_config.json", "README.md", TASK, "chat_template.jinja", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"),
    *("vocab.txt", "merges.txt", ADAPTER_CONFIG, ADAPTER_WEIGHTS),
)
"""What an export may write, but for files that only some tokenizers have."""
MODELS = (WEIGHTS, ADAPTER_WEIGHTS)
"""The file that a complete export has, written last: of a merged model, and of an adapter."""
_EITHER = {"merged": (WEIGHTS, "config.json"), "adapter": (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
"""What makes a folder one or the other. Only one of the two may be there, or both would be loaded, or neither."""


def is_finished(folder: Path, save: str) -> bool:
    """Whether the folder has a complete export in the form that `--save` names."""
    path = folder / _EITHER[save][0]
    return path.exists() and path.stat().st_size > 0


def put(folder: Path, write: Callable[[Path], None], needed: int, save: str = "merged") -> None:
    """Have `write` fill a folder aside, then move its files into `folder`, the weights last, with a record of them.

    An earlier export in the other form goes. `needed`: bytes. Raises UserError for a full disk, a folder that cannot be
    written, and a file in the way that no export wrote, or that was changed since.
    """
    partial = folder / PARTIAL
    (other,) = _EITHER.keys() - {save}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < needed:
            raise UserError(
                f"the model needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB: free some space"
            )
        write(partial)
        written = {str(path.relative_to(partial)): path for path in partial.rglob("*") if path.is_file()}
        refuse_foreign(folder, [*written, *_EITHER[other]])
        record = marked({"equipoise": __version__, "files": with_contents(folder, written)})
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _move(partial, folder, [*_EITHER[other], _EITHER[save][0]])
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the model to {folder} ({reason}): make room, or choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Files of plain names, in UTF-8."""
    for name, text in texts.items():
        assert Path(name).name == name, f"{name!r} is no plain file name"
        (folder / name).write_text(text, encoding="utf-8")


def _move(partial: Path, folder: Path, first_gone: Iterable[str]) -> None:
    """Move every file into place, the record first and the weights last; until then the folder has no weights."""
    paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for name in first_gone:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(paths, key=lambda path: (path.name in MODELS, path.name != RECORD)):
        target = folder / path.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


# Whose files are in the way


def not_ours(folder: Path, names: Iterable[str] = EXPORTED) -> list[Path]:
    """Those of `names` that are in the folder and that no export put there, links among them. Raises UserError."""
    there = [name for name in names if os.path.lexists(folder / name)]
    if not there:
        return []
    listed = exported_to(folder).keys() | _earlier(folder)
    return [folder / name for name in there if name not in listed or not is_plain(folder / name)]


def changed_since(folder: Path, names: Iterable[str] = EXPORTED) -> list[Path]:
    """Those of `names` that an export put into the folder and somebody has changed since, but for the record run.json,
    whose mark says whose it is. Raises UserError."""
    listed = exported_to(folder)
    there = [name for name in names if name != "run.json" and listed.get(name) and os.path.lexists(folder / name)]
    return [folder / name for name in there if not is_unchanged(folder / name, listed[name])]


def refuse_foreign(folder: Path, names: Iterable[str] = EXPORTED) -> None:
    """Raises UserError where a file that no export wrote, or not as it is now, lies where one would be written."""
    names = list(names)
    record = [folder / RECORD] if read_record(folder).state == "foreign" else []
    if foreign := [*not_ours(folder, names), *record]:
        raise UserError(
            f"{foreign[0]} is there and equipoise did not write it, so the model cannot take its place: move it away, "
            "or choose another --output-dir"
        )
    if changed := changed_since(folder, names):
        raise UserError(
            f"{changed[0]} was changed since equipoise wrote it, so the model cannot take its place: move it away, or "
            "choose another --output-dir"
        )


def _earlier(folder: Path) -> set[str]:
    """What an earlier version, which kept no record of it, exported to the folder, if its model card is there."""
    card = folder / "README.md"
    if os.path.lexists(folder / RECORD) or card.is_symlink() or not card.is_file():
        return set()
    if not is_card(card.read_text(encoding="utf-8", errors="replace")):
        return set()
    return {*EXPORTED, *(("run.json", "sentences.csv") if read_run_record(folder).state == "ours" else ())}
