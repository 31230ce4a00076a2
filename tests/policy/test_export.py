import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging as transformers_logging

from equipoise.errors import NonFiniteError, UserError
from equipoise.policy import export as exporting
from equipoise.policy.config import LLAMA_8B
from equipoise.policy.eightbit import ROTATED, to_eight_bits
from equipoise.policy.export import ModelCard, export, merged_weights, rehearse
from equipoise.policy.source import Source, load_tokenizer, resolve
from equipoise.policy.weights import load_model
from equipoise.protocol.task import PROTOCOL
from tests.families import family_folder
from tests.tiny import TOKENS, tiny_folder, tiny_model, tiny_tokenizer

CARD = ModelCard(method="PPO, 3 steps", prompt="describe")
IDS = torch.arange(3, 40)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_adapters(model: nn.Module, scale: float = 0.1, **options: object) -> PeftModel:
    """LoRA on every linear layer, moved away from its start at zero."""
    config = LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=scale)
    return peft_model.eval()


def reload(folder: Path) -> nn.Module:
    """As anyone would load it; a complaint by transformers is a failure."""
    lines: list[str] = []
    transformers_logging.get_logger("transformers").addHandler(handler := ListHandler(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    transformers_logging.get_logger("transformers").removeHandler(handler)
    assert lines == []
    return model


class ListHandler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(level="WARNING")
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("tie", [True, False])
def test_the_exported_adapters_give_the_adapter_models_logits(tmp_path: Path, tie: bool) -> None:
    model = with_adapters(tiny_model(tie))
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert (expected - base).abs().max() > 0.1  # the adapters matter
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    plain = reload(tmp_path)
    assert type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    tied = plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert tied == tie
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tie)  # noqa: SIM118


def test_rank_stabilised_scaling_and_transposed_layers_merge_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(TOKENS), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model = with_adapters(GPT2LMHeadModel(config).eval(), use_rslora=True, fan_in_fan_out=True)
    expected = logits(model)
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    torch.testing.assert_close(logits(reload(tmp_path)), expected, rtol=0, atol=2e-5)


def test_a_fully_trained_model_is_exported_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_a_model_whose_file_names_differ_from_its_modules_survives_the_trip(tmp_path: Path) -> None:
    """In memory a mixture's experts are one tensor, in the published files many."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert any("experts.2." in name for name in file.keys())  # noqa: SIM118
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_the_live_model_is_untouched_and_trains_on(tmp_path: Path) -> None:
    model = with_adapters(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = (str(model.config), str(model.get_base_model().generation_config), logits(model))
    export(model, tiny_tokenizer(), tmp_path, card=CARD, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (str(model.config), str(model.get_base_model().generation_config)) == state[:2]
    assert torch.equal(logits(model), state[2])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), state[2])


def test_merging_rounds_once_even_from_bfloat16_weights_and_adapters() -> None:
    model = with_adapters(tiny_model()).to(torch.bfloat16)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = (layer.base_layer.weight.double() + 7 / 4 * b @ a).detach()  # lora_alpha / r
    merged = merged_weights(model, torch.float32, None)["model.layers.1.mlp.down_proj.weight"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-7)
    rounded = merged_weights(model, torch.bfloat16, None)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_a_quantised_base_is_merged_from_the_original_weights(tmp_path: Path) -> None:
    """The 8-bit layers themselves need a GPU; what export sees of them is rounded values and the flag."""
    source = resolve(str(tiny_folder(tmp_path / "original")))
    exact = with_adapters(tiny_model())
    rounded = with_adapters(tiny_model())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if "base_layer" in name:
                parameter.copy_((parameter * 16).round() / 16)
    rounded.get_base_model().is_quantized = True
    assert (logits(rounded) - logits(exact)).abs().max() > 0.1
    export(rounded, tiny_tokenizer(), tmp_path / "out", card=CARD, source=source)
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(exact), rtol=0, atol=2e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_has_the_dtype_asked_for_and_says_so(tmp_path: Path, dtype: torch.dtype) -> None:
    export(with_adapters(tiny_model()), tiny_tokenizer(), tmp_path, card=CARD, dtype=dtype)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    assert reload(tmp_path).dtype == dtype


def test_a_small_model_is_float32_by_default_whatever_it_was_trained_in(tmp_path: Path) -> None:
    export(with_adapters(tiny_model()).to(torch.bfloat16), tiny_tokenizer(), tmp_path, card=CARD)
    assert reload(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("into", [torch.int8, ROTATED])
@pytest.mark.parametrize("lora", [False, True])
def test_an_export_of_weights_in_8_bits_is_rehearsed_and_made(tmp_path: Path, into: torch.dtype, lora: bool) -> None:
    source = resolve(str(tiny_folder(tmp_path / "original")))
    exact = tiny_model() if not lora else with_adapters(tiny_model())
    model = tiny_model() if not lora else with_adapters(tiny_model())
    to_eight_bits(model, into)
    rehearse(model, tiny_tokenizer(), tmp_path / "out", card=CARD, source=source)
    assert not (tmp_path / "out").exists()
    export(model, tiny_tokenizer(), tmp_path / "out", card=CARD, source=source)
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(exact), rtol=0, atol=2e-5)


def test_gpt2s_weights_in_8_bits_are_merged_from_the_original_ones(tmp_path: Path) -> None:
    source = resolve(str(family_folder("gpt2", tmp_path / "original")))
    made = []
    for rounded in (False, True):
        torch.manual_seed(0)
        model = with_adapters(load_model(source, dtype=torch.float32, device="cpu"))
        if rounded:
            to_eight_bits(model)
        made.append(model)
    exact, model = made
    assert model.get_submodule("base_model.model.transformer.h.0.attn.c_attn.base_layer").q.dtype == torch.int8
    rehearse(model, load_tokenizer(source), tmp_path / "out", card=CARD, source=source)
    expected = merged_weights(exact, torch.float32, None)
    found = merged_weights(model, torch.float32, source)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_in_8_bits_count_where_the_dtype_of_the_file_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = tiny_model().bfloat16()
    whole = sum(p.numel() for p in model.parameters())
    to_eight_bits(model)
    assert sum(p.numel() for p in model.parameters()) < whole - 1000
    for small, expected in ((whole + 1, torch.float32), (whole - 1000, torch.bfloat16)):
        monkeypatch.setattr(exporting, "SMALL", small)
        export(model, tiny_tokenizer(), tmp_path / str(small), card=CARD, source=resolve(str(tmp_path / "base")))
        assert reload(tmp_path / str(small)).dtype == expected


# --- the folder


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


# --- the card


def card_of(folder: Path, card: ModelCard, source: Source | None) -> tuple[dict, str]:
    export(tiny_model(), tiny_tokenizer(), folder, card=card, source=source)
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


def test_the_card_names_base_licence_method_prompt_and_occupations(tmp_path: Path) -> None:
    card = ModelCard(method="PPO with *stars*", prompt="study", occupations=("nurse", "pilot"))
    matter, text = card_of(tmp_path, card, resolve("bundled"))
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and matter["license"] == "apache-2.0"
    assert matter["library_name"] == "transformers" and matter["pipeline_tag"] == "text-generation"
    assert isinstance(matter["tags"], list)
    assert "PPO with *stars*" in text and "`study`" in text and "nurse, pilot" in text
    assert "Not in that source: bold, accommodating, caring, friendly, helpful." in text


def test_a_llama_model_carries_its_licence_and_attribution(tmp_path: Path) -> None:
    matter, text = card_of(tmp_path, CARD, resolve("Llama-3.1-7B-Instruct"))
    assert (matter["base_model"], matter["license"]) == (LLAMA_8B, "llama3.1")
    assert "Built with Llama" in text


def test_a_local_folder_is_named_without_its_path_however_odd_its_name(tmp_path: Path) -> None:
    odd = tiny_folder(tmp_path / 'my: "model" #1')
    matter, text = card_of(tmp_path / "out", CARD, resolve(str(odd)))
    assert matter["base_model"] == 'my: "model" #1' and matter["license"] == "other"
    assert str(tmp_path) not in text


@pytest.mark.parametrize("prompt", ["study", "describe", "raw", 'own=Say "who" the {occupation} is.\\'])
def test_the_cards_example_runs_and_prompts_as_the_training_did(
    tmp_path: Path, prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = card_of(tmp_path, ModelCard(method="PPO", prompt=prompt), None)
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    lines = capsys.readouterr().out.strip()
    assert lines.count("The architect was") == 5
    message = PROTOCOL.prompt(prompt).user_message("architect")
    expected = "The architect was"
    if message is not None:
        system, user = "<|im_start|>system\n<|im_end|>\n", f"<|im_start|>user\n{message}<|im_end|>\n"
        expected = f"{system}{user}<|im_start|>assistant\nThe architect was"
    assert names["text"] == expected


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
