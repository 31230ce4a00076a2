"""Completions of a trained model for every occupation, written so that an interruption costs at most one batch.

Every sentence is a function of the weights, the prompt, the sampling settings, the seed, the occupation and its RunID.
The random numbers are exactly so (`prompted.uniforms`). The model's arithmetic depends, in the last bits, on which rows
share a batch; so rows are always computed in the same batches, also those of which an interrupted file holds a part.
On the same machine with the same batch size the finished file then equals an uninterrupted one byte for byte.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from equipoise.errors import UserError
from equipoise.methods.completions import Completions, Key, all_keys
from equipoise.methods.costs import Costs
from equipoise.methods.parts import Part, read_part
from equipoise.methods.shared import SharedWriter, made_alike
from equipoise.options import OptionalTask
from equipoise.policy.config import PolicyConfig, SamplingConfig, check_device
from equipoise.protocol.task import Task
from equipoise.runs.ranks import Ranks, joined
from equipoise.runs.signals import StopSignals

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted, Written

TRAINED = "./rlhf_llama3_7b_output"
"""Where training leaves the final model."""
NONFINITE_EXIT = 3
TOP_P = 0.95
"""The protocol's."""


@dataclass(frozen=True)
class GenerateConfig:
    """Which model writes, how it samples, and where the rows go."""

    model: str = TRAINED
    """Folder of the trained model; also a Hub id or `bundled`, for sentences of an untrained model."""
    output: Path = Path("rlhf_llama3_completions.csv")
    """The CSV. Beside it, with `.json` added to its name, lies the record of how it was made."""
    task: OptionalTask = None
    """A task file, or the name of a packaged task: occupations, classes of terms, frame, bounds and prompts. Default:
    the task that the model was trained on, if it says."""
    n: int = 250
    """Sentences per occupation. A finished file can be extended by asking for more."""
    prompt: str | None = None
    """The name of one of the task's prompts (`raw` gives no instruction at all), or your own as NAME=INSTRUCTION with
    {occupation} in it. Default: the prompt that the model was trained with, or the task's first where nothing says."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float | None = None
    """Only the likeliest tokens whose probabilities reach this sum are drawn. Default: 0.95."""
    max_new_tokens: int = 32
    """A sentence that has not ended by then is cut off."""
    seed: int = 0
    """Another seed gives other sentences."""
    batch_size: int | None = None
    """Sentences at a time. Default: 1000 on a GPU, 128 on a CPU; halved where memory does not suffice."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in. `auto`: bfloat16 where the hardware is faster in it."""
    use_8bit: bool = False
    """Keep the weights in 8 bits, where a GPU has too little memory for them."""
    model_name: str | None = None
    """The column Model. Default: the name of the model's folder, or its id."""
    label: str | None = None
    """The column Label. Default: RLHF for a model that was trained here, Prompt-Only for any other."""
    overwrite: bool = False
    """Start the file anew, giving up the rows in it."""
    part: str | None = None
    """`3/8`: write only the third of eight parts, into NAME.part-3-of-8.csv, for jobs that run anywhere at any time;
    `equipoise join NAME.csv` then puts the parts together."""

    def __post_init__(self) -> None:
        check_device(self.device)
        _ = self.share
        for name in ("n", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")

    @property
    def share(self) -> Part | None:
        """The part that is asked for. Raises UserError."""
        return read_part(self.part) if self.part is not None else None

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.share.path(self.output) if self.share else self.output

    @property
    def nucleus(self) -> float:
        """The top-p that is drawn with."""
        return TOP_P if self.top_p is None else self.top_p

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn. Raises UserError."""
        return SamplingConfig(self.temperature, self.nucleus, self.max_new_tokens)

    def policy_of(self, model: str) -> PolicyConfig:
        """How a model is brought into memory to write."""
        return PolicyConfig(model, dtype=self.dtype, device=self.device, use_8bit=self.use_8bit)


@dataclass(frozen=True)
class Outcome:
    """How a call to `generate` ended, and the sentences that the file holds."""

    status: Literal["done", "stopped", "nonfinite"]
    texts: dict[Key, str]
    exit_code: int
    """0 done; 128 + the signal's number when stopped by one; 3 when the model gave non-finite numbers."""
    task: Task
    """What they were written for."""


class Caller(NamedTuple):
    """Who a long job is done for."""

    stop: StopSignals
    """Looked at between batches."""
    say: Callable[[str], None]
    """Gets notices of one line."""
    progress: Callable[[int, int], None]
    """Gets the rows in the file and the rows wanted, first and after each batch."""


def generate(
    config: GenerateConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Write the rows that the file lacks, or all of them. Raises UserError for what the user can mend.

    `say` gets notices of one line; `progress` the rows in the file and the rows wanted, first and after each batch.
    """
    with joined() as ranks, StopSignals(tell_of_batch, ranks) as stop:
        writer = made_alike(lambda: _writer(config, ranks), ranks)
        caller = Caller(stop, say, progress)
        return led(writer, ranks, caller, lambda through: _into_file(config, writer, through, caller))


def led(
    writer: "Prompted", ranks: Ranks, caller: Caller, work: Callable[["Prompted | SharedWriter"], Outcome]
) -> Outcome:
    """What comes of `work`, which rank 0 does with what has sentences written by all ranks, or with the writer itself
    where there are no others; they get its outcome too. Raises what it raises, on all."""
    if ranks.size == 1:
        return work(writer)
    shared = SharedWriter(writer, ranks, caller.stop)
    return shared.lead(lambda: work(shared))


def _writer(config: GenerateConfig, ranks: Ranks) -> "Prompted":
    check_trained(config.model)
    # Only here: `--help` and a mistyped option need not wait for torch.
    from equipoise.methods.prompted import Prompted
    from equipoise.policy.load import own_device

    policy = config.policy_of(config.model)
    return Prompted(
        replace(policy, device=own_device(policy.device, ranks)),
        prompt=config.prompt,
        sampling=config.sampling,
        seed=config.seed,
        batch_size=config.batch_size,
        task=config.task,
    )


def _into_file(config: GenerateConfig, writer: "Prompted", through: "Writer", caller: Caller) -> Outcome:
    """Have the sentences of `writer` written by `through`."""
    columns = {"Model": config.model_name or writer.name, "Label": config.label or writer.label}
    settings = columns | writer.settings
    keys, part = dealt(config, writer)
    with Completions(config.path, settings, writer.task, config.n, config.overwrite, part=part) as file:
        return write_all(through, file, keys, caller)


def dealt(config: GenerateConfig, writer: "Prompted") -> tuple[Sequence[Key], Mapping[str, int] | None]:
    """The keys that are to be written, and for the record which part of the file they are, if not all of it."""
    keys = all_keys(config.n, writer.task.names)
    if config.share is None:
        return keys, None
    return config.share.keys(keys, writer.batch_size), config.share.document(config.n, writer.batch_size)


class Writer(Protocol):
    """Writes the sentences of keys, the same for the same key however they are batched, to rounding."""

    @property
    def batch_size(self) -> int:
        """Sentences at a time."""

    @property
    def notices(self) -> Sequence[str]:
        """Lines the user should see."""

    def describe(self) -> str:
        """One line for the person who waits."""

    def load(self, say: Callable[[str], None]) -> None:
        """Bring into memory, or make, whatever writing takes. Raises UserError."""

    def __call__(self, keys: Sequence[Key], say: Callable[[str], None]) -> Mapping[Key, "Written"]:
        """Raises NonFiniteLogits; UserError."""


def write_all(
    writer: Writer, file: Completions, keys: Sequence[Key], caller: Caller, costs: Costs | None = None
) -> Outcome:
    """Write those of `keys` that the file lacks, and put its rows in order."""
    if file.texts:
        caller.say(f"{file.path} holds {len(file.texts)} of {len(keys)} rows")
    if not keys:
        caller.say(f"{file.path} gets no rows: there are more parts than batches; a smaller --batch-size makes more")
        _begin(file, caller.say)
    status = write_rows(writer, file, batches(keys, writer.batch_size), len(keys), caller, costs)
    if status == "stopped":
        assert caller.stop.received is not None
        caller.say(
            f"stopped by {caller.stop.received.name} with {len(file.texts)} of {len(keys)} rows in {file.path}. "
            "The same command continues."
        )
        return Outcome("stopped", file.texts, caller.stop.exit_code, file.task)
    if status == "nonfinite":
        return Outcome("nonfinite", file.texts, NONFINITE_EXIT, file.task)
    file.finish()
    return Outcome("done", file.texts, 0, file.task)


def write_rows(
    writer: Writer,
    file: Completions,
    schedule: Iterable[Sequence[Key]],
    total: int,
    caller: Caller,
    costs: Costs | None = None,
) -> Literal["done", "stopped", "nonfinite"]:
    """Write what the file lacks of each batch in `schedule`, computing the whole batch; load the model when first
    needed.

    The schedule may depend on what is in the file, batch after batch. A batch is computed anew as well where its costs
    are not on record, which is the case if the process was killed just after writing its rows.
    """
    from equipoise.policy.sample import NonFiniteLogits

    started = False
    for batch in schedule:
        missing = [key for key in batch if key not in file.texts]
        unpriced = costs.unpriced.intersection(batch) if costs else set()
        if not missing and not unpriced:
            continue
        try:
            if not started:
                _start(writer, file, caller.say, costs)
                caller.progress(len(file.texts), total)
                started = True
            if caller.stop.received is not None:
                return "stopped"
            began = time.perf_counter()
            written = writer(batch, caller.say)
        except NonFiniteLogits as error:
            caller.say(
                f"stopped: {error}. The {len(file.texts)} rows written so far are kept. Try --dtype float32 with "
                "another --output; if that fails too, the weights are damaged: go back to an earlier checkpoint."
            )
            return "nonfinite"
        seconds = time.perf_counter() - began
        file.append({key: written[key].text for key in missing})
        if costs is not None:
            priced = [*missing, *unpriced]
            costs.add(seconds, {key: written[key] for key in priced})
        caller.progress(len(file.texts), total)
    return "done"


def _start(writer: Writer, file: Completions, say: Callable[[str], None], costs: Costs | None) -> None:
    for line in writer.notices:
        say(line)
    say(writer.describe())
    began = time.perf_counter()
    writer.load(say)
    if costs is not None:
        costs.load_seconds += time.perf_counter() - began
    _begin(file, say)


def _begin(file: Completions, say: Callable[[str], None]) -> None:
    from equipoise.runs.records import provenance

    if file.repaired:
        say(f"removing half a row ({file.repaired} bytes) from the end of {file.path}")
    file.start(provenance())


def batches(keys: Sequence[Key], size: int) -> Iterator[Sequence[Key]]:
    for first in range(0, len(keys), size):
        yield keys[first : first + size]


def check_trained(model: str) -> None:
    """Raises UserError, with the command that mends it, where training left no model or an unfinished one."""
    folder = Path(model).expanduser()
    if any(folder.glob("*.safetensors")):
        return
    if (folder / "run.json").exists() or (folder / "training_metrics.csv").exists():
        raise UserError(f"training in {model} has not finished: run python train_rlhf.py again to continue it")
    if folder == Path(TRAINED) and not (folder / "config.json").exists():
        raise UserError(
            f"there is no model in {model} yet: train it first with python train_rlhf.py, or name another with --model"
        )


def tell_of_batch(received: signal.Signals) -> None:
    # As the signal module's own notice, a bare write: `print` may not be re-entered.
    with contextlib.suppress(OSError):
        os.write(
            2, f"\n{received.name} received: finishing this batch. Press Ctrl-C again to stop without it.\n".encode()
        )
