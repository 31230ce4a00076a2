"""What transformers 4 finds in an exported folder, and, in interpreters of their own, what both versions make of it."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ApertusConfig,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from equipoise.policy.export import export
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.versions import TESTED, VERSIONS
from equipoise.protocol.task import PROTOCOL
from tests.policy.exported import CARD
from tests.policy.test_template import TODAY
from tests.tiny import TOKENS, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS) + 1, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100_000.0}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 50_000.0, "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
}  # fmt: skip
ATTENTION = (1 + math.log(40) / math.log(32)) ** 0.5
EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=PLAIN),
    "llama3": LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA_3),
    "gpt_neox": GPTNeoXConfig(**SIZES, rope_parameters=PLAIN | {"partial_rotary_factor": 0.5}),
    "stablelm": StableLmConfig(**SIZES, num_key_value_heads=2, rope_parameters=PLAIN | {"partial_rotary_factor": 0.5}),
    "gemma3_text": Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7}, num_key_value_heads=2, head_dim=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        },
    ),
    "phi3": Phi3Config(
        **SIZES, num_key_value_heads=2, original_max_position_embeddings=64, rope_parameters=dict(LONG), pad_token_id=0
    ),
    "longrope": LlamaConfig(
        **SIZES, num_key_value_heads=2,
        rope_parameters=LONG | {"original_max_position_embeddings": 32, "factor": 40.0},
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, rope_parameters=PLAIN),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, rope_parameters=PLAIN),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, rope_parameters=PLAIN),
    "apertus": ApertusConfig(**SIZES, num_key_value_heads=2, rope_parameters=PLAIN),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, shared_intermediate_size=48, rope_parameters=PLAIN,
        layer_types=["linear_attention", "full_attention"], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16,
        mamba_chunk_size=16, position_embedding_type="rope",
    ),
    "gpt2": GPT2Config(vocab_size=len(TOKENS) + 1, n_embd=32, n_layer=2, n_head=4, n_positions=256),
}  # fmt: skip
TEXT = "The nurse was bold.<|im_end|> naïve\n  x<|eot_id|>"
IDS = torch.arange(3, 103)[None]


def exported(name: str, folder: Path) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TODAY
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    export(model, tokenizer, folder, card=CARD)
    return model, tokenizer


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("llama", {"rope_theta": 100_000.0}),
        (
            "llama3",
            {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA_3.items() if k != "rope_theta"}},
        ),
        ("gpt_neox", {"rotary_emb_base": 100_000.0, "rotary_pct": 0.5}),
        ("stablelm", {"rope_theta": 100_000.0, "partial_rotary_factor": 0.5}),
        (
            "gemma3_text",
            {
                "rope_theta": 500_000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 20_000.0,
            },
        ),
        (
            "phi3",
            {
                "rope_theta": 50_000.0,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope", **{k: LONG[k] for k in ("short_factor", "long_factor")}},
            },
        ),
        (
            "longrope",
            {
                "rope_theta": 50_000.0,
                "original_max_position_embeddings": 32,
                "rope_scaling": {k: v for k, v in LONG.items() if k != "rope_theta"}
                # 256 positions are 8 × 32, of which version 4 would make another factor than of the 40 given.
                | {"original_max_position_embeddings": 32, "factor": 40.0, "attention_factor": ATTENTION},
            },
        ),
        ("qwen3_moe", {"rope_theta": 100_000.0, "num_experts": 4, "num_local_experts": 4}),
        ("apertus", {"rope_theta": 100_000.0, "rope_scaling": None}),
        ("granitemoehybrid", {"rope_theta": 100_000.0, "num_local_experts": 4, "layer_types": ["mamba", "attention"]}),
        ("gpt2", {}),
    ],
)
def test_the_numbers_of_the_rotary_embedding_stand_where_version_4_looks(
    tmp_path: Path, name: str, older: dict[str, Any]
) -> None:
    model, tokenizer = exported(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_emb_base"}
    names |= {"layer_types"} & older.keys()
    names |= {"rotary_pct", "num_experts", "num_local_experts", "original_max_position_embeddings"}
    assert {key: value for key, value in config.items() if key in names} == older
    # Written out, it is what version 5 makes of the factor anyway.
    hidden = {"type", "attention_factor"}
    loaded = getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None) or {}
    assert {k: v for k, v in loaded.items() if k not in hidden} == (
        getattr(model.config, "rope_parameters", None) or {}
    )
    tokens = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokens["additional_special_tokens"] == ["<|eot_id|>"] and "extra_special_tokens" not in tokens
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_the_example_of_the_card_gives_the_prompt_of_training_on_any_day(tmp_path: Path) -> None:
    _, tokenizer = exported("llama", tmp_path)
    assert example(tmp_path) == prompt_ids(tokenizer, PROTOCOL.prompt("describe"), PROTOCOL.names[0], PROTOCOL)
    assert "it writes 2024-07-26, as in training" in (tmp_path / "README.md").read_text()


def example(folder: Path) -> list[int]:
    """The ids that the card's own lines make."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("for ids in")[0]
    names: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), names)
    return list(names["inputs"]["input_ids"][0].tolist())


def test_the_card_names_the_types_that_are_compared() -> None:
    # Apertus's activation differs a little between the versions, so that its logits are not the same.
    assert sorted({config.model_type for config in CONFIGS.values()} - {"apertus"}) == list(TESTED)


CHECK = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
out = {"version": transformers.__version__}
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    expected = torch.load(folder / "expected.pt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=expected["ids"]).logits
    code = (folder / "README.md").read_text().split("```python\\n")[1].split("for ids in")[0]
    names = {}
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), names)
    names["model"].generate(**names["inputs"], max_new_tokens=2)
    out[folder.name] = [
        float((logits - expected["logits"]).abs().max()), tokenizer(expected["text"])["input_ids"],
        names["inputs"]["input_ids"][0].tolist(),
    ]
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_an_export_gives_the_same_logits_and_tokens_in_both_versions(tmp_path: Path, version: str) -> None:
    variable = f"EQUIPOISE_TRANSFORMERS_{version.partition('.')[0]}"
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter with transformers {version}: make test-slow makes one")
    for name in CONFIGS:
        model, tokenizer = exported(name, tmp_path / name)
        with torch.no_grad():
            expected = {"ids": IDS, "logits": model(input_ids=IDS).logits, "text": TEXT}
        torch.save(expected, tmp_path / name / "expected.pt")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", CHECK, str(tmp_path)], capture_output=True, text=True, env=clean | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("version").startswith(f"{version}.")
    assert sorted(found) == sorted(CONFIGS)
    prompt = prompt_ids(tokenizer, PROTOCOL.prompt("describe"), PROTOCOL.names[0], PROTOCOL)
    for name, (difference, tokens, made) in found.items():
        assert difference < (1e-2 if name == "apertus" else 1e-3), name
        assert tokens == tokenizer(TEXT)["input_ids"], name
        assert made == prompt, name
