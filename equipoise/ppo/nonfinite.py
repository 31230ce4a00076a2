"""Where a non-finite value comes from: the failed batch once more, plainly, module by module.

No graphs, no packing, in the dtype of the run and once more in float32 where that differs. Reported is the first module
in the order of computation whose output is not finite although its inputs are, else the first parameter that is not
finite itself, else the first parameter (backwards, from the loss) whose gradient is not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import score
from equipoise.ppo import maths

if TYPE_CHECKING:
    from equipoise.ppo.config import TrainConfig

ROWS = 16  # completions looked at together; the batch is gone through in parts of that size


def locate(
    policy: Policy, rollout: Rollout | None, evidence: Mapping[str, Tensor], config: "TrainConfig"
) -> dict[str, Any]:
    """What was found: `where` in words, and for each dtype tried what happened there. The weights and the accumulated
    gradients are afterwards what they were.

    `evidence` is what the step kept: without `advantages` only the forward pass is looked at.
    """
    if "rewards" in evidence:
        return {"where": "the reward function"}
    temperature, clip = config.sampling.temperature, config.ppo.clip
    advantages_BT, old_logp_BT = evidence.get("advantages"), evidence.get("logprobs")
    broken = [name for name, p in policy.model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        return {"where": f"the parameter {broken[0]} is not finite itself", "parameters": broken[:10]}
    if rollout is None:
        return {"where": "all parameters are finite; the batch is not at hand"}
    found = {}
    for dtype in dict.fromkeys((policy.dtype, torch.float32)):
        name = str(dtype).removeprefix("torch.")
        try:
            with _gradients_set_aside(policy), _in_dtype(policy, dtype):
                for parameter in policy.trained().values():
                    parameter.grad = torch.zeros_like(parameter)
                found[name] = _first(policy, rollout, temperature, clip, advantages_BT, old_logp_BT)
        except Exception as error:  # too little memory for float32, say; a diagnosis must not end the run
            found[name] = f"could not be tried ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
    own = found[str(policy.dtype).removeprefix("torch.")]
    where = own or "not reproduced by a plain pass: look at what is special to the fast path"
    if own and len(found) > 1 and found["float32"] is None:
        where += "; finite in float32, so it is the range or rounding of the dtype"
    return {"where": where, "dtypes": found}


def _first(
    policy: Policy,
    rollout: Rollout,
    temperature: float,
    clip: float,
    advantages_BT: Tensor | None,
    old_logp_BT: Tensor | None,
) -> str | None:
    """The first origin in words; None where everything is finite."""
    for rows in torch.arange(len(rollout)).split(ROWS):
        part = rollout.select(rows)
        seen: list[str] = []
        with _observed(policy.model, seen.append):
            if advantages_BT is None or old_logp_BT is None:
                with torch.no_grad():
                    new = score(policy, part, temperature, packed=False, entropy=False)
            else:
                new = score(policy, part, temperature, packed=False, entropy=False)
        if seen:
            return f"the output of {seen[0]} (rows {int(rows[0])}–{int(rows[-1])}), its inputs being finite"
        for name, values in (("log-probabilities", new.logprobs), ("values", new.values)):
            if not bool(values.isfinite().all()):
                return f"the {name}, all modules' outputs being finite"
        if advantages_BT is None or old_logp_BT is None:
            continue
        mask = part.mask_BT
        old_N, advantages_N = (x[rows][mask].to(policy.device) for x in (old_logp_BT, advantages_BT))
        maths.policy_loss(new.logprobs, old_N, advantages_N, clip).loss.mean().backward()
        # Backwards through the model: the last module's parameters get their gradients first.
        for name, parameter in reversed(list(policy.model.named_parameters())):
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name} (rows {int(rows[0])}–{int(rows[-1])}), the forward pass being finite"
    return None


@contextmanager
def _observed(model: nn.Module, report: Callable[[str], None]) -> Iterator[None]:
    """Inside, every module reports its name when finite inputs give an output that is not; inner ones come first."""

    def hook(name: str) -> Any:
        def look(_module: nn.Module, inputs: Any, output: Any) -> None:
            if _finite(inputs) and not _finite(output):
                report(name)

        return look

    # Not only those without children: fused layers compute without calling theirs.
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_finite, value))
    return True


@contextmanager
def _in_dtype(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Inside, floating-point weights and buffers are of that dtype; afterwards the very same tensors are back."""
    if dtype == policy.dtype:
        yield
        return
    tensors = [*policy.model.parameters(), *policy.model.buffers()]
    kept = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype == policy.dtype]
    own = policy.dtype
    for t, data in kept:
        t.data = data.to(dtype)
    policy.dtype = dtype
    try:
        yield
    finally:
        policy.dtype = own
        for t, data in kept:
            t.grad = None  # of the other dtype
            t.data = data


@contextmanager
def _gradients_set_aside(policy: Policy) -> Iterator[None]:
    """The parameters' gradients are views of the optimizer's buffers, at addresses that must not change."""
    trained = policy.trained().values()
    kept = [(p, p.grad) for p in trained]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad
