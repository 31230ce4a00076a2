"""Llama's decoder layer as few large kernels: the fast path on a GPU for Llama-3.1, SmolLM2 and their like.

Modules, parameters and their names stay transformers' and peft's; only the `forward` of each decoder layer instance
(and of the last norm and a trained output head) is replaced, and only for packed tries and for decoding over the
static cache: any other call runs the original. Projections that read the same input (query, key and value; gate and up)
are one matrix product. Gradients of weights are added to `.grad` within the backward pass, in the products themselves.
`policy.fused` is the milder version for other architectures, `PolicyConfig.fused=False` the plain twin of both.

Shapes: M tokens, H hidden, K inputs and N outputs of a projection.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from equipoise.policy.attention import take_trie
from equipoise.policy.eightbit import FP8, EightBitLinear
from equipoise.policy.fused import norm_forward
from equipoise.policy.joined import accumulate, gradient, joined, joined_gradients, put_together
from equipoise.policy.kernels import attention, elementwise, fp8, int8


def supported(model: nn.Module) -> bool:
    """Whether every decoder layer of `model` is a plain Llama layer whose sizes the kernels can do."""
    layers = _layers(model)
    return bool(layers) and all(map(_plain, layers))


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward of every decoder layer, of the last norm and of a trained head. Call `supported` first."""
    before: _Layer | None = None
    for layer in _layers(model):
        made = _Layer(layer)
        made.follow(before)
        layer.forward, before = made.forward, made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the matrices that were put together have left holes of another size
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            norm: Any = module.norm
            norm.forward = norm_forward(norm)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight.requires_grad and head.bias is None:
        head.forward = lambda x: _Head.apply(x, head.weight)


class _Projection:
    """Linear layers that read the same x, side by side: y = x·Wᵀ (+ scale · (x·Aᵀ)·Bᵀ with adapters)."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.lora = isinstance(modules[0], LoraLayer)
        bases: list[Any] = [m.base_layer for m in modules] if self.lora else list(modules)
        self.sizes = tuple(base.out_features for base in bases)
        self.rounded = isinstance(bases[0], EightBitLinear)
        self.weights = [] if self.rounded else [base.weight for base in bases]
        if self.rounded:
            bits = torch.cat([base.q.view(torch.uint8) for base in bases])
            self.q, self.scales = bits.view(bases[0].q.dtype), torch.cat([base.scale for base in bases])
            self.fp8 = self.q.dtype == FP8
            for base, q, scale in zip(bases, self.q.split(self.sizes), self.scales.split(self.sizes), strict=True):
                base.q, base.scale = q, scale
        self.following: Tensor | None = None
        self.a: list[nn.Parameter] = []
        self.b: list[nn.Parameter] = []
        self.scale = 1.0
        if self.lora:
            loras: list[Any] = list(modules)
            (name,) = loras[0].active_adapters
            self.a, self.b = [m.lora_A[name].weight for m in loras], [m.lora_B[name].weight for m in loras]
            self.scale = loras[0].scaling[name]
        if self.weights:
            put_together(self.weights)
        put_together(self.a)
        put_together(self.b)

    @property
    def adapted(self) -> bool:
        layer: Any = self.modules[0]
        return self.lora and not layer.disable_adapters

    def forward(self, x_MK: Tensor, more_MN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(y + more, x·Aᵀ or None)."""
        by = None
        if self.rounded and self.fp8:
            out, by = fp8.product_unfinished(x_MK, self.q, self.scales)
        else:
            out = int8.product(x_MK, self.q, self.scales) if self.rounded else x_MK @ joined(self.weights).T
        if self.adapted:
            low = x_MK @ joined(self.a).T
            return elementwise.add_adapters(out, low, joined(self.b), self.sizes, self.scale, more_MN, by), low
        if by is not None:
            return fp8.finish(out, by, more_MN), None
        return (out if more_MN is None else out.add_(more_MN)), None

    def add_to(self, sum_MN: Tensor, x_MK: Tensor) -> Tensor:
        """sum + y, in place where no adapters are."""
        if self.adapted or self.rounded:
            return self.forward(x_MK, sum_MN)[0]
        return sum_MN.addmm_(x_MK, joined(self.weights).T)

    def backward(self, grad_MN: Tensor, x_MK: Tensor, low: Tensor | None) -> Tensor:
        """Gradient of x; those of the trained weights are added to their `.grad`."""
        by = None
        if self.rounded and self.fp8:
            grad_x, by = fp8.back_unfinished(grad_MN, self.q, self.scales, self.following)
        elif self.rounded:
            grad_x = int8.product_back(grad_MN, self.q, self.scales)
        else:
            grad_x = grad_MN @ joined(self.weights)
        if self.weights and self.weights[0].requires_grad:
            accumulate(self.weights, grad_MN, x_MK)
        through = low is not None and self.a[0].requires_grad
        if by is not None and not through:
            fp8.finish(grad_x, by)
        if low is not None and through:
            rank = len(self.a[0])
            grad_low = torch.empty_like(low)
            columns = zip(grad_low.split(rank, 1), grad_MN.split(self.sizes, 1), self.b, strict=True)
            for target, part, b in columns:
                torch.addmm(target, part, b.detach(), beta=0, alpha=self.scale, out=target)
            if by is not None:
                fp8.add_low(grad_x, by, grad_low, joined(self.a))
            else:
                grad_x.addmm_(grad_low, joined(self.a))
            accumulate(self.a, grad_low, x_MK)
            grads = joined_gradients(self.b)
            if grads is not None:
                elementwise.add_adapter_gradient(grads, grad_MN, low, self.sizes, self.scale)
            else:
                for b, part, own in zip(self.b, grad_MN.split(self.sizes, 1), low.split(rank, 1), strict=True):
                    gradient(b).addmm_(part.T, own, alpha=self.scale)
        return grad_x


class _Trie(NamedTuple):
    """What attention over a packed trie needs: see `kernels.attention`."""

    cos: Tensor
    sin: Tensor
    paths_RL: Tensor
    places_M: Tensor


class _Kept(NamedTuple):
    """What the backward pass of a layer needs of its forward pass."""

    x: Tensor
    rstd1: Tensor
    y1: Tensor
    low1: Tensor | None
    qkv: Tensor
    attended: Tensor
    lse: Tensor
    low2: Tensor | None
    h: Tensor
    rstd2: Tensor
    y2: Tensor
    low3: Tensor | None
    gate_up: Tensor
    f: Tensor
    low4: Tensor | None


class _Layer:
    def __init__(self, layer: Any) -> None:
        self.plain = layer.forward
        self.attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _Projection(self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        self.o = _Projection(self.attention.o_proj)
        self.gate_up = _Projection(mlp.gate_proj, mlp.up_proj)
        self.down = _Projection(mlp.down_proj)
        self.norm1, self.norm2 = layer.input_layernorm, layer.post_attention_layernorm
        self.size = self.attention.head_dim
        self.heads = self.qkv.sizes[0] // self.size
        self.key_heads = self.qkv.sizes[1] // self.size
        self.scale = self.attention.scaling

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the decoder layer's own; (1, M, H) for a trie, (B, 1, H) for one token a row."""
        paths_RL, places_M, fill_BP, slot, hidden_BL = take_trie(kwargs)
        if paths_RL is None and slot is None:
            plain: Tensor = self.plain(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
            return plain
        assert position_embeddings is not None
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        cos, sin = (t.reshape(-1, self.size).contiguous() for t in position_embeddings)
        if slot is not None:
            assert hidden_BL is not None
            return self._decode(x, cos, sin, slot, hidden_BL).view_as(hidden_states)
        assert paths_RL is not None and places_M is not None
        trie = _Trie(cos, sin, paths_RL, places_M)
        # An anchor that requires a gradient makes the output require one, also where x does not (frozen embeddings).
        anchors = [p for p in (self.qkv.a or self.qkv.weights)[:1] if p.requires_grad and self._trains()]
        if torch.is_grad_enabled() and (anchors or x.requires_grad):
            return _LayerFunction.apply(x, self, trie, *anchors).view_as(hidden_states)
        out, kept = self._forward(x, trie)
        if fill_BP is not None:
            attention.fill(kept.qkv, cos, sin, fill_BP, self.attention.kv_cache, self.heads, self.key_heads)
        return out.view_as(hidden_states)

    def follow(self, before: "_Layer | None") -> None:
        """Tell each rounded projection whose turn it is after its own on the way back; `before` is the layer below."""
        order = [self.down, self.gate_up, self.o, self.qkv, *([before.down] if before is not None else [])]
        for own, after in pairwise(order):
            own.following = after.q if after.rounded else None

    def _trains(self) -> bool:
        return self.qkv.adapted or not self.qkv.lora

    def _forward(self, x: Tensor, trie: _Trie) -> tuple[Tensor, _Kept]:
        _, y1, rstd1 = elementwise.norm(x, self.norm1.weight, self.norm1.variance_epsilon)
        qkv, low1 = self.qkv.forward(y1)
        attended, lse = attention.attend(qkv, *trie, self.heads, self.key_heads, self.scale)
        delta, low2 = self.o.forward(attended)
        h, y2, rstd2 = elementwise.norm(x, self.norm2.weight, self.norm2.variance_epsilon, delta)
        gate_up, low3 = self.gate_up.forward(y2)
        f = elementwise.silu_times(gate_up)
        out, low4 = self.down.forward(f, h)
        return out, _Kept(x, rstd1, y1, low1, qkv, attended, lse, low2, h, rstd2, y2, low3, gate_up, f, low4)

    def _decode(self, x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, hidden_BL: Tensor) -> Tensor:
        _, y1, _ = elementwise.norm(x, self.norm1.weight, self.norm1.variance_epsilon)
        qkv, _ = self.qkv.forward(y1)
        cache = self.attention.kv_cache
        attended = attention.decode(qkv, cos, sin, cache, hidden_BL, slot, self.heads, self.key_heads, self.scale)
        delta, _ = self.o.forward(attended)
        h, y2, _ = elementwise.norm(x, self.norm2.weight, self.norm2.variance_epsilon, delta)
        gate_up, _ = self.gate_up.forward(y2)
        return self.down.add_to(h, elementwise.silu_times(gate_up))

    def backward(self, dout: Tensor, kept: _Kept, trie: _Trie) -> Tensor:
        df = self.down.backward(dout, kept.f, kept.low4)
        dgate_up = elementwise.silu_times_backward(kept.gate_up, df)
        dy2 = self.gate_up.backward(dgate_up, kept.y2, kept.low3)
        dh = _norm_backward(self.norm2, dy2, kept.h, kept.rstd2, dout)
        dattended = self.o.backward(dh, kept.attended, kept.low2)
        dqkv = attention.attend_backward(
            dattended, kept.qkv, kept.attended, kept.lse, *trie, self.heads, self.key_heads, self.scale
        )
        dy1 = self.qkv.backward(dqkv, kept.y1, kept.low1)
        return _norm_backward(self.norm1, dy1, kept.x, kept.rstd1, dh)


class _LayerFunction(torch.autograd.Function):
    """The trie pass of one layer. Its anchors' gradients, like all others, are added to `.grad` in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Layer, trie: _Trie, *anchors: Tensor) -> Tensor:
        out, kept = layer._forward(x, trie)
        ctx.layer, ctx.trie, ctx.count = layer, trie, len(anchors)
        ctx.present = [t is not None for t in kept]
        ctx.save_for_backward(*(t for t in kept if t is not None))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        kept = _Kept._make(next(saved) if present else None for present in ctx.present)
        dx = ctx.layer.backward(dout.contiguous(), kept, ctx.trie)
        return dx, None, None, *[None] * ctx.count


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
        gradient(ctx.weight).addmm_(grad.flatten(0, -2).T, x.flatten(0, -2))
        return grad @ ctx.weight, None


def _norm_backward(norm: Any, dy: Tensor, h: Tensor, rstd: Tensor, more: Tensor) -> Tensor:
    dweight = gradient(norm.weight) if norm.weight.requires_grad else None
    return elementwise.norm_backward(dy, h, norm.weight, rstd, more, dweight)


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]


def _plain(layer: Any) -> bool:
    size = layer.self_attn.head_dim
    if size & (size - 1) or size < 32 or not isinstance(layer.mlp.act_fn, nn.SiLU | SiLUActivation):
        return False
    modules = [getattr(layer.self_attn, f"{n}_proj") for n in "qkvo"]
    modules += [getattr(layer.mlp, f"{n}_proj") for n in ("gate", "up", "down")]
    bases = [m.base_layer if isinstance(m, LoraLayer) else m for m in modules]
    if any(type(b) not in (nn.Linear, EightBitLinear) or b.bias is not None for b in bases):
        return False
    widths = [(b.out_features for b in bases[:3]), (b.out_features for b in bases[4:6])]
    return all(elementwise.tile(tuple(w)) >= 16 for w in widths)
