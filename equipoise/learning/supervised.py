"""Supervised learning from compliant sentences: PPO's warm start, and supervised fine-tuning as a method of its own."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from equipoise.errors import NonFiniteError
from equipoise.learning.optimizer import MasterAdam, adam_for
from equipoise.learning.search import BATCH
from equipoise.policy.graphs import on_its_way
from equipoise.policy.load import Policy
from equipoise.policy.prompt import Tokenizer, continuation_ids, sentences_of
from equipoise.policy.rollout import Rollout, rollout_of
from equipoise.policy.score import Pack, pack, packs, score, score_pack
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import Task
from equipoise.runs.pieces import PieceSum
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.tables.layout import Columns, Form, arrange
from equipoise.tables.read import read_table


class Example(NamedTuple):
    """A sentence as the policy would have written it: `completion` are the tokens after `prompt`, its stop included."""

    occupation: str
    prompt: list[int]
    completion: list[int]
    text: str


class Row(NamedTuple):
    occupation: str
    text: str


@dataclass(frozen=True)
class Examples:
    """What a file of sentences holds for a policy, and how many of its rows are left out and why."""

    examples: list[Example]
    rows: int
    failing: int
    """Rows that do not satisfy the constraint."""
    foreign: int
    """Rows of other occupations, not beginning with the task's prefix, or of a text that the policy cannot write."""

    def describe(self) -> str:
        distinct = len({example.text for example in self.examples})
        line = f"{len(self.examples):,} of {plural(self.rows, 'row')} ({plural(distinct, 'different sentence')})"
        dropped = [(self.failing, "do not comply"), (self.foreign, "are not sentences of these occupations and model")]
        return line + "".join(f"; {count:,} {why}" for count, why in dropped if count)


class Sentences(NamedTuple):
    """What was read from a file."""

    rows: list[Row]
    notices: list[str]
    """What is odd in the file, and what was left out of it, a line each."""


def read_rows(
    path: Path, task: Task, columns: Columns | None = None, form: Form = "auto", encoding: str | None = None
) -> Sentences:
    """The sentences of a file in any layout that `equipoise evaluate` reads, in the same way. Raises UserError.

    `columns`, `form` and `encoding` are what options say of it; without `columns` there are no such options."""
    columns = columns or Columns(options=False)
    table = read_table(str(path), encoding, columns.given, columns.options)
    rows, layout, problems = arrange(table, 0, task, columns=columns, form=form, method=path.stem, seed="")
    said = [f"{path}: {layout.told(len(rows), methods=False, options=columns.options)}"]
    return Sentences(
        [Row(row.occupation, row.measured) for row in rows], said + [f"{path}: {each.message}" for each in problems]
    )


def examples_of(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    task: Task,
    prompts: Mapping[str, list[int]],
    stop_ids: Sequence[int],
    event: Event,
) -> Examples:
    """The rows that comply, spelt as the tokenizer does, each as often as it occurs.

    `prompts` maps occupations to token ids; rows of other occupations are left out."""
    rows = list(rows)
    complying = [row for row in rows if task.complies(row.text, event)]
    own = [row for row in complying if row.occupation in prompts and task.continuation(row.text, row.occupation)]
    found: dict[Row, Example] = {}
    if different := list(dict.fromkeys(own)):
        made = []
        for occupation, text in different:
            ids = continuation_ids(tokenizer, prompts[occupation], text.removeprefix(task.prefix(occupation)))
            made.append(Example(occupation, prompts[occupation], _ended(ids, tokenizer, stop_ids), text))
        spelt = sentences_of(tokenizer, as_rollout(made), [example.occupation for example in made], task)
        for row, example, text in zip(different, made, spelt, strict=True):
            if text == row.text and not set(example.completion[:-1]) & set(stop_ids):
                found[row] = example
    examples = [found[row] for row in own if row in found]
    return Examples(examples, len(rows), len(rows) - len(complying), len(complying) - len(examples))


def _ended(tokens: list[int], tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[int]:
    """The tokens with a stop at the end: their last one where it is a stop already, as after a `raw` prompt."""
    if tokens and tokens[-1] in stop_ids:
        return tokens
    end = tokenizer.eos_token_id
    return [*tokens, end if end in stop_ids else min(stop_ids)]


def as_rollout(examples: Sequence[Example]) -> Rollout:
    return rollout_of([e.prompt for e in examples], [e.completion for e in examples])


@dataclass(frozen=True)
class Supervision:
    """How sentences are learnt. The learning rate rises in equal steps over the first `warmup` (a share) of all steps
    and, with `decay`, falls linearly to 0 over the rest."""

    epochs: int
    learning_rate: float
    batch_size: int = BATCH
    """Sentences of one optimizer step."""
    warmup: float = 0.0
    decay: bool = False


class Loss(NamedTuple):
    """Mean cross-entropy of one epoch, nats per completion token, the stop token included. `training` is the mean while
    the weights moved; `held_out` is at the end of the epoch, None where nothing is held out."""

    training: float
    held_out: float | None


def supervise(
    policy: Policy,
    examples: Sequence[Example],
    generator: torch.Generator,
    how: Supervision,
    *,
    packed: bool,
    say: Callable[[str], None],
    held_out: Sequence[Example] = (),
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> list[Loss]:
    """Minimise the token-mean cross-entropy of the completions, with an optimizer of its own, the pieces of a batch
    being dealt out to the ranks. The mean of each epoch.

    `check` is called after every optimizer step, and may raise to end it. Raises NonFiniteError where a loss is not
    finite.
    """
    batch_size, epochs = how.batch_size, how.epochs
    optimizer = adam_for(policy, ranks, eps=1e-8)
    steps = epochs * -(-len(examples) // batch_size)
    rising = round(how.warmup * steps)
    losses: list[Loss] = []
    step = 0
    for epoch in range(epochs):
        taken = _Steps(optimizer, _unread(policy, ranks))
        total, count = torch.zeros((), dtype=torch.float64, device=policy.device), 0
        for rows in torch.randperm(len(examples), generator=generator).split(batch_size):
            rate = min(1.0, (step + 1) / (rising + 1))
            rate = min(rate, (steps - step) / max(1, steps - rising)) if how.decay else rate
            optimizer.set_learning_rates(how.learning_rate * rate, 0.0)
            batch = [examples[i] for i in rows.tolist()]
            total = total - _gradients(policy, optimizer, batch, packed, ranks)
            taken.take()
            count, step = count + sum(len(example.completion) for example in batch), step + 1
            check()
        training = float(total) / count
        held = cross_entropy(policy, held_out, packed=packed, ranks=ranks) if held_out else None
        losses.append(Loss(training, held))
        line = f"epoch {epoch + 1} of {epochs}, {training:.3f} nats per token"
        line = line if held is None else f"{line}, {held:.3f} held out"
        if left_out := taken.left_out():
            line += f"; {plural(left_out, 'batch', 'batches')} left out, their gradients are not finite"
        say(line)
        if not torch.isfinite(torch.tensor([training, held or 0.0])).all():
            raise NonFiniteError("the cross-entropy is not finite: try a smaller learning rate, or --dtype float32")
    if ranks.size > 1:
        ranks.agree(step, optimizer.digest())
    return losses


def _unread(policy: Policy, ranks: Ranks) -> bool:
    """Whether the device decides on steps by itself, so that the host need not wait for it."""
    return policy.device.type == "cuda" and ranks.size == 1


class _Steps:
    """Optimizer steps, and how many were not taken since a gradient was not finite. `unread`: that is looked at when
    the next step has been given."""

    def __init__(self, optimizer: MasterAdam, unread: bool) -> None:
        self.optimizer, self.unread = optimizer, unread
        self._norms: Callable[[], list[float]] | None = None
        self._left_out = 0

    def take(self) -> None:
        if not self.unread:
            self._left_out += math.isnan(self.optimizer.step(1.0))
            return
        norms = self.optimizer.norms()
        self.optimizer.step_where(torch.ones((), dtype=torch.bool, device=norms.device), norms, 1.0)
        before, self._norms = self._norms, on_its_way(norms)
        self._look_at(before)

    def left_out(self) -> int:
        """So far; waits for the last."""
        before, self._norms = self._norms, None
        self._look_at(before)
        return self._left_out

    def _look_at(self, norms: Callable[[], list[float]] | None) -> None:
        if norms is not None and not all(map(math.isfinite, norms())):
            self._left_out += 1
            self.optimizer.take_back()


def _gradients(
    policy: Policy, optimizer: MasterAdam, batch: Sequence[Example], packed: bool, ranks: Ranks
) -> torch.Tensor:
    """Those of the token-mean cross-entropy of a batch, left in the optimizer. The sum of its log-probabilities."""
    tokens = sum(len(example.completion) for example in batch)
    pieces, sums, gradients = ranks.runs(torch.arange(len(batch))), [], PieceSum(ranks)
    for piece in ranks.mine:
        part = [batch[i] for i in pieces[piece].tolist()]
        sums.append(torch.zeros((), device=policy.device))
        if part:  # the last batch of an epoch may have fewer sentences than there are pieces
            sums[-1] = _backward(policy, optimizer, as_rollout(part), tokens, packed)
        if ranks.adds_up:
            optimizer.set_aside(gradients)
    if ranks.adds_up:
        optimizer.add_up(gradients)
    return ranks.of_all_pieces(torch.stack(sums)).sum()


def _backward(policy: Policy, optimizer: MasterAdam, rollout: Rollout, tokens: int, packed: bool) -> torch.Tensor:
    """The gradients of some of a batch's sentences, of which all have so many tokens; the sum of their
    log-probabilities."""
    groups = packs(policy, rollout) if packed and policy.graphs.enabled else None
    if groups is None or len(groups) > 1:
        logprobs = score(policy, rollout, 1.0, packed=packed, entropy=False).logprobs
        (-(logprobs.sum() / tokens)).backward()
        return logprobs.detach().sum()
    batch = pack(policy, rollout)
    inputs = (*batch, torch.full((1,), 1 / tokens, device=policy.device))

    def function(*given: torch.Tensor) -> tuple[torch.Tensor]:
        source, weight = Pack(*given[:-1]), given[-1]
        found = score_pack(policy, source, 1.0, reference=False, entropy=False).logprobs
        total = torch.where(source.real_N, found, 0.0).sum()
        (-(total * weight).sum()).backward()
        return (total.detach(),)

    if not policy.graphs.has("supervised", *inputs):
        with optimizer.gradients_kept():  # recording runs the function once, which adds to them
            policy.graphs.record("supervised", function, *inputs)
    (total,) = policy.graphs("supervised", function, *inputs)
    return total.clone()


@torch.no_grad()
def cross_entropy(policy: Policy, examples: Sequence[Example], *, packed: bool, ranks: Ranks = ALONE) -> float:
    """Nats per completion token, the stop token included; batches are dealt out to the ranks."""

    def summed(part: Sequence[Example]) -> tuple[float, int]:
        packs = packed and not policy.graphs.enabled
        logprobs = score(policy, as_rollout(part), 1.0, packed=packs, entropy=False).logprobs
        return float(logprobs.sum(dtype=torch.float64)), len(logprobs)

    parts = [examples[first : first + BATCH] for first in range(0, len(examples), BATCH)]
    total, count = 0.0, 0
    for logprob, tokens in ranks.deal(parts, summed):
        total, count = total - logprob, count + tokens
    return total / count
