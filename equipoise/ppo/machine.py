"""What this machine has, what a run will need of it, and a refusal in time where that does not fit."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from equipoise.errors import UserError
from equipoise.policy.load import PolicyConfig, pick_device, pick_dtype
from equipoise.policy.source import Source, load_config

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """Sizes in GB (10⁹ bytes)."""

    gpu: str | None
    gpu_free_gb: float
    memory_free_gb: float
    cores: int

    def lines(self) -> list[str]:
        gpu = f"{self.gpu}, {self.gpu_free_gb:.1f} GB free" if self.gpu else "none"
        return [f"machine   GPU {gpu} · {self.cores} CPU threads · {self.memory_free_gb:.1f} GB of memory free"]


def look() -> Machine:
    """Look at the machine this process runs on."""
    gpu, free = None, 0.0
    if torch.cuda.is_available():
        gpu, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] / GB
    return Machine(gpu, free, psutil.virtual_memory().available / GB, torch.get_num_threads())


@dataclass(frozen=True)
class Need:
    """Bytes that a run will take, from the model's shape alone."""

    parameters: int
    trained: int
    weights: int
    reference: int
    optimizer: int
    """Float32 masters where the compute dtype is another, gradients, and Adam's two moments."""
    activations: int
    checkpoint: int
    export: int

    @property
    def memory(self) -> int:
        return self.weights + self.reference + self.optimizer + self.activations


def need(config: PolicyConfig, source: Source, micro_batch: int, sequence: int) -> Need:
    """Estimate for `micro_batch` sequences of `sequence` tokens. Loads the model's config, not its weights."""
    device = pick_device(config.device)
    width = torch.finfo(pick_dtype(config.dtype, device)).bits // 8
    model_config = load_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    parameters = sum(p.numel() for p in model.parameters())
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    lora = sum(config.lora_rank * (m.in_features + m.out_features) for m in linear)
    text = model_config.get_text_config()
    trained = parameters if config.tuning == "full" else lora
    masters = 4 if width < 4 else 0
    # Per layer and token some 34 hidden-sized values survive to the backward pass (attention in blocks), or 1 with
    # checkpointing; plus logits three times in float32.
    kept = 2 if config.gradient_checkpointing else 34
    tokens = micro_batch * sequence
    activations = tokens * (kept * text.num_hidden_layers * text.hidden_size * width + 12 * text.vocab_size)
    frozen = sum(m.weight.numel() for m in linear) if config.use_8bit else 0
    return Need(
        parameters=parameters,
        trained=trained,
        weights=(parameters - frozen) * width + frozen + (lora * width if config.tuning == "lora" else 0),
        reference=parameters * width if config.tuning == "full" else 0,
        optimizer=trained * (masters + 4 + 8 + (width if masters else 0)),
        activations=activations,
        checkpoint=trained * 12,
        export=parameters * (4 if parameters < 1e9 else 2),
    )


def check(
    needed: Need, machine: Machine, device: torch.device, folders: tuple[str, str], checkpoints: int
) -> list[str]:
    """Lines that say what fits. Raises UserError where memory or disk clearly will not do."""
    free = machine.gpu_free_gb if device.type == "cuda" else machine.memory_free_gb
    where = "on the GPU" if device.type == "cuda" else "of memory"
    if needed.memory / GB > free:
        remedy = (
            "--use-8bit, --gradient-checkpointing or a smaller --micro-batch-size"
            if device.type == "cuda"
            else "--model bundled"
        )
        raise UserError(
            f"training needs about {needed.memory / GB:.1f} GB and {free:.1f} GB {where} are free: "
            f"try {remedy}, or a smaller model"
        )
    output, checkpoint = (Path(f) for f in folders)
    wanted = {output: needed.export, checkpoint: checkpoints * needed.checkpoint}
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in wanted.items():
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        disk = existing.stat().st_dev
        by_disk[disk] = (existing, by_disk.get(disk, (existing, 0))[1] + size)
    for existing, size in by_disk.values():
        available = shutil.disk_usage(existing).free
        if size > available:
            raise UserError(
                f"checkpoints and model take about {size / GB:.1f} GB and {available / GB:.1f} GB of disk are free: "
                "make room, choose folders on another disk, or keep fewer checkpoints (--keep-checkpoints 2)"
            )
    total = sum(size for _, size in by_disk.values())
    return [
        f"memory    about {needed.memory / GB:.1f} GB of {free:.1f} GB free: weights {needed.weights / GB:.1f}, "
        f"reference {needed.reference / GB:.1f}, optimizer {needed.optimizer / GB:.1f}, "
        f"activations {needed.activations / GB:.1f}",
        f"disk      about {total / GB:.1f} GB for {checkpoints} checkpoints and the final model",
    ]
