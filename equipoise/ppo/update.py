"""One PPO update: epochs over shuffled mini-batches, `target_kl` tested before every optimizer step.

Shapes as in `maths`: B completions, T steps, N real tokens laid flat.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import Pack, Room, pack, packs, room_for, score, score_pack
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
    value_loss: float
    grad_norm: float
    nonfinite: str | None
    """What was not finite, where something was; the parameters are as they were before that optimizer step."""


def mini_batches(config: PPOConfig, generator: torch.Generator) -> list[Tensor]:
    """Row numbers of every optimizer step of one PPO step: each epoch visits all rows once, in an order of its own."""
    orders = [torch.randperm(config.batch_size, generator=generator) for _ in range(config.ppo_epochs)]
    return [rows for order in orders for rows in order.split(config.mini_batch_size)]


@dataclass
class Update:
    """Up to len(batches) optimizer steps on one experience. Stops, before stepping, at the first mini-batch whose KL
    exceeds target_kl, and at anything non-finite.

    `launch` begins the first mini-batch, at which a GPU is then at work while the host does something else; `finish`
    waits for it and takes all the steps.
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
    kl_price: float = 0.0
    """Price of a nat of the exact KL to the reference, in units of whitened advantages; with --kl-in reward unused."""
    _ahead: "dict[tuple[int, int], list[list[Part]]]" = field(default_factory=dict)
    _launched: list[Tensor] = field(default_factory=list)
    """Of each mini-batch begun, on the device: `STATS`, then the gradient norms of policy and value head."""

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
        """((own pieces, 5) `STATS`, their gradients). A single piece's gradients stay where they are."""
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
        tokens = int(self.experience.rollout.lengths_B[self.batches[number]].sum())
        return [
            _lay_out(self.policy, self.experience, pieces[own], rows_at_once, self.packed, self._weights(tokens), room)
            for own in self.ranks.mine
        ]

    def _weights(self, tokens: int) -> tuple[float, ...]:
        """Of each token of a mini-batch with so many: in the means, and of the exact KL where that is in the loss."""
        return (1 / tokens,) if self.config.kl_in == "reward" else (1 / tokens, self.kl_price / tokens)

    def _room(self, pieces: Sequence[Tensor]) -> Room | None:
        """One shape for all pieces, so that no rank waits for another that records a new one."""
        if len(pieces) == 1 or not self.packed or not self.policy.graphs.enabled:
            return None
        return room_for([self.experience.rollout.select(rows) for rows in pieces])

    def finish(self) -> UpdateStats:
        """Take the optimizer steps; leaves no gradients."""
        seen: list[dict[str, float]] = []
        update_kl, early_stop, nonfinite = 0.0, False, None
        for number in range(len(self.batches)):
            if number == len(self._launched):
                self.launch()
            *values, policy_norm, value_norm = self._launched[number].tolist()
            stats = dict(zip(STATS, values, strict=True))
            if bad := [f"{name} is {value}" for name, value in stats.items() if not math.isfinite(value)]:
                nonfinite = bad[0]
                break
            update_kl = max(update_kl, stats["kl"])
            if stats["kl"] > self.config.target_kl:
                early_stop = True
                break
            grad_norm = self.optimizer.step(self.config.max_grad_norm, (policy_norm, value_norm))
            if not math.isfinite(grad_norm):
                nonfinite = f"gradient norm is {policy_norm} (value head {value_norm})"
                break
            seen.append({**stats, "grad_norm": grad_norm})
        self.optimizer.zero_grad()
        return _summed_up(seen, update_kl, early_stop, nonfinite)


def _summed_up(
    seen: Sequence[Mapping[str, float]], update_kl: float, early_stop: bool, nonfinite: str | None
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
        value_loss=mean("value_loss"),
        grad_norm=mean("grad_norm"),
        nonfinite=nonfinite,
    )


STATS = ("policy_loss", "value_loss", "kl", "clip_fraction", "log_ratio_max")


class Part(NamedTuple):
    """A micro-batch on the device. (N,) tensors, `weight` and `kl_weight` 0 for spare tokens; `weight` is 1 / tokens of
    the whole mini-batch, so that cutting it into micro-batches changes nothing."""

    source: Pack | Rollout
    old_logp: Tensor
    old_values: Tensor
    returns: Tensor
    advantages: Tensor
    weight: Tensor
    kl_weight: Tensor | None = None
    """`weight` times the price of a nat; None where the loss has no KL."""

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self[1:] if x is not None)


def _lay_out(
    policy: Policy,
    experience: Experience,
    rows: Tensor,
    rows_at_once: int,
    packed: bool,
    weights: Sequence[float],
    room: Room | None,
) -> list[Part]:
    mask_BT = experience.rollout.mask_BT
    parts = []
    for micro in rows.split(rows_at_once):
        whole = experience.rollout.select(micro)
        groups = packs(policy, whole) if packed else None
        for group in groups or [torch.arange(len(micro))]:
            part = whole if len(group) == len(micro) else whole.select(group)
            source = pack(policy, part, room=room if part is whole else None) if groups is not None else part
            mask = mask_BT[micro[group]]
            columns = [x[micro[group]][mask] for x in experience[1:]]
            columns += [torch.full_like(columns[0], weight) for weight in weights]
            if isinstance(source, Pack):
                columns = [pad(x, (0, len(source.targets_N) - len(x))) for x in columns]
            parts.append(Part(source, *(x.to(policy.device, non_blocking=True) for x in columns)))
    return parts


def _backward(policy: Policy, optimizer: MasterAdam, part: Part, config: PPOConfig, temperature: float) -> Tensor:
    """Forward and backward over one micro-batch, gradients added up in the optimizer. (5,) `STATS`, on the device."""
    if isinstance(part.source, Pack):
        key = ("update", temperature, config.clip, config.value_clip, config.entropy_coef, config.kl_in)
        inputs = (*part.source, *part.columns)

        def function(*x: Tensor) -> tuple[Tensor]:
            return (
                _loss_and_gradients(policy, Pack(*x[: len(Pack._fields)]), x[len(Pack._fields) :], config, temperature),
            )

        if not policy.graphs.has(key, *inputs):
            with optimizer.gradients_kept():  # recording runs the function once, which adds to them
                policy.graphs.record(key, function, *inputs)
        (stats,) = policy.graphs(key, function, *inputs)
    else:
        stats = _loss_and_gradients(policy, part.source, part.columns, config, temperature)
    return stats.clone()


def _loss_and_gradients(
    policy: Policy, source: Pack | Rollout, columns: Sequence[Tensor], config: PPOConfig, temperature: float
) -> Tensor:
    old_logp, old_values, returns, advantages, weight, *kl_weight = columns
    entropy, exact = config.entropy_coef != 0, bool(kl_weight)
    if isinstance(source, Pack):
        new = score_pack(policy, source, temperature, reference=False, entropy=entropy, kl=exact)
        real = source.real_N
    else:
        new = score(policy, source, temperature, packed=False, entropy=entropy, kl=exact)
        real = weight > 0
    # A spare token's score is a number like any other: it is put to its old value, and weighs nothing.
    logprobs = torch.where(real, new.logprobs, 0.0)
    surrogate = maths.policy_loss(logprobs, old_logp, advantages, config.clip)
    value_loss = maths.value_loss(torch.where(real, new.values, 0.0), old_values, returns, config.value_clip)
    # The value head has a learning rate of its own and shares no weights, so its loss needs no coefficient.
    policy_sum, value_sum = (surrogate.loss * weight).sum(), (value_loss * weight).sum()
    loss = policy_sum + value_sum - config.entropy_coef * (new.entropies * weight).sum()
    (loss + (new.kl * kl_weight[0]).sum() if exact else loss).backward()
    kl = (maths.kl_k3(old_logp, logprobs.detach()) * weight).sum()
    clipped = (surrogate.clipped * weight).sum()
    return torch.stack([policy_sum.detach(), value_sum.detach(), kl, clipped, surrogate.log_ratio.abs().max()])


def _total(stats: Tensor) -> Tensor:
    """(n, 5) parts' statistics as their whole's: sums, and the largest log-ratio."""
    return torch.cat([stats[:, :-1].sum(0), stats[:, -1:].max(0).values])
