"""A decoder layer as few large kernels: the fast path on a GPU, for every architecture that `layer_spec` describes.

Modules, parameters and their names stay transformers' and peft's; only the `forward` of each decoder layer instance
(and of the last norm and a trained output head) is replaced, and only for packed tries and for decoding over the
static cache: any other call runs the original. Projections that read the same input (query, key and value; gate and up)
are one matrix product. Gradients of weights are added to `.grad` within the backward pass, in the products themselves.
`policy.fused` is the milder version for other architectures, `PolicyConfig.fused=False` the plain twin of both.

Shapes: M tokens, H hidden, K inputs and N outputs of a projection.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from equipoise.policy.aside import aside, beside
from equipoise.policy.attention import take_trie
from equipoise.policy.eightbit import FP8, EightBitLinear, kernels
from equipoise.policy.ends import fuse_ends
from equipoise.policy.fused import is_llama_norm, norm_forward
from equipoise.policy.gates import Gates
from equipoise.policy.joined import accumulate, gradient, joined, joined_gradients, put_together
from equipoise.policy.kernels import attention, decoding, elementwise, fp8, heads, int8
from equipoise.policy.layer_spec import LayerSpec, base, describe, epsilon, parts, width
from equipoise.policy.norms import FusedNorm, add_sums


def not_covered(model: nn.Module) -> str | None:
    """What of `model` the fused layer has no way to compute, in words; None if there is nothing."""
    described = describe(model)
    if isinstance(described, str):
        return described
    for layer, _ in described:
        own = parts(layer)
        for modules in (own.qkv, (own.o,), own.gate_up, (own.down,)):
            if elementwise.tile(tuple(map(width, modules))) < 16:
                return f"projections to {', '.join(str(width(m)) for m in modules)}"
    return None


def fuse_layers(model: nn.Module) -> Gates:
    """Replace the forward of every decoder layer, of the last norm, and of a trained embedding and head. Ask
    `not_covered` first. Where weights may still be moved when the next pass begins."""
    described = describe(model)
    assert not isinstance(described, str), described
    before: _Layer | None = None
    gates = Gates(next(model.parameters()).device, len(described))
    for number, (layer, spec) in enumerate(described):
        made = _Layer(layer, spec)
        made.follow(before)
        made.gate = partial(gates.wait, number)
        gates.add(number, layer.parameters())
        layer.forward, before = made.forward, made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the matrices that were put together have left holes of another size
    for module in model.modules():
        norm: Any = getattr(module, "norm", None)
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and is_llama_norm(norm):
            norm.forward = norm_forward(norm)
    fuse_ends(model, gates)
    return gates


class _Projection:
    """Linear layers that read the same x, side by side: y = x·Wᵀ (+ scale · (x·Aᵀ)·Bᵀ with adapters)."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.lora = isinstance(modules[0], LoraLayer)
        bases: list[Any] = list(map(base, modules))
        self.sizes = tuple(map(width, modules))
        self.transposed = isinstance(bases[0], Conv1D)
        self.biases = [b.bias for b in bases if b.bias is not None]
        assert len(self.biases) in (0, len(bases))
        self.rounded = isinstance(bases[0], EightBitLinear)
        self.weights = [] if self.rounded else [b.weight for b in bases]
        if self.rounded:
            bits = torch.cat([b.q.view(torch.uint8) for b in bases])
            self.q, self.scales = bits.view(bases[0].q.dtype), torch.cat([b.scale for b in bases])
            self.fp8 = self.q.dtype == FP8
            for own, q, scale in zip(bases, self.q.split(self.sizes), self.scales.split(self.sizes), strict=True):
                own.q, own.scale = q, scale
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
        put_together(self.biases)
        put_together(self.a)
        put_together(self.b)

    @property
    def adapted(self) -> bool:
        layer: Any = self.modules[0]
        return self.lora and not layer.disable_adapters

    def _matrix(self) -> Tensor:
        """W (N, K)."""
        return joined(self.weights).T if self.transposed else joined(self.weights)

    def _low(self, x_MK: Tensor) -> Tensor:
        """x·Aᵀ."""
        return x_MK @ joined(self.a).T

    def _base(self, x_MK: Tensor) -> tuple[Tensor, fp8.By | None]:
        """x·Wᵀ (+ bias), and what it is to be multiplied by."""
        if self.rounded and self.fp8 and not self.biases:
            return fp8.product_unfinished(x_MK, self.q, self.scales)
        if self.rounded:
            out = kernels(self.q).product(x_MK, self.q, self.scales)
            return (out.add_(joined(self.biases)) if self.biases else out), None
        if self.biases:
            return torch.addmm(joined(self.biases), x_MK, self._matrix().T), None
        return x_MK @ self._matrix().T, None

    def forward(self, x_MK: Tensor, more_MN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(y + more, x·Aᵀ or None)."""
        if self.adapted:
            low, (out, by) = beside(x_MK.device, lambda: self._low(x_MK), lambda: self._base(x_MK))
            return elementwise.add_adapters(out, low, joined(self.b), self.sizes, self.scale, more_MN, by), low
        out, by = self._base(x_MK)
        if by is not None:
            return fp8.finish(out, by, more_MN), None
        return (out if more_MN is None else out.add_(more_MN)), None

    def add_to(self, sum_MN: Tensor, x_MK: Tensor) -> Tensor:
        """sum + y, in place where no adapters are."""
        if self.adapted or self.rounded or self.biases:
            return self.forward(x_MK, sum_MN)[0]
        return sum_MN.addmm_(x_MK, self._matrix().T)

    def _back_base(self, grad_MN: Tensor) -> tuple[Tensor, fp8.By | None]:
        """grad·W, and what its rows are to be multiplied by."""
        if self.rounded and self.fp8:
            return fp8.back_unfinished(grad_MN, self.q, self.scales, self.following)
        if self.rounded:
            return int8.product_back(grad_MN, self.q, self.scales), None
        return grad_MN @ self._matrix(), None

    def _back_low(self, grad_MN: Tensor, low: Tensor) -> Tensor:
        """scale · grad·B, of each projection its own."""
        grad_low = torch.empty_like(low)
        columns = zip(grad_low.split(len(self.a[0]), 1), grad_MN.split(self.sizes, 1), self.b, strict=True)
        for target, part, b in columns:
            torch.addmm(target, part, b.detach(), beta=0, alpha=self.scale, out=target)
        return grad_low

    def backward(self, grad_MN: Tensor, x_MK: Tensor, low: Tensor | None) -> Tensor:
        """Gradient of x; those of the trained weights are added to their `.grad`, aside."""
        through = low is not None and self.a[0].requires_grad
        grad_low: Tensor | None = None
        if low is not None and through:
            like = low
            rest, (grad_x, by) = beside(
                grad_MN.device, lambda: self._back_low(grad_MN, like), lambda: self._back_base(grad_MN)
            )
            if by is not None:
                fp8.add_low(grad_x, by, rest, joined(self.a))
            else:
                grad_x.addmm_(rest, joined(self.a))
            grad_low = rest
        else:
            grad_x, by = self._back_base(grad_MN)
            if by is not None:
                fp8.finish(grad_x, by)
        if grad_low is not None or any(p.requires_grad for p in (*self.weights, *self.biases)):
            aside.do(grad_x.device, lambda: self._add_gradients(grad_MN, x_MK, low, grad_low))
        return grad_x

    def _add_gradients(self, grad_MN: Tensor, x_MK: Tensor, low: Tensor | None, grad_low: Tensor | None) -> None:
        """Those of weights and biases, or of the adapters, added to their `.grad`."""
        if self.weights and self.weights[0].requires_grad:
            if self.transposed:
                accumulate(self.weights, x_MK, grad_MN)
            else:
                accumulate(self.weights, grad_MN, x_MK)
        if self.biases and self.biases[0].requires_grad:
            for bias, part in zip(self.biases, grad_MN.split(self.sizes, 1), strict=True):
                gradient(bias).add_(part.sum(0))
        if low is None or grad_low is None:
            return
        accumulate(self.a, grad_low, x_MK)
        grads = joined_gradients(self.b)
        if grads is not None:
            elementwise.add_adapter_gradient(grads, grad_MN, low, self.sizes, self.scale)
            return
        parts, lows = grad_MN.split(self.sizes, 1), low.split(len(self.a[0]), 1)
        for b, part, own in zip(self.b, parts, lows, strict=True):
            gradient(b).addmm_(part.T, own, alpha=self.scale)


class _Trie(NamedTuple):
    """What attention over a packed trie needs: see `kernels.attention`."""

    cos: Tensor
    sin: Tensor
    paths_RL: Tensor
    places_M: Tensor


class _Kept(NamedTuple):
    """What the backward pass of a layer needs of its forward pass. None where the layer has no such step."""

    x: Tensor
    rstd1: Tensor | None
    y1: Tensor
    low1: Tensor | None
    qkv: Tensor | None
    """As it was before `heads.prepare`."""
    ready: Tensor
    attended: Tensor
    lse: Tensor
    low2: Tensor | None
    delta1: Tensor | None
    rstd_delta1: Tensor | None
    h: Tensor
    rstd2: Tensor | None
    y2: Tensor
    low3: Tensor | None
    gate_up: Tensor
    f: Tensor
    low4: Tensor | None
    delta2: Tensor | None
    rstd_delta2: Tensor | None


class _Layer:
    def __init__(self, layer: Any, spec: LayerSpec) -> None:
        self.plain, self.spec = layer.forward, spec
        own = parts(layer)
        self.attention = own.attention
        self.qkv, self.o = _Projection(*own.qkv), _Projection(own.o)
        self.gate_up, self.down = _Projection(*own.gate_up), _Projection(own.down)
        self.norms = [None if norm is None else FusedNorm(norm, spec.offset) for norm in own.norms]
        self.head_norms: heads.HeadNorms | None = None
        if spec.head_norms:
            weights, eps = (own.query_norm.weight, own.key_norm.weight), epsilon(own.query_norm)
            assert eps is not None
            self.head_norms = heads.HeadNorms(*weights, eps, spec.offset)
        self.activation = (elementwise.ACTIVATIONS[spec.activation], spec.gated)
        self.lowest = True
        self.gate: Callable[[], None] = lambda: None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the decoder layer's own; (1, M, H) for a trie, (B, 1, H) for one token a row."""
        self.gate()
        taken = take_trie(kwargs)
        if taken.paths_RL is None and taken.slot is None:
            plain: Tensor = self.plain(hidden_states, *args, **kwargs)
            return plain
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        angles = kwargs.get("position_embeddings") if self.spec.rotary else None
        # Without any the kernels are given something that they do not read.
        cos, sin = (t.reshape(len(x), -1).contiguous() for t in angles) if angles is not None else (x, x)
        rotated = cos.shape[1] if angles is not None else 0
        form = self._form(rotated)
        if taken.slot is not None:
            hidden_BL = taken.beyond_BL if self.spec.window and taken.beyond_BL is not None else taken.hidden_BL
            assert hidden_BL is not None
            return self._decode(x, cos, sin, taken.slot, hidden_BL, form).view_as(hidden_states)
        assert taken.paths_RL is not None and taken.places_M is not None
        trie = _Trie(cos, sin, taken.paths_RL, taken.places_M)
        # An anchor that requires a gradient makes the output require one, also where x does not (frozen embeddings).
        anchors = [p for p in (self.qkv.a or self.qkv.weights)[:1] if p.requires_grad and self._trains()]
        if torch.is_grad_enabled() and (anchors or x.requires_grad):
            return _LayerFunction.apply(x, self, trie, form, *anchors).view_as(hidden_states)
        out, kept = self._forward(x, trie, form)
        if taken.fill_BP is not None:
            decoding.fill(kept.ready, cos, sin, taken.fill_BP, self.attention.kv_cache, form)
        return out.view_as(hidden_states)

    def follow(self, before: "_Layer | None") -> None:
        """Tell each rounded projection whose turn it is after its own on the way back; `before` is the layer below."""
        self.lowest = before is None
        order = [self.down, self.gate_up, self.o, self.qkv, *([before.down] if before is not None else [])]
        for own, after in pairwise(order):
            own.following = after.q if after.rounded else None

    def _trains(self) -> bool:
        return self.qkv.adapted or not self.qkv.lora

    def _form(self, rotated: int) -> attention.Form:
        """The kernels rotate whole heads themselves; a part of each, or after a norm, `heads.prepare` does."""
        spec = self.spec
        inside = rotated == spec.size and self.head_norms is None
        return attention.Form(spec.heads, spec.key_heads, spec.size, spec.scale, spec.window, spec.cap, inside)

    def _ready(self, qkv: Tensor, cos: Tensor, sin: Tensor, form: attention.Form) -> Tensor:
        if form.rotate or not (self.spec.rotary or self.head_norms):
            return qkv
        return heads.prepare(qkv, cos, sin, form, cos.shape[1] if self.spec.rotary else 0, self.head_norms)

    def _add(
        self, x: Tensor, delta: Tensor, after: FusedNorm | None, then: FusedNorm | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(h, 1 / rms(delta), y, 1 / rms(h)): h = x + after(delta), y = then(h)."""
        if after is not None:
            return elementwise.add_normed(x, delta, after.by, None if then is None else then.by)
        assert then is not None
        h, y, rstd = elementwise.norm(x, then.by, delta)
        return h, None, y, rstd

    def _forward(self, x: Tensor, trie: _Trie, form: attention.Form) -> tuple[Tensor, _Kept]:
        before1, after1, before2, after2 = self.norms
        y1, rstd1 = elementwise.norm(x, before1.by)[1:] if before1 is not None else (x, None)
        qkv, low1 = self.qkv.forward(y1)
        ready = self._ready(qkv, trie.cos, trie.sin, form)
        attended, lse = attention.attend(ready, *trie, form)
        delta1, low2 = self.o.forward(attended)
        h, rstd_delta1, y2, rstd2 = self._add(x, delta1, after1, before2)
        gate_up, low3 = self.gate_up.forward(y2)
        f = elementwise.activate(gate_up, *self.activation)
        delta2, rstd_delta2 = None, None
        if after2 is None:
            out, low4 = self.down.forward(f, h)
        else:
            delta2, low4 = self.down.forward(f)
            out, rstd_delta2, _, _ = self._add(h, delta2, after2, None)
        return out, _Kept(
            x, rstd1, y1, low1, None if ready is qkv else qkv, ready, attended, lse, low2,
            None if after1 is None else delta1, rstd_delta1, h, rstd2, y2, low3, gate_up, f, low4, delta2, rstd_delta2,
        )  # fmt: skip

    def _decode(
        self, x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, hidden_BL: Tensor, form: attention.Form
    ) -> Tensor:
        before1, after1, before2, after2 = self.norms
        y1 = elementwise.norm(x, before1.by)[1] if before1 is not None else x
        ready = self._ready(self.qkv.forward(y1)[0], cos, sin, form)
        attended = decoding.decode(ready, cos, sin, self.attention.kv_cache, hidden_BL, slot, form)
        h, _, y2, _ = self._add(x, self.o.forward(attended)[0], after1, before2)
        f = elementwise.activate(self.gate_up.forward(y2)[0], *self.activation)
        if after2 is None:
            return self.down.add_to(h, f)
        return self._add(h, self.down.forward(f)[0], after2, None)[0]

    def backward(self, dout: Tensor, kept: _Kept, trie: _Trie, form: attention.Form) -> Tensor:
        before1, after1, before2, after2 = self.norms
        ddelta2 = dout
        if after2 is not None and kept.delta2 is not None:
            ddelta2 = after2.backward(dout, kept.delta2, kept.rstd_delta2, None)
        df = self.down.backward(ddelta2, kept.f, kept.low4)
        dgate_up = elementwise.activate_backward(kept.gate_up, df, *self.activation)
        dy2 = self.gate_up.backward(dgate_up, kept.y2, kept.low3)
        dh = dy2.add_(dout) if before2 is None else before2.backward(dy2, kept.h, kept.rstd2, dout)
        ddelta1 = dh
        if after1 is not None and kept.delta1 is not None:
            ddelta1 = after1.backward(dh, kept.delta1, kept.rstd_delta1, None)
        dattended = self.o.backward(ddelta1, kept.attended, kept.low2)
        dqkv = attention.attend_backward(dattended, kept.ready, kept.attended, kept.lse, *trie, form)
        if kept.qkv is not None:
            dqkv = self._ready_backward(dqkv, kept.qkv, trie, form)
        dy1 = self.qkv.backward(dqkv, kept.y1, kept.low1)
        return dy1.add_(dh) if before1 is None else before1.backward(dy1, kept.x, kept.rstd1, dh)

    def _ready_backward(self, dready: Tensor, qkv: Tensor, trie: _Trie, form: attention.Form) -> Tensor:
        norms = self.head_norms
        trained: tuple[Any, ...] = ()
        if norms is not None and norms.query.requires_grad:
            trained = (norms.query, norms.key)
        rotated = trie.cos.shape[1] if self.spec.rotary else 0
        dqkv, sums = heads.prepare_backward(dready, qkv, trie.cos, trie.sin, form, rotated, norms, bool(trained))
        add_sums(tuple(map(gradient, trained)), sums)
        return dqkv


class _LayerFunction(torch.autograd.Function):
    """The trie pass of one layer. Its anchors' gradients, like all others, are added to `.grad` in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Layer, trie: _Trie, form: attention.Form, *anchors: Tensor) -> Tensor:
        out, kept = layer._forward(x, trie, form)
        ctx.layer, ctx.trie, ctx.form, ctx.count = layer, trie, form, len(anchors)
        ctx.last = layer.lowest or not x.requires_grad
        ctx.present = [t is not None for t in kept]
        ctx.save_for_backward(*(t for t in kept if t is not None))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        kept = _Kept._make(next(saved) if present else None for present in ctx.present)
        dx = ctx.layer.backward(dout.contiguous(), kept, ctx.trie, ctx.form)
        aside.end_layer(dx.device, ctx.last)
        return dx, None, None, None, *[None] * ctx.count
