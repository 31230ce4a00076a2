"""Layers whose matrices are cut over several processes, for a model that is too large for one GPU (tensor parallelism,
Shoeybi et al. 2019, arXiv 1909.08053).

Query, key, value, gate and up give each process some of their outputs, whole heads among them; output and down
projection take those as inputs, and their partial products are added up over the processes. Everything else, adapters
too, is whole on each process: adapters are small, and so begin, are saved and go on as they would in one process. Each
uses its part of them, and so knows a part of their gradients, to be added up.

Shapes: K inputs and N outputs of a projection.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from equipoise.errors import UserError
from equipoise.policy.eightbit import EightBitLinear
from equipoise.runs.ranks import Ranks

OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
INPUTS = ("o_proj", "down_proj")
FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
"""Model types whose layers are these matrices and nothing else that looks at several heads."""


def check_cut(config: Any, count: int) -> None:
    """Raises UserError where a model of that configuration cannot be cut over so many processes."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--tensor-parallel {count} cannot cut a {config.model_type} model, only "
            f"{', '.join(FAMILIES)}: leave it out"
        )
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "MLP columns": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % count:
            raise UserError(
                f"--tensor-parallel {count} does not divide the model's {size} {name}: give a number that divides "
                f"{', '.join(f'{n} {each}' for each, n in sizes.items())}"
            )


class Cut:
    """Which part of each matrix is this process's."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __deepcopy__(self, _: Any) -> "Cut":
        return self  # as part of a configuration that is copied: processes are not

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's equal part of a dimension; a view."""
        return x.chunk(self.ranks.size, dim)[self.ranks.rank]

    def put_aside(self, name: str, layer: nn.Linear, weight_NK: Tensor) -> nn.Parameter:
        """Keep this process's part of a layer's weights beside it until `cut_layers`; what stands for them meanwhile,
        as in `eightbit.put_aside`. `name` ends in that of the layer."""
        layer.slice = self.part(weight_NK, 0 if _is_output(name) else 1).clone()
        nothing = torch.full((1,), torch.nan, dtype=weight_NK.dtype, device=weight_NK.device)
        return nn.Parameter(nothing.expand(weight_NK.shape), requires_grad=False)


def _is_output(name: str) -> bool:
    last = name.rpartition(".")[2]
    assert last in (*OUTPUTS, *INPUTS), name
    return last in OUTPUTS


class _Everywhere(torch.autograd.Function):
    """x, which every process has; each knows a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.clone(memory_format=torch.contiguous_format)
        ctx.ranks.reduce_(whole)
        return whole, None


class _Sum(torch.autograd.Function):
    """The sum of what each process has; its gradient is that of each."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        ranks.reduce_(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SlicedLinear(nn.Module):
    """This process's part of y = x·Wᵀ + b: x (…, K) → (…, N / processes), or (…, K / processes) → (…, N), which every
    process then has."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, name: str, layer: nn.Linear, cut: Cut) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.cut, self.outputs = cut, _is_output(name)
        self.register_buffer("weight", layer.__dict__["slice"])
        bias = layer.bias
        self.register_buffer("bias", cut.part(bias.detach(), 0).clone() if bias is not None and self.outputs else bias)

    def forward(self, x: Tensor, adapter: LoraLayer | None = None) -> Tensor:
        """With an adapter: y + scale · (x·Aᵀ)·Bᵀ."""
        cut = self.cut
        if self.outputs:
            x = _Everywhere.apply(x, cut.ranks)
        y: Tensor = linear(x, self.weight, self.bias if self.outputs else None)
        if adapter is not None:
            (name,) = adapter.active_adapters
            a, b = adapter.lora_A[name].weight, adapter.lora_B[name].weight
            a, b = (a, cut.part(b, 0)) if self.outputs else (cut.part(a, 1), b)
            y = y + linear(linear(x, a), b) * adapter.scaling[name]
        if self.outputs:
            return y
        y = _Sum.apply(y, cut.ranks)
        return y if self.bias is None else y + self.bias


def cut_layers(model: Any, cut: Cut) -> None:
    """Put the parts in that were put aside, below the adapters."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        layer.base_layer = SlicedLinear(name, layer.base_layer, cut)
        layer.forward = _forward(layer)
    plain = model.get_base_model()
    assert not any("slice" in module.__dict__ for module in plain.modules()), "a layer without adapter"
    plain.is_quantized = True  # which export takes as: merge into the original weights


def matrix_weights(model: nn.Module) -> int:
    """Weights of the matrices that are in 8 bits or cut, and so no parameters: as many as they are whole."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, EightBitLinear | SlicedLinear))


def _forward(layer: Any) -> Any:
    return lambda x: layer.base_layer(x, None if layer.disable_adapters else layer)
