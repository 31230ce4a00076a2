"""Options that others leave nothing to do: told in a line, or refused where what they ask for would not be done."""

from equipoise.errors import UserError
from equipoise.ppo.config import TrainConfig


def idle(config: TrainConfig) -> list[str]:
    """A line for each such option. Raises UserError as `check_power` does."""
    check_power(config)
    diversity, warm, told = config.diversity, config.warm_start, []
    on = diversity.diversity_on
    if warm.target != warm.warm_start_target:
        told.append(f"--warm-start-target {warm.warm_start_target} does nothing beside --warm-start-file")
    if diversity.even_power and on != "even" and warm.target != "even":
        without = "--diversity-on even or --warm-start-target even"
        told.append(f"--even-power {diversity.even_power:g} does nothing without {without}")
    # A rollback after an alert may add to the weight.
    if on != "terms" and not diversity.diversity_weight and config.watch.on_alert != "rollback":
        told.append(f"--diversity-on {on} does nothing with --diversity-weight 0")
    if 0 < config.steps <= config.ppo.value_warmup_steps:
        told.append(
            f"--steps {config.steps} leaves the policy as it is: in the first {config.ppo.value_warmup_steps} only the "
            "value head learns (--value-warmup-steps)"
        )
    if warm.warm_start_fluency and not (warm.target != "off" and warm.warm_start_target_rounds):
        without = "--warm-start-target" if warm.target == "off" else "--warm-start-target-rounds"
        told.append(f"--warm-start-fluency {warm.warm_start_fluency:g} does nothing without {without}")
    return told


def check_power(config: TrainConfig) -> None:
    """Raises UserError where pairs are to come in proportion to a power of what they are, and nothing says what they
    are: all alike would be trained for."""
    diversity, warm = config.diversity, config.warm_start
    known = config.evaluation.pair_rates or (warm.target != "off" and not warm.warm_start_file)
    if diversity.diversity_on == "even" and diversity.even_power and not known:
        raise UserError(
            f"even-power {diversity.even_power:g} is of the pairs' shares under the untrained model, and nothing says "
            "what they are: give --pair-rates, or --warm-start-target, or --even-power 0 for all pairs alike"
        )
