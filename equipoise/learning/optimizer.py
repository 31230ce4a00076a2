"""Adam on float32 masters of parameters that may be used in bfloat16, with a non-finite guard and gradient clipping.

A step of 1e-5 is lost in the rounding of a bfloat16 weight; the master keeps it. All parameters of a group share one
buffer, and so do their gradients: a step is then a handful of kernels, however many adapters there are, and the
addresses never change, as CUDA graphs need.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equipoise.errors import NonFiniteError
from equipoise.learning.flat import FlatGroup, host_copy
from equipoise.policy.load import Policy
from equipoise.runs.pieces import PieceSum, tree_sum
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.runs.tensors import Deferred, is_finite

VALUE_HEAD = "value_head."


class Slot(NamedTuple):
    """One of the vectors that are kept of a group."""

    kind: str
    """`policy` or `value`."""
    suffix: str
    """Behind a parameter's name: nothing for the masters, `.exp_avg`, `.exp_avg_sq`, `.average`."""


Asked = tuple[Slot, str]
"""A parameter's part of a vector."""
Saved = Tensor | Deferred
CHUNK = 1 << 24
"""Numbers that are added at a time: a CPU copies them to 64 bits first."""


class MasterAdam:
    """`accumulate()` between the backward passes of one step, then `step()`; names are those of `Policy.trained()`.

    On a GPU a step is one kernel for each group. Takes the parameters over: their data and gradients become views of
    its buffers, so gradients are never set to None.

    Of several `ranks`, all of which call everything alike, each holds masters and moments whole; `sharded`, a slice of
    them. Weights and gradients are whole on each in both cases, the weights being rank 0's from the beginning.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        average: float = 0.0,
        ranks: Ranks = ALONE,
        sharded: bool = False,
    ) -> None:
        """`average`: decay of a moving average of the policy's weights; 0 for none."""
        self.ranks, self.sharded = ranks, sharded and ranks.size > 1
        value = {name: p for name, p in parameters.items() if name.startswith(VALUE_HEAD)}
        policy = {name: p for name, p in parameters.items() if name not in value}
        kinds = (("policy", policy), ("value", value))
        self.groups = {name: FlatGroup(ps, ranks, self.sharded) for name, ps in kinds if ps}
        self.adam = torch.optim.Adam(
            [{"params": [group.master]} for group in self.groups.values()], lr=0.0, betas=betas, eps=eps, fused=True
        )
        self.decay = average
        self.average = self.groups["policy"].master.detach().clone() if average and "policy" in self.groups else None

    def release(self) -> None:
        """Give back the memory of masters and moments, before another optimizer takes the parameters over."""
        self.groups.clear()
        self.adam.state.clear()
        self.adam.param_groups.clear()
        self.average = None

    def set_learning_rates(self, policy: float, value: float) -> None:
        rates = {"policy": policy, "value": value}
        for name, group in zip(self.groups, self.adam.param_groups, strict=True):
            group["lr"] = rates[name]

    def accumulate(self) -> None:
        """Put the parameters' gradients aside, in float32, so that those of another micro-batch can be added."""
        for group in self.groups.values():
            if group.grads.dtype != torch.float32:
                group.sum = torch.zeros_like(group.grads, dtype=torch.float32) if group.sum is None else group.sum
                group.total()

    def take(self) -> Tensor:
        """All gradients of all groups since the last step, one float32 vector of its own; none are left."""
        flat = torch.cat([group.total().float() for group in self.groups.values()])
        self.zero_grad()
        return flat

    def put(self, flat: Tensor) -> None:
        """Inverse of `take`."""
        for group, part in zip(self.groups.values(), flat.split(self._sizes()), strict=True):
            if group.grads.dtype == torch.float32 and group.sum is None:
                group.grads.copy_(part)
            else:
                group.sum = torch.empty_like(group.grads, dtype=torch.float32) if group.sum is None else group.sum
                group.sum.copy_(part)

    def _sizes(self) -> list[int]:
        return [group.grads.numel() for group in self.groups.values()]

    def set_aside(self, pieces: PieceSum) -> None:
        """The gradients since the last step are those of a whole piece. A single one that each rank has of sharded
        states stays where it is: it can be added up from there, and its copy in float32 would be larger than the model.
        """
        if not (self.sharded and len(self.ranks.mine) == 1):
            pieces.add(self.take())

    def add_up(self, pieces: PieceSum) -> None:
        """Have the gradients of the next step be the sum over the pieces of all ranks, each of which set its own
        aside."""
        if not self.sharded:
            flat = pieces.total()
            if self.ranks.tensor > 1:
                self._add_up_layers(flat)
            self.put(flat)
            return
        parts = zip(*(vector.split(self._sizes()) for vector in pieces.own), strict=True) if pieces.own else ()
        for group, own in zip(self.groups.values(), parts or [None] * len(self.groups), strict=True):
            group.shards.add_up([group.total()] if own is None else own, into=group.grads)

    def _add_up_layers(self, flat: Tensor) -> None:
        """Where layers are shared each process knows a part of the adapters' gradients, and all of the value head's."""
        for kind, part in zip(self.groups, flat.split(self._sizes()), strict=True):
            if kind == "value":
                self.ranks.share_(part)
            elif part.is_cuda:
                self.ranks.reduce_(part)
            else:
                part.copy_(tree_sum(self.ranks.gather(part)))

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """Whatever is done inside, the gradients are afterwards what they were."""
        kept = [group.grads.clone() if group.grads.any() else None for group in self.groups.values()]
        yield
        for group, grads in zip(self.groups.values(), kept, strict=True):
            group.grads.zero_() if grads is None else group.grads.copy_(grads)

    def norms(self) -> Tensor:
        """(groups,) norms of the gradients that the next step is taken with, the policy's first."""
        return torch.stack([group.norm() for group in self.groups.values()])

    def step(self, max_norm: float, norms: Sequence[float] | None = None) -> float:
        """Clip to `max_norm` and step. Returns the policy's norm before clipping, nan where a norm is not finite, and
        then nothing is changed. The value head is clipped by itself: its gradient is larger and would scale the
        policy's away. `norms`, where the caller has read them already, saves waiting for the device."""
        norms = self.norms().tolist() if norms is None else norms
        finite = all(map(math.isfinite, norms))
        if finite:
            for group, norm, options in zip(self.groups.values(), norms, self.adam.param_groups, strict=True):
                clip = max_norm / norm if norm > max_norm else 1.0
                if group.buffer.is_cuda:
                    self._step_at_once(group, torch.full((), clip, device=group.buffer.device), options["lr"])
                else:
                    group.master.grad = group.gradient().mul_(clip)
            if not group.buffer.is_cuda:
                self.adam.step()
            if self.sharded or not group.buffer.is_cuda:
                self.copy_masters_to_model()
        self.zero_grad()
        return norms[0] if finite else math.nan

    @torch.no_grad()
    def step_where(self, allowed: Tensor, norms: Tensor, max_norm: float) -> None:
        """`step` as the device decides, for which nobody waits: nothing changes where `allowed` (), bool, is False or
        one of the norms (groups,) is not finite. It counts as a step until `take_back`, and leaves no gradients, taken
        or not. Not for sharded states."""
        norms = norms.double()
        clips = torch.where(norms > max_norm, max_norm / norms, 1.0)
        clips = torch.where(allowed & norms.isfinite().all(), clips, -1.0).float()
        if not clips.is_cuda:
            if bool(clips.min() >= 0):
                self.step(max_norm, norms.tolist())
            else:
                self._count(1)
                self.zero_grad()
            return
        for group, clip, options in zip(self.groups.values(), clips, self.adam.param_groups, strict=True):
            self._step_at_once(group, clip, options["lr"])

    def take_back(self) -> None:
        """Do not count a `step_where` that changed nothing."""
        self._count(-1)

    def _count(self, more: int) -> None:
        for group in self.groups.values():
            self._moments(group)["step"] += more

    @torch.no_grad()
    def _step_at_once(self, group: FlatGroup, clip: Tensor, rate: float) -> None:
        """What `adam.step` and `copy_masters_to_model` do, on the state that `adam` would have, but for a count on the
        CPU, and for `copy_masters_to_model` of sharded states."""
        from equipoise.policy.kernels.adam import adam

        state = self._moments(group)
        state["step"] += 1
        used = group.buffer if not self.sharded and not group.in_place else None
        for place, gradient in group.gradients():
            adam(
                group.master[place], state["exp_avg"][place], state["exp_avg_sq"][place], gradient, used,
                step=int(state["step"]), clip=clip, rate=rate,
                betas=self.adam.defaults["betas"], eps=self.adam.defaults["eps"],
            )  # fmt: skip

    def _moments(self, group: FlatGroup) -> dict[str, Tensor]:
        """Those of `adam`, zeros before the first step."""
        state: dict[str, Tensor] = self.adam.state[group.master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(group.master), torch.zeros_like(group.master)
        return state

    def copy_masters_to_model(self) -> None:
        """Copy the masters into the parameters the model computes with."""
        for group in self.groups.values():
            group.use(group.master)

    @torch.no_grad()
    def update_average(self, steps: int) -> None:
        """Move the average towards the weights as they are after `steps` updates of it, this one included.

        The decay is min(decay, (1 + n) / (10 + n)) as in TensorFlow's ExponentialMovingAverage: a short run's average
        does not remain at the weights it began with.
        """
        if self.average is not None:
            self.average.lerp_(self.groups["policy"].master, 1 - min(self.decay, (1 + steps) / (10 + steps)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the average, where there is one; afterwards with its weights again."""
        if self.average is None:
            yield
            return
        group = self.groups["policy"]
        kept = group.master.clone() if group.in_place else group.master
        group.use(self.average)
        try:
            yield
        finally:
            group.use(kept)

    def zero_grad(self) -> None:
        for group in self.groups.values():
            group.grads.zero_()
            if group.sum is not None:
                group.sum.zero_()

    def _vectors(self) -> dict[Slot, Tensor]:
        """What a checkpoint holds, but for counts: slices where states are sharded."""
        found = {Slot(kind, ""): group.master.detach() for kind, group in self.groups.items()}
        for kind, group in self.groups.items():
            moments = self.adam.state.get(group.master, {})
            found |= {Slot(kind, f".{name}"): value for name, value in moments.items() if name != "step"}
        if self.average is not None:
            found[Slot("policy", ".average")] = self.average
        return found

    def state(
        self, copied: bool = False, ask: Callable[[Asked], Tensor | None] | None = None
    ) -> tuple[dict[str, Saved], dict[str, Saved]]:
        """(weights, moments): the masters by name, and Adam's `{name}.exp_avg`, `.exp_avg_sq` and `{group}.step`; with
        the moments, `{name}.average`. `copied`: on the CPU, in memory of their own.

        Sharded states are gathered one by one, when they are read: for rank 0, which `ask`s for them, all ranks giving
        `reply`, as in `Ranks.first_asks`."""
        take = host_copy if copied else lambda flat: flat
        saved: dict[str, dict[str, Saved]] = {"weights": {}, "moments": {}}
        for kind, group in self.groups.items():
            if group.master in self.adam.state:
                saved["moments"][f"{kind}.step"] = take(self.adam.state[group.master]["step"])
        for slot, vector in self._vectors().items():
            group, part = self.groups[slot.kind], saved["moments" if slot.suffix else "weights"]
            if not self.sharded:
                part |= {f"{name}{slot.suffix}": x for name, x in group.split(take(vector)).items()}
                continue
            assert ask is not None, "sharded states are gathered by all ranks together"
            for name, shape in group.shapes.items():
                part[f"{name}{slot.suffix}"] = Deferred(shape, vector.dtype, partial(_gathered, ask, (slot, name)))
        if copied and torch.cuda.is_available():
            torch.cuda.synchronize()
        return saved["weights"], saved["moments"]

    def reply(self, asked: Asked) -> Tensor | None:
        """On rank 0, what was asked for, flat and on the CPU; all ranks call it together."""
        slot, name = asked
        group = self.groups[slot.kind]
        return group.shards.collect(self._vectors()[slot], *group.places[name])

    def check_finite(self) -> None:
        """Raises NonFiniteError where this rank's slice of sharded states is not; others are looked at when they are
        saved."""
        for slot, vector in self._vectors().items() if self.sharded else ():
            if not is_finite(vector):
                what = slot.suffix.removeprefix(".") or "weights"
                raise NonFiniteError(f"the {what} of the {slot.kind} hold a NaN or an infinity; nothing was saved")

    def digest(self) -> int:
        """64 bits that change with any bit of the masters, or of the weights in use where those are sharded."""
        held = [g.buffer if self.sharded else g.master.detach() for g in self.groups.values()]
        bits = [x.view(torch.int32 if x.element_size() == 4 else torch.int16) for x in held]
        return sum(int(part.sum(dtype=torch.int64)) for x in bits for part in x.split(CHUNK)) % 2**63

    @torch.no_grad()
    def load_state(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, for all ranks from what rank 0 is given. Raises KeyError, on all, when a parameter is
        missing."""
        steps = self.ranks.first_does(lambda: self._steps_of(weights, moments))
        self.adam.state.clear()
        for kind, step in steps.items():
            self._moments(self.groups[kind])["step"].fill_(step)
        for slot, vector in self._vectors().items():
            group, saved = self.groups[slot.kind], moments if slot.suffix else weights
            for name, (start, end) in group.places.items():
                numbers = saved[f"{name}{slot.suffix}"].reshape(-1) if self.ranks.first else None
                group.shards.deal(numbers, vector, start, end)
            if not self.sharded:
                self.ranks.share_(vector)
        self.copy_masters_to_model()

    def _steps_of(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, float]:
        """The step counts of the groups that have been moved. Raises KeyError unless all there must be is there."""
        steps = {kind: float(moments[f"{kind}.step"]) for kind in self.groups if f"{kind}.step" in moments}
        for kind, group in self.groups.items():
            suffixes = [".exp_avg", ".exp_avg_sq"] if kind in steps else []
            suffixes += [".average"] if kind == "policy" and self.average is not None else []
            for name, shape in group.shapes.items():
                for found in (weights[name], *(moments[f"{name}{suffix}"] for suffix in suffixes)):
                    assert found.shape == shape, (name, found.shape, shape)
        return steps


def adam_for(policy: Policy, ranks: Ranks, *, eps: float, average: float = 0.0) -> MasterAdam:
    """Adam on all that a policy trains, as its weights are now. It moves them, so that whatever was recorded of the
    policy is forgotten: it would go on reading the weights where they were.

    The states of a fully trained model are sharded among the ranks; those of adapters are small."""
    policy.forget_recordings()
    full = policy.reference is not None
    return MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=eps, average=average, ranks=ranks, sharded=full)


def _gathered(ask: Callable[[Asked], Tensor | None], asked: Asked) -> Tensor:
    found = ask(asked)
    assert found is not None, "only rank 0 asks"
    return found
