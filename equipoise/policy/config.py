"""How a policy is loaded and how it samples: options that need no torch to be read."""

import re
from dataclasses import dataclass
from typing import Literal

from equipoise.errors import UserError

_DEVICE = re.compile(r"auto|cpu(:\d+)?|cuda(:\d+)?")
_OTHERS = ("mps", "xpu", "hpu", "mtia", "xla", "npu", "meta", "vulkan")
"""Kinds of devices that PyTorch has besides."""
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def check_device(name: str) -> None:
    """Raises UserError for a device that no machine can offer, before PyTorch is loaded to look for it."""
    if name.partition(":")[0] in _OTHERS:
        raise UserError(f"device {name!r} is not supported, sampling needs float64 and CUDA or a CPU: use cpu or cuda")
    if not _DEVICE.fullmatch(name):
        raise UserError(f"unknown device {name!r}: use cpu, cuda or cuda:0")
    if name.startswith("cpu:") and int(name.removeprefix("cpu:")):
        raise UserError(f"device {name!r} is not there, all CPUs are one device: use cpu")


@dataclass(frozen=True)
class PolicyConfig:
    model: str = "bundled"
    """`bundled` (SmolLM2-135M-Instruct), `gemma-3-270m`, a Hub id, or a local folder."""
    tuning: Literal["lora", "full"] = "lora"
    """`lora` trains adapters on linear layers (a mixture's experts have none), the reference being the same model
    with them off; `full` trains all weights beside a frozen copy."""
    lora_rank: int = 16
    """Rank of the LoRA adapters: more is more that can be learnt, and more memory."""
    lora_alpha: int = 32
    """What the adapters add is scaled by lora-alpha / lora-rank."""
    use_8bit: bool = False
    """Keep the frozen base weights in 8 bits, for cards with 16 or 24 GB. Needs `lora` and a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in. `auto`: bfloat16 where the hardware is faster in it; a run that is continued keeps
    what it began with. Trained weights and optimizer are always float32, and so are log-probabilities, values and
    losses."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    cuda_graphs: bool = True
    """Record the model's passes as CUDA graphs and replay them. Off: the plain twin, slower, for comparison."""
    tensor_parallel: int = 1
    """Cut every layer over so many processes, which together hold one model that is too large for one GPU: as many as
    are started (--gpus). Needs `lora`; computes by the plain way, without CUDA graphs."""
    fused: bool = True
    """Fewer kernels for LoRA layers and norms. Off: peft's and transformers' own, for comparison."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for far less memory. Also without being asked
    for where the estimate says that memory needs it."""

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise UserError(
                f"lora-rank {self.lora_rank} and lora-alpha {self.lora_alpha} must be positive; 16 and 32 are usual"
            )
        if self.tensor_parallel < 1:
            raise UserError(f"tensor-parallel {self.tensor_parallel} must be at least 1")
        for given, option in ((self.use_8bit, "--use-8bit"), (self.tuning == "full", "--tuning full")):
            if given and self.tensor_parallel > 1:
                raise UserError(
                    f"--tensor-parallel {self.tensor_parallel} does not go with {option}: leave one of them out"
                )
        if self.use_8bit and self.tuning == "full":
            raise UserError(
                "--use-8bit freezes the base weights, so they cannot all be trained: use --tuning lora with it"
            )


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0
    """Divides the logits, in sampling and scoring alike. 0 takes the likeliest token (generation only)."""
    top_p: float = 1.0
    """Nucleus: only the likeliest tokens whose mass reaches top_p are drawn. Training is unbiased at 1, the whole
    policy; the protocol's generation uses 0.95."""
    max_new_tokens: int = 32
    """A completion that has not stopped by then is cut off."""

    def describe(self) -> str:
        """In words."""
        return f"temperature {self.temperature:g}, top-p {self.top_p:g}, at most {self.max_new_tokens} new tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} makes no distribution: use 0 (greedy) or more, 1.0 by default"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"top-p {self.top_p} is not in (0, 1]: use 1 for the whole distribution, 0.95 for the study's"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens {self.max_new_tokens} must be at least 1; the protocol uses 32")
