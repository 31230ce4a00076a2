"""What happens after a step in which something was not finite, and after an alert."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from equipoise.ppo.shared import SharedRun
from equipoise.ppo.state import Remedies, State
from equipoise.ppo.training import Training
from equipoise.ppo.watch import Alert

NONFINITE_EXIT = 3
ALERT_EXIT = 4
MAX_NONFINITE = 3  # steps in a row before a rollback, and again before giving up


def on_nonfinite(training: Training, run: SharedRun, problem: str) -> bool:
    """After a non-finite step: go on, roll back to the last checkpoint once, then give up (False)."""
    state = training.state
    state.skipped += 1
    state.bad_in_a_row += 1
    if state.bad_in_a_row < MAX_NONFINITE:
        return True
    checkpoint = run.newest()
    if checkpoint is not None and state.rollbacks == 0:
        skipped = state.skipped
        run.restore(checkpoint, training.optimizer, state)
        state.skipped, state.rollbacks, state.bad_in_a_row = skipped, 1, 0
        _other_numbers(state)
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


def on_alert(training: Training, run: SharedRun, alerts: Sequence[Alert]) -> bool:
    """After alerts were raised: write them down, then go on, go back with a remedy, or stop (False)."""
    config, state = training.config.watch, training.state
    for alert in alerts:
        run.log.alert(state.step, alert.sign.name, alert.evidence, alert.remedy, alert.line())
    if config.on_alert == "stop":
        run.log.say(
            "stopping because of the alert, as --on-alert stop asks. The same command goes on in spite of it; a remedy "
            "needs a new run, in other folders."
        )
        return False
    # Where no checkpoint of the run is any better, as with a term in the prompt, there is nothing to go back to.
    alerts = [alert for alert in alerts if alert.sign.actions]
    if alerts and config.on_alert == "rollback" and state.remedies.rollbacks < config.alert_rollbacks:
        healthy = state.watch.healthy_step
        checkpoint = run.checkpoint_at(healthy) if healthy is not None else None
        if checkpoint is None:
            run.log.say("there is no checkpoint from before the signs to go back to: going on")
            return True
        because = ", ".join(alert.sign.name for alert in alerts)
        remedies = remedy(state.remedies, alerts)
        run.restore(checkpoint, training.optimizer, state)
        if any("kl" in alert.sign.actions for alert in alerts):
            state.kl_coef = max(2 * state.kl_coef, 0.02)
        state.remedies = remedies
        state.apply_remedies()
        _other_numbers(state)
        run.log.rewind(state.step)
        run.replace_from(checkpoint.step, training.optimizer, state)
        now = f"KL coefficient {state.kl_coef:.3g}, {remedies.describe()}"
        run.log.event(state.step, "rollback", to=checkpoint.path.name, because=f"alert {because}", now=now)
    return True


def remedy(so_far: Remedies, alerts: Sequence[Alert]) -> Remedies:
    """What a rollback changes, on top of earlier ones; the KL coefficient is doubled elsewhere."""
    actions = {action for alert in alerts for action in alert.sign.actions}
    return replace(
        so_far,
        rollbacks=so_far.rollbacks + 1,
        diversity=so_far.diversity + (0.1 if "diversity" in actions else 0.0),
        opening=so_far.opening + (0.1 if "opening" in actions else 0.0),
        rate=so_far.rate * (0.5 if "rate" in actions else 1.0),
    )


def _other_numbers(state: State) -> None:
    """The same random numbers would lead to the same place."""
    state.generator.manual_seed(int(torch.randint(2**62, (1,), generator=state.generator)))
