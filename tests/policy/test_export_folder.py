"""The folder of an export: which files are in it, and what must not happen to those that are there."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
)

from equipoise.errors import NonFiniteError, UserError
from equipoise.policy.export import export
from equipoise.policy.source import resolve
from tests.policy.exported import CARD, logits, reload, with_adapters
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_folder_holds_the_named_files_and_keeps_others(tmp_path: Path) -> None:
    (tmp_path / "training_metrics.csv").write_text("step,reward\n")
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD, extra_files={"run.json": "{}"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "export.json", "generation_config.json", "model.safetensors",
        "run.json", "tokenizer.json", "tokenizer_config.json", "training_metrics.csv",
    }  # fmt: skip
    assert (tmp_path / "training_metrics.csv").read_text() == "step,reward\n"
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    texts = [path.read_text(errors="ignore") for path in tmp_path.iterdir()]
    assert not any(str(tmp_path) in text for text in texts)  # no paths of this machine


def test_plain_generate_samples_as_the_protocol_does(tmp_path: Path) -> None:
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD, stop_ids=(2, 17))
    settings = reload(tmp_path).generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 1.0, 0.95)
    assert settings.top_k == 0  # unset, transformers would cut to the 50 likeliest tokens
    assert (settings.max_new_tokens, settings.eos_token_id, settings.pad_token_id) == (32, [2, 17], 2)


def test_the_models_own_stop_tokens_are_kept_by_default(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [0, 1]
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    assert reload(tmp_path).generation_config.eos_token_id == [0, 1, 2]


def test_the_tokenizer_comes_back_the_same_with_its_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    export(tiny_model(), tokenizer, tmp_path, card=CARD)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Describe 8–15, naïvely: “ok”?"}]
    text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


# --- what must not happen


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_non_finite_is_written(tmp_path: Path, bad: float) -> None:
    model = with_adapters(tiny_model())
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight[3, 1] = bad
    with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp.down_proj.weight"):
        export(model, tiny_tokenizer(), tmp_path, card=CARD)
    assert list(tmp_path.iterdir()) == []


def test_an_overflow_of_the_file_dtype_is_found_too(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        export(model, tiny_tokenizer(), tmp_path, card=CARD, dtype=torch.float16)


def previous(folder: Path) -> dict[str, bytes]:
    export(tiny_model(seed=5), tiny_tokenizer(), folder, card=CARD)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_without_room_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = previous(tmp_path)
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("equipoise.policy.placed.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="free some space"):
        export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def flip_a_bit(partial: Path) -> None:
    data = bytearray((partial / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (partial / "model.safetensors").write_bytes(data)


def fill_the_disk(partial: Path) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("accident", [flip_a_bit, fill_the_disk])
def test_a_write_that_fails_or_garbles_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accident: Callable[[Path], None]
) -> None:
    before = previous(tmp_path)
    save = type(tiny_tokenizer()).save_pretrained  # the last thing written

    def save_badly(tokenizer: object, partial: Path) -> None:
        save(tokenizer, partial)
        accident(partial)

    monkeypatch.setattr(type(tiny_tokenizer()), "save_pretrained", save_badly)
    with pytest.raises(UserError, match="cannot write the model"):
        export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_killed_while_moving_the_folder_has_no_weights_rather_than_mixed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous(tmp_path)
    moved: list[str] = []
    replace = os.replace

    def replace_until_killed(origin: Path, target: Path) -> None:
        assert not (tmp_path / "model.safetensors").exists()
        moved.append(Path(target).name)
        if moved[-1] == "tokenizer.json":
            raise KeyboardInterrupt
        replace(origin, target)

    monkeypatch.setattr("equipoise.policy.placed.os.replace", replace_until_killed)
    with pytest.raises(KeyboardInterrupt):
        export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        resolve(str(tmp_path))
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    assert torch.equal(logits(reload(tmp_path)), logits(tiny_model()))


def test_a_leftover_of_a_killed_export_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".equipoise-export").mkdir()
    (tmp_path / ".equipoise-export" / "model-00001-of-00002.safetensors").write_bytes(b"old")
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    assert not list(tmp_path.glob("*-of-*")) and not (tmp_path / ".equipoise-export").exists()


def test_an_adapter_folder_and_a_folder_below_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    with pytest.raises(UserError, match="cannot write the model"):
        export(tiny_model(), tiny_tokenizer(), tmp_path / "adapter_config.json" / "below", card=CARD)


def test_no_file_that_an_export_did_not_write_is_replaced(tmp_path: Path) -> None:
    for name in ("README.md", "config.json", "tokenizer.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is there and equipoise did not write it"):
            export(tiny_model(), tiny_tokenizer(), folder, card=CARD)
        assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"
    export(tiny_model(), tiny_tokenizer(), tmp_path / "x", card=CARD)
    (tmp_path / "x" / "vocab.txt").write_text("mine")
    export(tiny_model(), tiny_tokenizer(), tmp_path / "x", card=CARD)
    assert (tmp_path / "x" / "vocab.txt").read_text() == "mine"
    (tmp_path / "x" / "export.json").unlink()  # as an earlier version left it: known by its card
    export(tiny_model(), tiny_tokenizer(), tmp_path / "x", card=CARD)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "tokenizer.json", "task.yaml"])
def test_a_file_that_was_changed_since_is_not_replaced(tmp_path: Path, name: str) -> None:
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD, extra_files={"task.yaml": "a: 1\n"})
    mine = (tmp_path / name).read_bytes() + b"\n"
    (tmp_path / name).write_bytes(mine)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"{name} was changed since equipoise wrote it"):
        export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD, extra_files={"task.yaml": "a: 2\n"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / name).rename(tmp_path / "mine")
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD, extra_files={"task.yaml": "a: 2\n"})
    assert (tmp_path / "mine").read_bytes() == mine


def test_the_record_tells_every_file_by_its_content_and_one_of_names_alone_still_counts(tmp_path: Path) -> None:
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)
    record = json.loads((tmp_path / "export.json").read_text())
    hashes = {path.name: [hashlib.sha256(path.read_bytes()).hexdigest()] for path in tmp_path.iterdir()}
    del hashes["export.json"]
    assert record["files"] == hashes
    (tmp_path / "export.json").write_text(json.dumps({**record, "files": sorted(hashes)}))
    export(tiny_model(), tiny_tokenizer(), tmp_path, card=CARD)


def test_an_export_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name in (".equipoise-export", "config.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).symlink_to(tmp_path / "far")
        with pytest.raises(UserError):
            export(tiny_model(), tiny_tokenizer(), tmp_path / "x", card=CARD)
        (tmp_path / "x" / name).unlink()
    assert not any((tmp_path / "far").iterdir())
