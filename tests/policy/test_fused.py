"""The slow path's fused LoRA layers and norms against peft's and transformers' own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from equipoise.policy import fused
from tests.families import family_model


def adapted(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(12, 20, bias=bias))
    made = get_peft_model(holder, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return made


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_lora_layer_and_its_gradients_are_pefts(bias: bool, added: bool) -> None:
    """`added`: where there are gradients already, it adds to them by itself."""
    plain = adapted(bias)
    fast = copy.deepcopy(plain)
    fused.fuse(fast, known=False)
    found = []
    for model in (plain, fast):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if added:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 0.5)
        out = model(x)
        own = gradients(model, out)
        assert len(own) == 2 and x.grad is not None
        found.append([out, x.grad, *(own[name] for name in sorted(own))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert fast.base_model.model[0].forward.__qualname__.startswith("_lora_forward")
    with plain.disable_adapter(), fast.disable_adapter():
        x = torch.randn(3, 12)
        assert torch.equal(plain(x), fast(x))


def test_norms_in_one_kernel_are_the_models_own() -> None:
    plain = family_model("llama3.2")
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    fast = copy.deepcopy(plain)
    fused.fuse(fast, known=False)
    norms = [fast.get_submodule(name) for name, m in plain.named_modules() if fused.is_llama_norm(m)]
    assert len(norms) > 2 and all(m.forward.__qualname__.startswith("norm_forward") for m in norms)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
