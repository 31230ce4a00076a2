"""What this machine has, what a run will need of it, and a refusal in time where that does not fit."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM

from equipoise.errors import UserError
from equipoise.learning.shards import BLOCK as BLOCK_OF_SHARDS
from equipoise.policy.config import PolicyConfig
from equipoise.policy.eightbit import BLOCK, LINEAR, matrix
from equipoise.policy.layer_spec import known_layers
from equipoise.policy.load import pick_device, pick_dtype
from equipoise.policy.source import Source, load_config
from equipoise.protocol.plural import plural

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


def inspect_machine() -> Machine:
    """Look at the machine this process runs on."""
    gpu, free = None, 0.0
    if torch.cuda.is_available():
        gpu, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] / GB
    return Machine(gpu, free, psutil.virtual_memory().available / GB, torch.get_num_threads())


@dataclass(frozen=True)
class Work:
    """Sizes of one step: completions per forward and backward pass, completions of the whole step, tokens."""

    rows: int
    batch: int
    prompt: int
    new: int
    """Tokens of a completion at most."""
    processes: int = 1
    """That share the step, each with as many completions."""
    piece: int = 0
    """Completions of a piece, whose gradients are summed in float32 where a pass takes fewer; 0: one pass takes all."""
    pieces: int = 1
    """Of each process."""
    average: bool = False
    """Whether a moving average of the weights is kept."""
    values: int = 0
    """Units of a hidden layer of the value head; 0: it has none, or there is no value head."""

    @property
    def own(self) -> int:
        """Completions of the whole step that one process samples and scores."""
        return -(-self.batch // self.processes)

    @property
    def sums(self) -> int:
        """Sums of all gradients in float32 that are kept beside them where states are sharded."""
        return (self.rows < self.piece) + (self.pieces > 1)

    @property
    def packed(self) -> int:
        """Tokens of a pass: a prompt's beginning is shared, its last `TAIL` tokens hold the occupation."""
        return self.prompt + self.rows * (TAIL + self.new)


TAIL = 8
MARGIN = 0.93
"""Share of the free memory that a plan may fill: the allocator's blocks do not fit without gaps."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run will take, from the model's shape alone."""

    parameters: int
    trained: int
    weights: int
    reference: int
    optimizer: int
    """Float32 masters where the compute dtype is another, gradients, and Adam's two moments; sharded: a slice."""
    activations: int
    """The sampler's cache and the logits of scoring a whole batch included."""
    checkpoint: int
    export: int
    loading: int = 0
    """At most while the model is read: in 8 bits no more than one matrix is there as it was."""
    values: int = 0
    """What of all this a hidden layer of the value head takes at least."""

    @property
    def memory(self) -> int:
        return max(self.loading, self.weights + self.reference + self.optimizer + self.activations)


class Look(NamedTuple):
    """A model's configuration, and what it would consist of."""

    config: Any
    parameters: int
    linear: Sequence[torch.Tensor]
    """(N, K) weights of linear layers, all but the output head's, without memory."""
    known: bool
    """Whether the fused layer may take its layers."""


def look(source: Source) -> Look:
    """Loads the model's config, not its weights."""
    model_config = load_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    linear = [matrix(m, m.weight) for n, m in model.named_modules() if isinstance(m, LINEAR) and "lm_head" not in n]
    return Look(model_config, sum(p.numel() for p in model.parameters()), linear, known_layers(model))


def need(config: PolicyConfig, source: Source, work: Work) -> Need:
    """Estimate of what a run takes. Loads the model's config, not its weights."""
    return _need(config, look(source), work)


def _need(config: PolicyConfig, looked: Look, work: Work) -> Need:
    device = pick_device(config.device)
    width = torch.finfo(pick_dtype(config.dtype, device)).bits // 8
    model_config, parameters, linear, known = looked
    lora = config.lora_rank * sum(sum(w.shape) for w in linear)
    text = model_config.get_text_config()
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    trained = parameters if config.tuning == "full" else lora
    masters = 4 if width < 4 else 0
    fused = device.type == "cuda" and config.fused and config.tensor_parallel == 1 and known
    # Values that a layer keeps for its backward pass, per token: ours 7 of hidden size and 3 of the MLP's, 4 more with
    # norms after attention and MLP or of heads; those of transformers and peft some 34 of hidden size. With
    # checkpointing one per layer, and all in one layer at a time.
    plain = model_config.model_type == "llama"
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    kept = (7 if plain else 11) * hidden + 3 * inner if fused else 34 * hidden
    per_token = kept + hidden * layers if config.gradient_checkpointing else kept * layers
    # Logits and their gradient in the compute dtype, or three times in float32.
    predicted = work.rows * work.new * vocabulary * (2 * width if fused else 12)
    # The value head is float32. Of a hidden layer before and after its SiLU, and as much on the way back; a linear head
    # is nothing beside the rest.
    value_head = work.values * (hidden + 2) + 1 if work.values else 0
    units = 16 * work.rows * work.new * work.values
    # The whole batch is scored at once where one pass takes a whole mini-batch, and else in the passes of the updates.
    at_once = work.own if work.rows >= work.piece else work.rows
    per_scored = vocabulary * (width if fused else 8) + 12 * work.values
    scored = at_once * work.new * per_scored if device.type == "cuda" else 0
    # Without attention heads, as in a state space model, the state is far smaller than this.
    heads = getattr(text, "num_attention_heads", None) or 1
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head = getattr(text, "head_dim", None) or hidden // heads
    cache = work.own * (work.prompt + work.new) * 2 * layers * key_heads * head * width
    reference = parameters * width if config.tuning == "full" else 0
    matrices = [w.numel() for w in linear] if config.use_8bit else []
    rows = sum(len(w) for w in linear) if config.use_8bit else 0
    cut = config.tensor_parallel
    shared = sum(w.numel() for w in linear) * width if cut > 1 else 0
    average = 4 * work.average
    whole = trained * (masters + 4 + 8 + average + (width if masters else 0))
    sharded = config.tuning == "full" and work.processes > 1
    # The head's own masters are its weights, but for slices. A moving average is of the policy alone.
    of_head = _sharded(value_head, 4, replace(work, average=False)) if sharded else 12 * value_head
    base = (parameters - sum(matrices)) * width + sum(matrices) + 4 * rows  # a float32 scale for each row
    base -= shared - shared // cut
    # In 8 bits an embedding of its own ends up in the host's memory.
    hosted = vocabulary * hidden * width if config.use_8bit and not getattr(text, "tie_word_embeddings", True) else 0
    # On the way back: gate and up, the largest, written out in the compute dtype, or transposed in FP8 with the next.
    turned = 4 * max(matrices, default=0)
    return Need(
        parameters=parameters,
        trained=trained,
        weights=base - hosted + (lora * width if config.tuning == "lora" else 0) + 4 * value_head,
        reference=reference,
        optimizer=(_sharded(trained, width, work) if sharded else whole) + of_head,
        activations=work.packed * per_token * width + predicted + units + max(scored, cache) + turned,
        checkpoint=trained * (12 + average) + 12 * value_head,
        export=parameters * (4 if parameters < 1e9 else 2),
        loading=base
        + reference
        + max(matrices or [w.numel() for w in linear if cut > 1], default=0) * width
        + (3 * 4 * BLOCK if matrices else 0),
        values=4 * value_head + of_head + units,
    )


def _sharded(trained: int, width: int, work: Work) -> int:
    """Bytes of one of the processes that share the optimizer's states: a slice of masters and moments, whole gradients
    in the compute dtype, sums of them in float32 where there are several passes, and a block on its way."""
    sums = work.sums if width < 4 else work.sums - (work.rows < work.piece)
    states = trained * (12 + 4 * work.average) // work.processes
    return trained * (width + 4 * sums) + states + min(BLOCK_OF_SHARDS, trained) * (width + 4)


class Fit(NamedTuple):
    """How a step is cut up so that it fits into the GPU's memory."""

    need: Need
    rows: int
    gradient_checkpointing: bool

    def line(self, wanted: int) -> str | None:
        """What is done about too little memory, or None where there is enough. `wanted`: rows as configured."""
        how = [f"{plural(self.rows, 'completion')} at a time instead of {wanted}"] if self.rows < wanted else []
        how += ["activations computed again in the backward pass"] if self.gradient_checkpointing else []
        return f"plan      {', '.join(how)}, so that a step fits into memory: same result, more time" if how else None


def fit(config: PolicyConfig, source: Source, work: Work, free_gb: float) -> Fit:
    """The fastest way that is estimated to fit: smaller passes before recomputing, since many small passes cost less
    time than a third more work. On a CPU what is configured; where nothing fits what needs the least."""
    looked = look(source)
    wanted = Fit(_need(config, looked, work), work.rows, config.gradient_checkpointing)
    if pick_device(config.device).type != "cuda":
        return wanted
    halved = [work.rows >> n for n in range(work.rows.bit_length())]
    ways = [(rows, False) for rows in halved if rows >= 4 or rows == work.rows] + [(rows, True) for rows in halved]
    found = [
        Fit(_need(replace(config, gradient_checkpointing=again), looked, replace(work, rows=rows)), rows, again)
        for rows, again in ways
        if again or not config.gradient_checkpointing
    ]
    fits = [each for share in (MARGIN, 1.0) for each in found if each.need.memory / GB <= share * free_gb]
    return fits[0] if fits else min(found, key=lambda each: each.need.memory)


def check(
    needed: Need,
    machine: Machine,
    device: torch.device,
    folders: tuple[str, str],
    checkpoints: int,
    sharing: int = 1,
) -> list[str]:
    """Lines that say what fits. `sharing`: processes on this machine, which have a GPU each, or one memory together.

    Raises UserError where memory or disk clearly will not do."""
    free = machine.gpu_free_gb if device.type == "cuda" else machine.memory_free_gb / sharing
    where = "on the GPU" if device.type == "cuda" else "of memory"
    where += f" for each of {sharing} processes" if sharing > 1 else ""
    if needed.memory / GB > free:
        remedy = (
            "--use-8bit" if not needed.reference else "more GPUs (--gpus), which share the optimizer, --tuning lora"
        )
        remedy = remedy if device.type == "cuda" else "--model bundled"
        if needed.activations > needed.memory / 2:  # on a GPU passes are as small as they can be
            remedy = f"a smaller --{'batch-size' if device.type == 'cuda' else 'micro-batch-size'}, {remedy}"
        if needed.values > needed.memory / 2:
            remedy = f"a smaller --value-hidden, {remedy}"
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
        f"memory    about {needed.memory / GB:.1f} GB of {free:.1f} GB free"
        f"{f' for each of {sharing} processes' if sharing > 1 else ''}: weights {needed.weights / GB:.1f}, "
        f"reference {needed.reference / GB:.1f}, optimizer {needed.optimizer / GB:.1f}, "
        f"activations {needed.activations / GB:.1f}",
        f"disk      about {total / GB:.1f} GB for {plural(checkpoints, 'checkpoint')} and the final model",
    ]
