"""What a decoder layer of transformers computes, as a value: the differences between architectures that the fused layer
(`policy.llama`) follows. Read from the modules themselves; what cannot be read so is not covered, and said.

Where transformers keeps a fact in code alone (which norm stands where, whose window counts) the layer's class decides.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.pytorch_utils import Conv1D

from equipoise.policy.eightbit import EightBitLinear


@dataclass(frozen=True)
class LayerSpec:
    """x → h = x + after(attention(before(x))), h + after(mlp(before(h))), each norm being there or not."""

    heads: int
    key_heads: int
    size: int
    """Of one head."""
    scale: float
    """Queries times keys are multiplied by it."""
    window: int
    """Tokens that a token sees, itself among them; 0 is all before it."""
    cap: float
    """Of the attention's scores; 0 is none."""
    rotary: bool
    """Whether queries and keys are rotated. By which angles, and how much of a head, comes with every call."""
    head_norms: bool
    """Whether queries and keys are normalised, each head or all together."""
    activation: str
    """`silu` or `gelu_tanh`."""
    gated: bool
    """Whether the MLP is act(gate) · up, and not act(up)."""
    before: bool
    """Whether there are norms before attention and MLP."""
    after: bool
    """Whether there are norms after them, before the sum."""
    layer_norm: bool
    """Layer norms, with a bias; else RMS norms."""
    offset: float
    """What RMS norms add to their weights: 1 in Gemma."""


class Parts(NamedTuple):
    """The modules of a layer by what they do; None where there is none."""

    attention: Any
    qkv: tuple[Any, ...]
    o: Any
    query_norm: Any
    key_norm: Any
    gate_up: tuple[Any, ...]
    down: Any
    before_attention: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any

    @property
    def norms(self) -> tuple[Any, ...]:
        return (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)


class _Layout(NamedTuple):
    """The names of a layer's norms in the order of `Parts.norms`, and where its window is written down."""

    norms: tuple[str | None, str | None, str | None, str | None]
    window: str | None = None


_BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
_AROUND = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
LAYOUTS = {
    "LlamaDecoderLayer": _Layout(_BEFORE),
    "Qwen2DecoderLayer": _Layout(_BEFORE, "module"),
    "Qwen3DecoderLayer": _Layout(_BEFORE, "module"),
    "SmolLM3DecoderLayer": _Layout(_BEFORE, "module"),
    "MistralDecoderLayer": _Layout(_BEFORE, "config"),
    "Phi3DecoderLayer": _Layout(_BEFORE, "config"),
    "GemmaDecoderLayer": _Layout(_BEFORE),
    "Gemma2DecoderLayer": _Layout(_AROUND, "module"),
    "Gemma3DecoderLayer": _Layout(_AROUND, "module"),
    "Olmo2DecoderLayer": _Layout(_AFTER),
    "Olmo3DecoderLayer": _Layout(_AFTER, "module"),
    "GPT2Block": _Layout(("ln_1", None, "ln_2", None)),
}
"""By the class of the decoder layer."""


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of `model` in order, whatever they are."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=len, default=nn.ModuleList())
    return list(longest)


def known_layers(model: nn.Module) -> bool:
    """Whether all decoder layers are of classes that the fused layer knows. Their weights need not be there."""
    layers = decoder_layers(model)
    return bool(layers) and all(type(layer).__name__ in LAYOUTS for layer in layers)


def parts(layer: Any) -> Parts:
    """The modules of a layer whose class is in `LAYOUTS`."""
    attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
    norms = [getattr(layer, name) if name else None for name in LAYOUTS[type(layer).__name__].norms]

    def some(owner: Any, *names: str) -> tuple[Any, ...]:
        return tuple(getattr(owner, name) for name in names if hasattr(owner, name))

    return Parts(
        attention,
        some(attention, "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"),
        some(attention, "o_proj", "c_proj")[0],
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
        some(layer.mlp, "gate_proj", "up_proj", "gate_up_proj", "c_fc"),
        some(layer.mlp, "down_proj", "c_proj")[0],
        *norms,
    )


def base(module: Any) -> Any:
    """The layer of the model's own that an adapter is put around."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def width(module: Any) -> int:
    """Outputs of a linear layer, with an adapter or without."""
    own = base(module)
    return int(own.nf if isinstance(own, Conv1D) else own.out_features)


def describe(model: nn.Module) -> list[tuple[Any, LayerSpec]] | str:
    """The decoder layers with what each of them computes; or, in words, the first thing that is not covered."""
    found = []
    layers = decoder_layers(model)
    if not layers:
        return "no list of decoder layers"
    for layer in layers:
        spec = _describe(layer)
        if isinstance(spec, str):
            return spec
        found.append((layer, spec))
    if len({spec.window for _, spec in found} - {0}) > 1:
        return "windows of several sizes"
    return found


def _describe(layer: Any) -> LayerSpec | str:
    name = type(layer).__name__
    if name not in LAYOUTS:
        return _strange(layer)
    own = parts(layer)
    linear = [*own.qkv, own.o, *own.gate_up, own.down]
    for module in linear:
        if type(base(module)) not in (nn.Linear, Conv1D, EightBitLinear):
            return f"weights of the kind {type(base(module)).__name__}"
    if not getattr(own.attention, "is_causal", True) or hasattr(layer, "crossattention"):
        return "attention to what comes after"
    norms = [n for n in own.norms if n is not None]
    kinds = {norm_kind(norm) for norm in (*norms, own.query_norm, own.key_norm) if norm is not None}
    if len(kinds) != 1 or None in kinds:
        return f"its norm ({type(norms[0]).__name__})"
    ((layer_norm, offset),) = (kind for kind in kinds if kind is not None)
    activation = _activation(layer.mlp)
    if activation is None:
        return "its activation"
    size, out = int(own.attention.head_dim), sum(map(width, own.qkv))
    inner = base(own.o).nx if isinstance(base(own.o), Conv1D) else base(own.o).in_features
    heads = inner // size
    if size % 2 or size > 256:
        return f"heads of {size}"
    windowed = {"module": own.attention, "config": getattr(own.attention, "config", None), None: None}
    window = windowed[LAYOUTS[name].window]
    return LayerSpec(
        heads=heads,
        key_heads=(out // size - heads) // 2,
        size=size,
        scale=float(own.attention.scaling),
        window=int(getattr(window, "sliding_window", None) or 0),
        cap=float(getattr(own.attention, "attn_logit_softcapping", None) or 0.0),
        rotary=name != "GPT2Block" and bool(getattr(own.attention, "use_rope", True)),
        head_norms=own.query_norm is not None,
        activation=activation,
        gated=hasattr(layer.mlp, "gate_proj") or hasattr(layer.mlp, "gate_up_proj"),
        before=own.before_attention is not None,
        after=own.after_attention is not None,
        layer_norm=layer_norm,
        offset=offset,
    )


def _strange(layer: Any) -> str:
    """What a layer of an unknown class has that the others have not."""
    names = {part.lower() for name, _ in layer.named_modules() for part in name.split(".")}
    if any("expert" in name for name in names):
        return "a mixture of experts"
    if any("mamba" in name or "mixer" in name or "ssm" in name or "linear_attn" in name for name in names):
        return "a state beside or in place of attention"
    return f"layers of the kind {type(layer).__name__}"


@torch.no_grad()
def norm_kind(norm: Any) -> tuple[bool, float] | None:
    """(whether it is a layer norm, what an RMS norm adds to its weights), found by trying it with other weights; None
    for anything else."""
    if type(norm) is nn.LayerNorm:
        return (True, 0.0) if norm.weight is not None and norm.bias is not None else None
    eps = epsilon(norm)
    if eps is None or not isinstance(getattr(norm, "weight", None), Tensor) or norm.weight.dim() != 1:
        return None
    twin = copy.deepcopy(norm).float()
    x = torch.linspace(-2.0, 3.0, len(norm.weight), device=norm.weight.device)[None]
    normed = x * torch.rsqrt(x.square().mean() + eps)
    seen = []
    for value in (0.0, 1.0):
        twin.weight.fill_(value)
        seen.append(twin(x))
    for offset in (0.0, 1.0):
        if all(torch.allclose(y, normed * (value + offset), atol=1e-4) for value, y in zip((0, 1), seen, strict=True)):
            return False, offset
    return None


def epsilon(norm: Any) -> float | None:
    """Of a norm of either spelling."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if found is None else float(found)


@torch.no_grad()
def _activation(mlp: Any) -> str | None:
    """The activation's name, found by trying it."""
    function = next((getattr(mlp, n) for n in ("act_fn", "activation_fn", "act") if hasattr(mlp, n)), None)
    if function is None:
        return None
    x = torch.linspace(-6.0, 6.0, 97)
    known = {"silu": silu(x), "gelu_tanh": gelu(x, approximate="tanh")}
    found = function(x)
    return next((name for name, y in known.items() if torch.allclose(found, y, atol=1e-6)), None)
