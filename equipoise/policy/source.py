"""Where a model is: bundled, a local folder, an adapter with its base, or the Hugging Face Hub; all but its weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.policy import bundled, saved, shapes
from equipoise.policy.adapter_config import CONFIG as ADAPTER
from equipoise.policy.adapter_config import WEIGHTS, lora_config
from equipoise.policy.config import LLAMA_8B
from equipoise.policy.families import check_family
from equipoise.policy.hub import cached_folder, explain, hub_access, quiet_progress
from equipoise.policy.packaged import GEMMA, PACKAGED, SMOLLM2, Packaged
from equipoise.protocol.task import Task, read_task

TASK = "task.yaml"
"""The task that a model was trained on, in its folder."""
_NO_7B = re.compile(r"(?:meta-llama/)?(?:meta[-_ ]?)?llama[-_ ]?3(?:[._]\d)?[-_ ]?7b([-_ ]instruct)?", re.IGNORECASE)
"""Names of a model that there is not; the group is there in those of an instruct model."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Source:
    """Where a model's weights are, as far as its name tells."""

    given: str
    """The name as the user wrote it."""
    kind: Literal["bundled", "folder", "adapter", "checkpoint", "hub", "shape"]
    path_or_id: str
    """A folder for `folder`, `adapter` and `checkpoint`, a Hub id for `hub`, the model's name for `bundled`."""
    notices: tuple[str, ...] = ()
    """Lines the user should see."""

    @property
    def packaged(self) -> Packaged | None:
        """What is known of a model that comes in a package, bundled or on request; None for any other."""
        return PACKAGED[self.path_or_id] if self.kind == "bundled" else None


def resolve(name: str) -> Source:
    """What a model's name stands for. Looks at folders, never at the network.

    A folder that exists wins over an alias or a Hub id of the same name; only `bundled` always means the bundled model.
    `gemma-3-270m` is a model that a package carries.
    Raises UserError for a folder without readable weights, a path that leads nowhere, and a name that is none of these.
    """
    return _resolve(name, ())


def _resolve(name: str, behind: tuple[Path, ...]) -> Source:
    """`resolve` for a model that those in the folders `behind` name as their base, one after the other."""
    given = name
    name = name.strip()
    if name.lower() in (SMOLLM2.alias, SMOLLM2.name.lower()):
        return Source(given, "bundled", SMOLLM2.name)
    if name.startswith(shapes.PREFIX):
        shape = name.removeprefix(shapes.PREFIX)
        shapes.shape_config(shape)
        return Source(given, "shape", shape, (f"random weights in the shape of {shape}: for timing only",))
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if (place := folder.resolve()) in behind:
            raise UserError(f"the model {given!r} is its own base, by way of {behind[-1]}: name the model it began as")
        behind = (*behind, place)
        if saved.is_checkpoint(folder):
            return Source(given, "checkpoint", str(folder), checkpoint_base(folder, behind).notices)
        if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
            return Source(given, "adapter", str(folder), adapter_base(folder, behind).notices)
        _check_folder(folder)
        return Source(given, "folder", str(folder))
    if name.lower() == GEMMA.alias:
        assert GEMMA.terms is not None
        terms = f"{GEMMA.name} and what is made of it are under the {GEMMA.terms.title}, {GEMMA.terms.url}"
        return Source(given, "bundled", GEMMA.name, (terms,))
    if no_such := _NO_7B.fullmatch(name):
        if not no_such[1]:
            raise UserError(f"there is no 7B Llama 3, so no {given!r}: write {LLAMA_8B}")
        return Source(given, "hub", LLAMA_8B, (f"there is no 7B Llama 3, so {name} is taken as {LLAMA_8B}",))
    if folder.is_file():
        raise UserError(f"the model {given!r} is a file: give the folder that holds config.json and model.safetensors")
    if _HUB_ID.fullmatch(name) and not name.startswith(".") and not Path(name.partition("/")[0]).is_dir():
        return Source(given, "hub", name)
    if "/" in name or "\\" in name or name.startswith(("~", ".")):
        raise UserError(f"there is no model folder {given!r}: check the path, or give a Hub id such as {LLAMA_8B}")
    raise UserError(
        f"there is no model {given!r}: give `bundled`, `{GEMMA.alias}`, a folder, or a Hub id such as {LLAMA_8B}"
    )


def recorded_task(source: Source) -> Task | None:
    """The task that a model was trained on here: `task.yaml` in its folder, or a checkpoint's own. None for a model
    that says nothing.

    Raises UserError for a file that is no task.
    """
    if source.kind == "checkpoint":
        return saved.read_saved(Path(source.path_or_id)).task
    path = Path(source.path_or_id) / TASK
    return read_task(path) if source.kind in ("folder", "adapter") and path.is_file() else None


def adapter_base(folder: Path, behind: tuple[Path, ...] = ()) -> Source:
    """The model that the adapter in `folder` belongs to. Raises UserError if its configuration does not name one.

    `behind`: the folders that led here, none of which may be met again.
    """
    config = read_object(folder / ADAPTER)
    lora_config(config, folder / ADAPTER)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"the adapter folder {folder} lacks {WEIGHTS}: save the adapter again")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"{folder / ADAPTER} names no base model: set its base_model_name_or_path")
    source = _resolve(base, behind or (folder.resolve(),))
    if source.kind == "adapter":
        raise UserError(f"the adapter in {folder} has another adapter as base, {base!r}: merge that one first")
    return source


def checkpoint_base(folder: Path, behind: tuple[Path, ...] = ()) -> Source:
    """The model that the training of the checkpoint in `folder` began with. Raises UserError where it is gone.

    `behind`: as for `adapter_base`.
    """
    base = saved.read_saved(folder).policy.model
    try:
        source = None
        if Path(base).expanduser().resolve() != folder.resolve():
            source = _resolve(base, behind or (folder.resolve(),))
    except UserError as error:
        raise UserError(
            f"the checkpoint {folder} belongs to the model {base!r}, which is not to be had: {error}"
        ) from None
    if source is None or source.kind == "checkpoint":
        raise UserError(f"the checkpoint {folder} has another one as base, {base!r}: export that one first")
    return source


def load_config(source: Source) -> PreTrainedConfig:
    """The model's configuration, without its weights. Raises UserError, also for a family that is not supported."""
    if source.kind == "shape":
        return shapes.shape_config(source.path_or_id)
    if source.kind == "adapter":
        return load_config(adapter_base(Path(source.path_or_id)))
    if source.kind == "checkpoint":
        return load_config(checkpoint_base(Path(source.path_or_id)))
    with loading(source):
        config = AutoConfig.from_pretrained(place(source), trust_remote_code=False)
    check_family(config, source.given)
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer; an adapter folder without one gets its base's. Raises UserError if there is none to be had."""
    if source.kind == "checkpoint":
        return load_tokenizer(checkpoint_base(Path(source.path_or_id)))
    if source.kind == "adapter" and not (Path(source.path_or_id) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(Path(source.path_or_id)))
    where = place(source)
    if source.kind != "hub" and not list(Path(where).glob("tokenizer*")):
        raise UserError(f"the folder {where} holds no tokenizer: copy tokenizer.json and tokenizer_config.json into it")
    with loading(source):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)


def place(source: Source) -> str:
    """The folder that a model's files lie in, where they are on this machine; else its id on the Hub.

    A cached model is loaded as the folder that it is: asking the Hub whether it has changed takes minutes without a
    network, and would have a run go on with other weights. Raises UserError where the Hub does not give it.
    """
    if source.kind in ("bundled", "shape"):
        return str(bundled.folder(source.packaged or SMOLLM2))
    if source.kind == "hub" and (folder := cached_folder(source.path_or_id)) is not None:
        _check_folder(folder)
        return str(folder)
    # What the Hub will refuse, it refuses here at once; the loaders would retry for minutes.
    if source.kind == "hub" and not (access := hub_access(source.path_or_id, timeout=20.0)).available:
        raise UserError(access.reason)
    return source.path_or_id


def check_code(config: PreTrainedConfig, source: Source) -> None:
    """Raises UserError for a configuration that has transformers fetch and run kernels: OWNER/NAME as attention."""
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    for part in parts:
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(value := getattr(part, name, "") or ""):
                raise UserError(
                    f"the model {source.given!r} names code to be fetched and run ({value!r:.60}), which is never done "
                    "here: remove that line from its config.json"
                )


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Turn what goes wrong inside into one UserError line."""
    try:
        with quiet_progress() if source.kind != "hub" else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:  # a configuration may hold anything, and the libraries' code fails on it in any way
        line = explain(source.path_or_id, error) if source.kind == "hub" else None
        line = line or _unusable(source, error)
        if line is None:
            raise
        raise UserError(line) from None  # the original may quote the access token, so no traceback shall show it


def _unusable(source: Source, error: Exception) -> str | None:
    model = repr(source.given)
    text = str(error)
    first = (text.strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"the model {model} does not fit into the GPU's memory: use --use-8bit, or choose a smaller model"
    if isinstance(error, RecursionError):
        return f"a file of the model {model} is nested too deeply to be read: copy or download it again"
    if isinstance(error, SafetensorError):
        return f"the weights of {model} cannot be read, the file is damaged or cut short: copy or download it again"
    if isinstance(error, ImportError):
        return f"loading {model} needs a Python package that is missing: {first}"
    if "trust_remote_code" in text:
        return f"the model {model} needs code of its own, which is never run here: choose one that transformers knows"
    if "does not recognize this architecture" in text or "Unrecognized configuration class" in text:
        return f"transformers does not know {model} as a causal LM: upgrade it, or choose another model"
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return f"the weights of {model} do not fit its configuration: its files belong to different models"
    if "does not appear to have" in text or "Unrecognized model in" in text:
        return f"the model {model} lacks config.json or safetensors weights: choose one that has both"
    if "Couldn't instantiate the backend tokenizer" in text:
        return f"the model {model} has no tokenizer.json that can be read: choose one that has"
    if source.kind not in ("folder", "adapter", "checkpoint") or "CUDA" in text:
        return None
    return f"the model folder {source.path_or_id} cannot be loaded: {first:.200}"


def _check_folder(folder: Path) -> None:
    """Raises UserError unless `folder` holds a configuration and safetensors files as long as their headers say."""
    if not (folder / "config.json").is_file():
        raise UserError(f"the model folder {folder} holds no config.json: give the folder that holds the model itself")
    read_object(folder / "config.json")
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder} holds a model and an adapter ({ADAPTER}): move the one that is not meant elsewhere")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    elif index.is_file():
        weights = read_object(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{index} lists no weights: copy the model again")
        names = {str(name) for name in weights.values()}
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise UserError(f"the weights in {folder} are pickles, which can run code: save the model again as safetensors")
    else:
        raise UserError(f"the model folder {folder} holds no model.safetensors: its export or copy is incomplete")
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise UserError(f"the model folder {folder} lacks {name}: copy the model again")
        try:
            with safe_open(path, framework="np"):  # reads the header and compares it with the file's length
                pass
        except (SafetensorError, OSError):
            raise UserError(f"{path} cannot be read, it is damaged or cut short: copy or download it again") from None


def read_object(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read as JSON: copy the model again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is no JSON object: copy the model again")
    return document
