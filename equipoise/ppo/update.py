"""One PPO update: epochs over shuffled mini-batches, `target_kl` tested before every optimizer step.

Shapes as in `maths`: B completions, T steps, N real tokens laid flat.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.algorithms import Algorithm
from equipoise.policy.graphs import on_its_way, sent
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.rollout import Rollout
from equipoise.policy.rooms import Room
from equipoise.policy.score import Pack, pack, packs, room_for, score, score_pack
from equipoise.ppo import maths
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Experience
from equipoise.runs.pieces import PieceSum
from equipoise.runs.ranks import ALONE, Ranks


class UpdateStats(NamedTuple):
    update_kl: float
    updates: int
    early_stop: bool
    ratio_max: float
    clip_fraction: float
    policy_loss: float
    value_loss: float | None
    """None without a value head."""
    grad_norm: float
    nonfinite: str | None
    """What was not finite, where something was; the parameters are as they were before that optimizer step."""
    kl_loss: float | None = None
    """None where the KL to the reference is not in the loss."""


def mini_batches(config: PPOConfig, generator: torch.Generator) -> list[Tensor]:
    """Row numbers of every optimizer step of one PPO step: each epoch visits all rows once, in an order of its own."""
    orders = [torch.randperm(config.batch_size, generator=generator) for _ in range(config.ppo_epochs)]
    return [rows for order in orders for rows in order.split(config.mini_batch_size)]


@dataclass
class Update:
    """Up to len(batches) optimizer steps on one experience. Stops, before stepping, at the first mini-batch whose KL
    exceeds target_kl, and at anything non-finite.

    `begin` gives a GPU the first mini-batches, at which it is then at work while the host does something else; `finish`
    takes all the steps.
    """

    policy: Policy
    optimizer: MasterAdam
    experience: Experience
    batches: Sequence[Tensor]
    """Row numbers of each mini-batch."""
    config: PPOConfig
    temperature: float
    packed: bool
    limit: RowLimit
    ranks: Ranks = ALONE
    _ahead: "dict[tuple[int, int], list[list[Part]]]" = field(default_factory=dict)
    _launched: list[Tensor] = field(default_factory=list)
    """Of each mini-batch begun, on the device: `STATS`, then the gradient norms of policy and value head."""
    _reads: list[Callable[[], list[float]]] = field(default_factory=list)
    """What waits for these numbers."""

    def launch(self) -> None:
        """Begin the next mini-batch: its gradients, and the layout of the one after it."""
        number = len(self._launched)

        def gradients(rows_at_once: int) -> tuple[Tensor, PieceSum]:
            return self._gradients(self._parts(number, rows_at_once))

        with self.ranks.by_itself():  # where memory does not suffice, one tries again while the others wait
            stats, summed = self.limit.run(self.policy, gradients, undo=self.optimizer.zero_grad)
        if self.ranks.adds_up:
            self.optimizer.add_up(summed)
            stats = self.ranks.of_all_pieces(stats)
        self._launched.append(torch.cat([_total(stats), self.optimizer.norms()]))
        if number + 1 < len(self.batches):
            # Laid out while the GPU works: reading the numbers waits for it, once per optimizer step.
            self._ahead[number + 1, self.limit.rows] = self._parts(number + 1, self.limit.rows)

    def _gradients(self, pieces: "Sequence[Sequence[Part]]") -> tuple[Tensor, PieceSum]:
        """((own pieces, 6) `STATS`, their gradients). A single piece's gradients stay where they are."""
        stats, summed = [], PieceSum(self.ranks)
        for parts in pieces:
            sums = []
            for place, part in enumerate(parts):
                if place > 0:
                    self.optimizer.accumulate()
                sums.append(_backward(self.policy, self.optimizer, part, self.config, self.temperature))
            stats.append(_total(torch.stack(sums)))
            if self.ranks.adds_up:
                self.optimizer.set_aside(summed)
        return torch.stack(stats), summed

    def _parts(self, number: int, rows_at_once: int) -> "list[list[Part]]":
        """Of each of this rank's pieces its micro-batches."""
        if (number, rows_at_once) in self._ahead:
            return self._ahead.pop((number, rows_at_once))
        pieces = self.ranks.runs(self.batches[number])
        room = self._room(pieces) if len(pieces[0]) <= rows_at_once else None
        columns = columns_of(self.experience, self.batches[number], self.config.method)
        rollout, packed = self.experience.rollout, self.packed
        return [
            _lay_out(self.policy, rollout, columns, pieces[own], rows_at_once, packed, room) for own in self.ranks.mine
        ]

    def _room(self, pieces: Sequence[Tensor]) -> Room | None:
        """One shape for all pieces, so that no rank waits for another that records a new one."""
        if len(pieces) == 1 or not self.packed or not self.policy.graphs.enabled:
            return None
        return room_for([self.experience.rollout.select(rows) for rows in pieces])

    @property
    def unread(self) -> bool:
        """Whether the device decides on optimizer steps by itself. It then goes on with the next mini-batch while the
        host reads what it has decided."""
        return self.policy.device.type == "cuda" and self.ranks.size == 1

    def _decide(self, values: Tensor) -> Callable[[], list[float]]:
        """Have the device take the optimizer step where these values of a mini-batch allow it; what is called to wait
        for the values. In float64, as the host compares."""
        stats, norms = values.double().split([len(STATS), len(values) - len(STATS)])
        allowed = stats.isfinite().all() & (stats[STATS.index("kl")] <= self.config.target_kl)
        self.optimizer.step_where(allowed, norms, self.config.max_grad_norm)
        return on_its_way(values)

    def _give(self, number: int, kl: float = 0.0) -> None:
        """Give the device all it can be given while this mini-batch's numbers are not read; `kl`: of the one before it.

        The next one is in vain where this one exceeds target_kl, which is likely where the one before came near."""
        if number == len(self._launched):
            self.launch()
        if number < len(self._reads):
            return
        values = self._launched[number]
        self._reads.append(self._decide(values) if self.unread else values.tolist)
        if self.unread and number + 1 < len(self.batches) and kl <= self.config.target_kl / 2:
            self.launch()

    def begin(self) -> None:
        """Give a GPU something to do while the host does something else, before `finish`."""
        self._give(0)

    def finish(self) -> UpdateStats:
        """Take the optimizer steps; leaves no gradients."""
        seen: list[dict[str, float]] = []
        update_kl, early_stop, nonfinite, taken = 0.0, False, None, True
        for number in range(len(self.batches)):
            self._give(number, seen[-1]["kl"] if seen else 0.0)
            values, taken = self._reads[number](), False
            stats, norms = dict(zip(STATS, values[: len(STATS)], strict=True)), values[len(STATS) :]
            if bad := [f"{name} is {value}" for name, value in stats.items() if not math.isfinite(value)]:
                nonfinite = bad[0]
                break
            update_kl = max(update_kl, stats["kl"])
            if stats["kl"] > self.config.target_kl:
                early_stop = True
                break
            if not all(map(math.isfinite, norms)):
                head = f" (value head {norms[1]})" if len(norms) > 1 else ""
                nonfinite = f"gradient norm is {norms[0]}{head}"
                break
            if not self.unread:
                self.optimizer.step(self.config.max_grad_norm, norms)
            seen.append({**stats, "grad_norm": norms[0]})
            taken = True
        if self.unread and not taken:
            self.optimizer.take_back()
        self.optimizer.zero_grad()
        return _summed_up(self.config, seen, update_kl, early_stop, nonfinite)


def _summed_up(
    config: PPOConfig, seen: Sequence[Mapping[str, float]], update_kl: float, early_stop: bool, nonfinite: str | None
) -> UpdateStats:
    """The statistics of the optimizer steps that were taken."""

    def mean(key: str) -> float:
        return sum(s[key] for s in seen) / len(seen) if seen else 0.0

    return UpdateStats(
        update_kl=update_kl,
        updates=len(seen),
        early_stop=early_stop,
        ratio_max=math.exp(max((s["log_ratio_max"] for s in seen), default=0.0)),
        clip_fraction=mean("clip_fraction"),
        policy_loss=mean("policy_loss"),
        value_loss=mean("value_loss") if config.method.value_head else None,
        grad_norm=mean("grad_norm"),
        nonfinite=nonfinite,
        kl_loss=mean("kl_loss") if config.method.kl_in_loss else None,
    )


STATS = ("policy_loss", "value_loss", "kl_loss", "kl", "clip_fraction", "log_ratio_max")

Columns = dict[str, Tensor]
"""What the loss needs besides the scores, by name: (B, T) of the batch, or (N,) of a micro-batch on the device, there 0
for spare tokens.

old_logp, advantages, weight (1 / tokens of the whole mini-batch, so that cutting it into micro-batches changes
nothing); old_values and returns with a value head; share (1 / tokens of the completion / completions of the
mini-batch) where completions weigh alike; row (its number in the micro-batch) where a completion has one ratio;
reference and kl_weight (the coefficient times the token's weight) where the KL to the reference is in the loss. An
algorithm has no others than it uses.
"""


class Part(NamedTuple):
    """A micro-batch on the device."""

    source: Pack | Rollout
    columns: Columns


def columns_of(experience: Experience, rows: Tensor, method: Algorithm) -> Columns:
    """(B, T) columns for a mini-batch of these rows, but for `row`, which depends on how it is cut."""
    lengths_B, like = experience.rollout.lengths_B, experience.old_logp_BT
    weight_BT = torch.full_like(like, 1 / int(lengths_B[rows].sum()))
    columns = {"old_logp": like, "advantages": experience.advantages_BT, "weight": weight_BT}
    if experience.old_values_BT is not None and experience.returns_BT is not None:
        columns |= {"old_values": experience.old_values_BT, "returns": experience.returns_BT}
    if method.sentence_mean:
        columns["share"] = (1 / (lengths_B.to(like.dtype) * len(rows)))[:, None].expand_as(like)
    if experience.reference_BT is not None:
        columns |= {"reference": experience.reference_BT}
        columns["kl_weight"] = experience.kl_coef * columns.get("share", weight_BT)
    if experience.exact_price is not None:
        columns["exact_weight"] = experience.exact_price * weight_BT
    if method.whole_ratio:
        columns["row"] = torch.zeros(like.shape, dtype=torch.long)
    return columns


def _lay_out(
    policy: Policy,
    rollout: Rollout,
    columns: Columns,
    rows: Tensor,
    rows_at_once: int,
    packed: bool,
    room: Room | None,
) -> list[Part]:
    mask_BT = rollout.mask_BT
    parts = []
    for micro in rows.split(rows_at_once):
        whole = rollout.select(micro)
        groups = packs(policy, whole) if packed else None
        for group in groups or [torch.arange(len(micro))]:
            part = whole if len(group) == len(micro) else whole.select(group)
            source = pack(policy, part, room=room if part is whole else None) if groups is not None else part
            mask = mask_BT[micro[group]]
            own = {name: x[micro[group]][mask] for name, x in columns.items()}
            if "row" in own:
                own["row"] = torch.nonzero(mask)[:, 0]
            if isinstance(source, Pack):
                own = {name: pad(x, (0, len(source.targets_N) - len(x))) for name, x in own.items()}
            parts.append(Part(source, dict(zip(own, sent(list(own.values()), policy.device), strict=True))))
    return parts


def _backward(policy: Policy, optimizer: MasterAdam, part: Part, config: PPOConfig, temperature: float) -> Tensor:
    """Forward and backward over one micro-batch, gradients added up in the optimizer. (6,) `STATS`, on the device."""
    names = tuple(part.columns)
    if isinstance(part.source, Pack):
        key = ("update", temperature, config.clip, config.value_clip, config.entropy_coef, names)
        inputs = (*part.source, *part.columns.values())

        def function(*x: Tensor) -> tuple[Tensor]:
            source, columns = Pack(*x[: len(Pack._fields)]), dict(zip(names, x[len(Pack._fields) :], strict=True))
            return (_loss_and_gradients(policy, source, columns, config, temperature),)

        if not policy.graphs.has(key, *inputs):
            with optimizer.gradients_kept():  # recording runs the function once, which adds to them
                policy.graphs.record(key, function, *inputs)
        (stats,) = policy.graphs(key, function, *inputs)
    else:
        stats = _loss_and_gradients(policy, part.source, part.columns, config, temperature)
    return stats.clone()


def in_one_pass(logprobs: Tensor, columns: Columns) -> bool:
    """Whether a kernel computes losses and gradients: on a GPU, where no token's loss depends on others."""
    return logprobs.is_cuda and "exact_weight" not in columns and "row" not in columns


def _loss_and_gradients(
    policy: Policy, source: Pack | Rollout, columns: Columns, config: PPOConfig, temperature: float
) -> Tensor:
    old_logp, weight = columns["old_logp"], columns["weight"]
    share = columns.get("share", weight)
    entropy, exact = config.entropy_coef != 0, "exact_weight" in columns
    if isinstance(source, Pack):
        new = score_pack(policy, source, temperature, reference=False, entropy=entropy, kl=exact)
        real = source.real_N
    else:
        new = score(policy, source, temperature, packed=False, entropy=entropy, kl=exact)
        real = weight > 0
    if in_one_pass(new.logprobs, columns):
        from equipoise.policy.kernels.surrogate import Limits, surrogate

        limits = Limits(config.clip, config.value_clip, config.entropy_coef, maths.MAX_LOG_RATIO)
        found = surrogate(new.logprobs.detach(), new.values.detach(), real, columns, limits)
        pairs = ((new.logprobs, found.logprobs), (new.values, found.values), (new.entropies, found.entropies))
        slopes = [(x, slope) for x, slope in pairs if x.requires_grad]
        torch.autograd.backward([x for x, _ in slopes], [slope for _, slope in slopes])
        return found.stats
    # A spare token's score is a number like any other: it is put to its old value, and weighs nothing.
    logprobs = torch.where(real, new.logprobs, 0.0)
    losses = maths.policy_loss(logprobs, old_logp, columns["advantages"], config.clip, columns.get("row"))
    policy_sum = (losses.loss * share).sum()
    loss, value_sum, kl_sum = policy_sum, torch.zeros_like(policy_sum), torch.zeros_like(policy_sum)
    if "returns" in columns:
        old_values, values = columns["old_values"], torch.where(real, new.values, 0.0)
        value_loss = maths.value_loss(values, old_values, columns["returns"], config.value_clip)
        # The value head has a learning rate of its own and shares no weights, so its loss needs no coefficient.
        value_sum = (value_loss * weight).sum()
        loss = loss + value_sum
    if "reference" in columns:
        kl_sum = (maths.kl_k3(logprobs, columns["reference"]) * columns["kl_weight"]).sum()
        loss = loss + kl_sum
    if exact:
        loss = loss + (new.kl * columns["exact_weight"]).sum()
    (loss - config.entropy_coef * (new.entropies * weight).sum()).backward()
    kl = (maths.kl_k3(old_logp, logprobs.detach()) * weight).sum()
    clipped = (losses.clipped * share).sum()
    sums = [policy_sum.detach(), value_sum.detach(), kl_sum.detach(), kl, clipped]
    return torch.stack([*sums, losses.log_ratio.abs().max()])


def _total(stats: Tensor) -> Tensor:
    """(n, 6) parts' statistics as their whole's: sums, and the largest log-ratio."""
    if len(stats) == 1:
        return stats[0]
    return torch.cat([stats[:, :-1].sum(0), stats[:, -1:].max(0).values])
