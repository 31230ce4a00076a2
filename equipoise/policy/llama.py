"""A decoder layer as few large kernels: the fast path on a GPU, for every architecture that `layer_spec` describes.

Modules, parameters and their names stay transformers' and peft's; only the `forward` of each decoder layer instance
(and of the last norm and a trained output head) is replaced, and only for packed tries and for decoding over the
static cache: any other call runs the original. Projections that read the same input (query, key and value; gate and up)
are one matrix product. Gradients of weights are added to `.grad` within the backward pass, in the products themselves.
`policy.fused` is the milder version for other architectures, `PolicyConfig.fused=False` the plain twin of both.

Shapes: M tokens, H hidden, K inputs and N outputs of a projection.
"""

import weakref
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.policy.aside import aside
from equipoise.policy.attention import take_trie
from equipoise.policy.ends import fuse_ends
from equipoise.policy.fused import is_llama_norm, norm_forward
from equipoise.policy.graphs import hold
from equipoise.policy.joined import gradient
from equipoise.policy.kernels import activations, attention, decoding, elementwise, heads
from equipoise.policy.layer_spec import LayerSpec, describe, epsilon, parts, width
from equipoise.policy.norms import FusedNorm, add_sums
from equipoise.policy.projection import Projection
from equipoise.policy.spare import Spare


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


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward of every decoder layer, of the last norm, and of a trained embedding and head. Ask
    `not_covered` first."""
    described = describe(model)
    assert not isinstance(described, str), described
    before: _Layer | None = None
    for layer, spec in described:
        made = _Layer(layer, spec)
        made.follow(before)
        layer.forward, before = made.forward, made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the matrices that were put together have left holes of another size
    for module in model.modules():
        norm: Any = getattr(module, "norm", None)
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and is_llama_norm(norm):
            norm.forward = norm_forward(norm)
    fuse_ends(model)


class _Trie(NamedTuple):
    """What attention over a packed trie needs: see `kernels.attention`."""

    cos: Tensor
    sin: Tensor
    paths_RL: Tensor
    places_M: Tensor


class _Kept(NamedTuple):
    """What the backward pass of a layer needs of its forward pass. None where the layer has no such step, or where it
    is computed again."""

    x: Tensor
    rstd1: Tensor | None
    y1: Tensor | None
    low1: Tensor | None
    qkv: Tensor | None
    """As it was before `heads.prepare`, where that was needed."""
    ready: Tensor
    attended: Tensor
    lse: Tensor
    low2: Tensor | None
    delta1: Tensor | None
    rstd_delta1: Tensor | None
    h: Tensor
    rstd2: Tensor | None
    y2: Tensor | None
    low3: Tensor | None
    gate_up: Tensor
    f: Tensor | None
    low4: Tensor | None
    delta2: Tensor | None
    rstd_delta2: Tensor | None


def _either(kept: Tensor | None, again: Tensor | None) -> Tensor:
    found = again if kept is None else kept
    assert found is not None
    return found


def _normed(kept: Tensor | None, x: Tensor, norm: FusedNorm | None) -> Tensor:
    """x normalised: as it was kept, or computed again."""
    if kept is not None:
        return kept
    assert norm is not None
    return elementwise.norm(x, norm.by).y


class _Layer:
    def __init__(self, layer: Any, spec: LayerSpec) -> None:
        self.plain, self.spec = layer.forward, spec
        own = parts(layer)
        self.attention = own.attention
        self.qkv, self.o = Projection(*own.qkv), Projection(own.o)
        self.gate_up, self.down = Projection(*own.gate_up), Projection(own.down)
        self.norms = [None if norm is None else FusedNorm(norm, spec.offset) for norm in own.norms]
        self.head_norms: attention.HeadNorms | None = None
        if spec.head_norms:
            weights, eps = (own.query_norm.weight, own.key_norm.weight), epsilon(own.query_norm)
            assert eps is not None
            self.head_norms = attention.HeadNorms(*weights, eps, spec.offset)
        self.activation = (activations.ACTIVATIONS[spec.activation], spec.gated)
        self.lowest = True
        self.lean = self.qkv.kind is not None  # who rounds weights is short of memory
        self._borrower: weakref.ref[Any] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the decoder layer's own; (1, M, H) for a trie, (B, 1, H) for one token a row."""
        taken = take_trie(kwargs)
        if taken.paths_RL is None and taken.slot is None:
            plain: Tensor = self.plain(hidden_states, *args, **kwargs)
            return plain
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        angles = kwargs.get("position_embeddings") if self.spec.rotary else None
        # Without any the kernels are given something that they do not read.
        cos, sin = (t.reshape(len(x), -1).contiguous() for t in angles) if angles is not None else (x, x)
        rotated = cos.shape[1] if angles is not None else 0
        form = self._form(rotated, taken.slot is not None)
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
        out, kept = self._forward(x, trie, form, Spare(None))
        if taken.fill_BP is not None:
            decoding.fill(kept.ready, cos, sin, taken.fill_BP, self.attention.kv_cache, form)
        return out.view_as(hidden_states)

    def follow(self, before: "_Layer | None") -> None:
        """Tell each rounded projection whose turn it is after its own on the way back; `before` is the layer below."""
        self.lowest = before is None
        order = [self.down, self.gate_up, self.o, self.qkv, *([before.down] if before is not None else [])]
        for own, after in pairwise(order):
            own.following = after.q if after.kind is not None else None

    def spare(self, borrower: object) -> Spare:
        """What a pass that trains may put what it keeps into: the layer's cache of decoding, every place of which is
        written anew before it is read. Nothing while an earlier borrower is still there, whose numbers they are."""
        if not self.lean or (self._borrower is not None and self._borrower() is not None):
            return Spare(None)
        cache = getattr(self.attention, "kv_cache", None)
        if cache is not None:
            self._borrower = weakref.ref(borrower)
            hold(cache)
        return Spare(cache)

    def returned(self, borrower: object) -> None:
        if self._borrower is not None and self._borrower() is borrower:
            self._borrower = None

    def _trains(self) -> bool:
        return self.qkv.adapted or not self.qkv.lora

    def _form(self, rotated: int, decoding: bool) -> attention.Form:
        """The kernels rotate whole heads themselves, after a norm of each where they decode; all else that happens to
        queries and keys before attention `heads.prepare` does."""
        spec, norms = self.spec, self.head_norms
        inside = rotated in (0, spec.size) and (norms is None or (decoding and len(norms.query) == spec.size))
        rotate, norms = inside and rotated > 0, norms if inside else None
        return attention.Form(spec.heads, spec.key_heads, spec.size, spec.scale, spec.window, spec.cap, rotate, norms)

    def _ready(self, qkv: Tensor, cos: Tensor, sin: Tensor, form: attention.Form) -> Tensor:
        if form.rotate or form.norms is not None or not (self.spec.rotary or self.head_norms):
            return qkv
        return heads.prepare(qkv, cos, sin, form, cos.shape[1] if self.spec.rotary else 0, self.head_norms)

    def _add(
        self, x: Tensor, delta: Tensor, after: FusedNorm | None, then: FusedNorm | None, spare: Spare
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(h, 1 / rms(delta), y, 1 / rms(h)): h = x + after(delta), y = then(h)."""
        if after is not None:
            return elementwise.add_normed(x, delta, after.by, None if then is None else then.by)
        assert then is not None
        h, y, rstd = elementwise.norm(x, then.by, delta, spare.take(x, *x.shape))
        return h, None, y, rstd

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y, 1 / rms(x)): y = x normalised, where that is done before attention."""
        before = self.norms[0]
        return (x, None) if before is None else elementwise.norm(x, before.by)[1:]

    def _forward(self, x: Tensor, trie: _Trie, form: attention.Form, spare: Spare) -> tuple[Tensor, _Kept]:
        _, after1, before2, after2 = self.norms
        y1, rstd1 = self._first(x)
        qkv, low1 = self.qkv.forward(y1, None, spare.take(x, len(x), sum(self.qkv.sizes)))
        ready = self._ready(qkv, trie.cos, trie.sin, form)
        attended, lse = attention.attend(ready, *trie, form, spare.take(x, len(x), form.heads * form.size))
        delta1, low2 = self.o.forward(attended)
        h, rstd_delta1, y2, rstd2 = self._add(x, delta1, after1, before2, spare)
        gate_up, low3 = self.gate_up.forward(y2)
        f = activations.activate(gate_up, *self.activation)
        delta2, rstd_delta2 = None, None
        if after2 is None:
            out, low4 = self.down.forward(f, h)
        else:
            delta2, low4 = self.down.forward(f)
            out, rstd_delta2, _, _ = self._add(h, delta2, after2, None, spare)
        again1, again2 = (self.lean and norm is not None for norm in (self.norms[0], before2))
        return out, _Kept(
            x, rstd1, None if again1 else y1, low1, None if ready is qkv else qkv, ready, attended, lse, low2,
            None if after1 is None else delta1, rstd_delta1, h, rstd2, None if again2 else y2, low3, gate_up,
            None if self.lean else f, low4, delta2, rstd_delta2,
        )  # fmt: skip

    def _decode(
        self, x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, hidden_BL: Tensor, form: attention.Form
    ) -> Tensor:
        _, after1, before2, after2 = self.norms
        y1, _ = self._first(x)
        ready = self._ready(self.qkv.forward(y1)[0], cos, sin, form)
        attended = decoding.decode(ready, cos, sin, self.attention.kv_cache, hidden_BL, slot, form)
        h, _, y2, _ = self._add(x, self.o.forward(attended)[0], after1, before2, Spare(None))
        f = activations.activate(self.gate_up.forward(y2)[0], *self.activation)
        if after2 is None:
            return self.down.add_to(h, f)
        return self._add(h, self.down.forward(f)[0], after2, None, Spare(None))[0]

    def backward(self, dout: Tensor, kept: _Kept, trie: _Trie, form: attention.Form) -> Tensor:
        before1, after1, before2, after2 = self.norms
        ddelta2 = dout
        if after2 is not None and kept.delta2 is not None:
            ddelta2 = after2.backward(dout, kept.delta2, kept.rstd_delta2, None)
        df, add = self.down.backward(ddelta2, kept.low4)
        dgate_up, rounded, f = activations.activate_backward(
            kept.gate_up, df, *self.activation, self.gate_up.takes_back, kept.f is None
        )
        add(lambda: _either(kept.f, f))
        dy2, add = self.gate_up.backward(dgate_up, kept.low3, rounded)
        add(lambda: _normed(kept.y2, kept.h, before2))
        dh = dy2.add_(dout) if before2 is None else before2.backward(dy2, kept.h, kept.rstd2, dout)
        ddelta1 = dh
        if after1 is not None and kept.delta1 is not None:
            ddelta1 = after1.backward(dh, kept.delta1, kept.rstd_delta1, None)
        dattended, add = self.o.backward(ddelta1, kept.low2)
        add(lambda: kept.attended)
        found = attention.attend_backward(dattended, kept.ready, kept.attended, kept.lse, *trie, form)
        dqkv = attention.whole(*found) if kept.qkv is None else self._ready_backward(found, kept.qkv, trie, form)
        dy1, add = self.qkv.backward(dqkv, kept.low1)
        add(lambda: _normed(kept.y1, kept.x, before1))
        return dy1.add_(dh) if before1 is None else before1.backward(dy1, kept.x, kept.rstd1, dh)

    def _ready_backward(self, dready: tuple[Tensor, Tensor], qkv: Tensor, trie: _Trie, form: attention.Form) -> Tensor:
        norms = self.head_norms
        trained: tuple[Any, ...] = ()
        if norms is not None and norms.query.requires_grad:
            trained = (norms.query, norms.key)
        rotated = trie.cos.shape[1] if self.spec.rotary else 0
        dqkv, sums = heads.prepare_backward(*dready, qkv, trie.cos, trie.sin, form, rotated, norms, bool(trained))
        add_sums(tuple(map(gradient, trained)), sums)
        return dqkv


class _LayerFunction(torch.autograd.Function):
    """The trie pass of one layer. Its anchors' gradients, like all others, are added to `.grad` in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Layer, trie: _Trie, form: attention.Form, *anchors: Tensor) -> Tensor:
        out, kept = layer._forward(x, trie, form, layer.spare(ctx))
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
        ctx.layer.returned(ctx)
        aside.end_layer(dx.device, ctx.last)
        return dx, None, None, None, *[None] * ctx.count
