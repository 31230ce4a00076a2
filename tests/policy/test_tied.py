"""Adapters of a model whose head and embedding share their weights: each gets what is its own, in every dtype."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise.errors import UserError
from equipoise.policy.card import ModelCard
from equipoise.policy.config import PolicyConfig
from equipoise.policy.export import export
from equipoise.policy.load import load_policy
from equipoise.policy.source import resolve
from equipoise.policy.weights import load_model
from equipoise.protocol.task import PROTOCOL
from tests.tiny import tiny_folder

IDS = torch.arange(3, 103)[None]
KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-together": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
    "neither": {},
}
TIED = ("tokens", "neither")


@torch.no_grad()
def adapted(base: Path, folder: Path, **changes: Any) -> Tensor:
    """An adapter of random numbers in `folder`; the logits of the model that has it, as the peft library computes it
    unmerged."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**settings | changes))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    logits: Tensor = model.eval()(IDS).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_tied_model_computes_what_it_did_unmerged_and_so_does_its_export(
    tmp_path: Path, kind: str
) -> None:
    base = tiny_folder(tmp_path / "base", tie=True)
    logits = adapted(base, tmp_path / "adapter", **KINDS[kind])
    source = resolve(str(tmp_path / "adapter"))
    merged = load_model(source, dtype=torch.float32, device="cpu")
    assert (merged(IDS).logits - logits).abs().max() < 1e-4
    assert merged.config.tie_word_embeddings == (kind in TIED or kind == "saved-together")
    rounded = load_model(source, dtype=torch.bfloat16, device="cpu")
    assert rounded.config.tie_word_embeddings == merged.config.tie_word_embeddings
    exact = dict(merged.named_parameters())
    assert exact.keys() == {name for name, _ in rounded.named_parameters()}
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact[name].bfloat16()), name
    config = PolicyConfig(str(tmp_path / "adapter"), dtype="float32", device="cpu", lora_rank=2)
    policy = load_policy(config, PROTOCOL.prompt("raw"))
    export(policy.model, policy.tokenizer, tmp_path / "out", card=ModelCard("PPO", "raw"), source=source)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (loaded(IDS).logits - logits).abs().max() < 1e-4


def test_adapters_that_change_the_layers_or_hold_whole_numbers_are_refused(tmp_path: Path) -> None:
    base, folder = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    adapted(base, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: t.to(torch.int8) for name, t in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds numbers of the kind I8 .* expected floating ones"):
        load_model(resolve(str(folder)), dtype=torch.float32, device="cpu")
    save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"layer_replication": [[0, 2], [0, 2]]}))
    with pytest.raises(UserError, match="sets 'layer_replication', which is not read here"):
        resolve(str(folder))
