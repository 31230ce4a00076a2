"""Which model a name means, and a folder that is no whole model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise.errors import UserError
from equipoise.policy.config import LLAMA_8B
from equipoise.policy.source import load_config, load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.policy.sources import CPU
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# --- names


@pytest.mark.parametrize("name", ["bundled", "Bundled", "SmolLM2-135M-Instruct", " bundled "])
def test_bundled_has_two_names(name: str) -> None:
    assert resolve(name).kind == "bundled"


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-7B-Instruct",
        "LLaMA-3-7B-Instruct",
        "llama-3-7b-instruct",
        "meta-llama/Llama-3.1-7B-Instruct",
        "meta-llama/LLaMA-3-7B-Instruct",
        "Meta-Llama/Meta-Llama-3-7B-Instruct",
        "llama3-7b-instruct",
        "Llama_3.1_7B_Instruct",
        "Meta Llama 3.1 7B Instruct",
        "meta-llama/Llama-3.2-7B-Instruct",
    ],
)
def test_the_guides_7b_names_mean_the_8b_and_say_so(name: str) -> None:
    source = resolve(name)
    assert (source.kind, source.path_or_id) == ("hub", "meta-llama/Llama-3.1-8B-Instruct")
    (notice,) = source.notices
    assert "no 7B Llama 3" in notice and "\n" not in notice


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-7B", "llama-3-7b", "LLaMA3 7B"])
def test_a_7b_that_is_no_instruct_model_is_answered_with_what_to_write_before_the_hub_is_asked(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert str(caught.value) == f"there is no 7B Llama 3, so no {name!r}: write {LLAMA_8B}"


@pytest.mark.parametrize("name", [LLAMA_8B, "meta-llama/Llama-2-7b-hf", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_ids_stay_as_they_are_without_a_notice(name: str) -> None:
    source = resolve(name)
    assert (source.kind, source.path_or_id, source.notices) == ("hub", name, ())


@pytest.mark.parametrize(
    "name", ["", "bundeld", "gpt2", "./absent", "/absent/model", "~/absent", "a/b/c", "a b/c", "..\\m"]
)
def test_a_name_that_is_nothing_known_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_below_an_existing_folder_is_no_hub_id() -> None:
    Path("runs").mkdir()
    with pytest.raises(UserError, match="no model folder 'runs/final'"):
        resolve("runs/final")


def test_a_folder_wins_over_a_hub_id_of_the_same_name() -> None:
    tiny_folder(Path("org/model"))
    assert resolve("org/model").kind == "folder"


# --- folders


def test_a_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    model = load_model(resolve(str(folder)), dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and model.config._attn_implementation == "eager"
    assert load_config(resolve(str(folder))).hidden_size == 32
    # Three special tokens, then the printable characters from "!" on.
    assert load_tokenizer(resolve(str(folder)))("aa")["input_ids"] == [3 + ord("a") - ord("!")] * 2


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def leave_pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20_000)


def empty_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "config.json"),
        (break_config, "config.json"),
        (remove_weights, "no model.safetensors"),
        (leave_pickles_only, "pickles"),
        (cut_weights_short, "damaged or cut short"),
        (empty_weights, "damaged or cut short"),
        (lose_a_shard, "lacks model-00002-of-00002.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused_before_anything_is_loaded(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        resolve(str(folder))
    assert "\n" not in str(caught.value)


def change_tensors(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_noise(folder: Path) -> None:
    change_tensors(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors \(model.norm.weight"):
        load_model(resolve(str(folder)), **CPU)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(UserError, match="do not fit its configuration"):
        load_model(resolve(str(folder)), **CPU)


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="code of its own"):
        load_model(resolve(str(folder)), **CPU)
    assert not (folder / "ran").exists()


def test_an_unknown_kind_of_model_and_a_missing_tokenizer_are_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(resolve(str(folder)))
    (folder / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(UserError, match="transformers does not know"):
        load_model(resolve(str(folder)), **CPU)
