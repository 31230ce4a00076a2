"""What happens after a step in which something was not finite."""

import torch

from equipoise.ppo.optimizer import MasterAdam
from equipoise.ppo.run import Run
from equipoise.ppo.state import State

NONFINITE_EXIT = 3
MAX_NONFINITE = 3  # steps in a row before a rollback, and again before giving up


def recover(run: Run, optimizer: MasterAdam, state: State, problem: str) -> bool:
    """After a non-finite step: go on, roll back to the last checkpoint once, then give up (False)."""
    state.skipped += 1
    state.bad_in_a_row += 1
    if state.bad_in_a_row < MAX_NONFINITE:
        return True
    checkpoint = run.newest()
    if checkpoint is not None and state.rollbacks == 0:
        skipped = state.skipped
        run.restore(checkpoint, optimizer, state)
        state.skipped, state.rollbacks, state.bad_in_a_row = skipped, 1, 0
        # The same random numbers would lead to the same place.
        state.generator.manual_seed(int(torch.randint(2**62, (1,), generator=state.generator)))
        run.log.rewind(state.step)
        run.log.event(state.step, "rollback", to=checkpoint.path.name, because=problem)
        return True
    where = (
        f"the last checkpoint, {checkpoint.path.name}, is intact" if checkpoint else "no checkpoint had been written"
    )
    run.log.event(state.step, "gave_up", because=problem)
    run.log.say(
        f"stopped: {MAX_NONFINITE} steps in a row were not finite ({problem}); {where}. The batches are in "
        f"{run.config.run.checkpoint_dir}/nonfinite. Try --dtype float32, or a smaller --learning-rate in a new run."
    )
    return False
