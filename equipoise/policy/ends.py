"""Embedding and output head of a trained model, whose weights' gradients are added in place: those of a vocabulary are
large, and autograd would write them out first. `policy.llama` has what lies between."""

from typing import Any

import torch
from torch import Tensor, nn

from equipoise.policy.aside import aside
from equipoise.policy.joined import gradient
from equipoise.policy.kernels.embedding import add_embedding_gradient


def fuse_ends(model: nn.Module) -> None:
    """Replace the forward of a trained head without a bias, and of a trained embedding that looks rows up and at the
    most scales them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight.requires_grad and head.bias is None:
        head.forward = lambda x: _Head.apply(x, head.weight)
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    scaled = type(words).__name__.endswith("ScaledWordEmbedding")
    if words.weight.requires_grad and (scaled or type(words) is nn.Embedding):
        words.forward = _lookup(words, scaled)


def _lookup(words: Any, scaled: bool) -> Any:
    def forward(tokens: Tensor) -> Tensor:
        rows: Tensor = _Embedding.apply(tokens, words.weight, words.padding_idx)
        return rows * words.embed_scale.to(words.weight.dtype) if scaled else rows

    return forward


class _Embedding(torch.autograd.Function):
    """The rows of the tokens; the weight's gradient is added in place."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: nn.Parameter, padding: int | None) -> Tensor:
        ctx.tokens, ctx.weight, ctx.padding = tokens, weight, padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        add_embedding_gradient(gradient(ctx.weight), ctx.tokens.reshape(-1), rows, ctx.padding)
        return None, None, None


class _Head(torch.autograd.Function):
    """x·Wᵀ, the weight's gradient added in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        total = gradient(ctx.weight)
        aside.do(x.device, lambda: total.addmm_(grad.flatten(0, -2).T, x.flatten(0, -2)))
        return grad @ ctx.weight, None
