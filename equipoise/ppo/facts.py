"""How a policy was trained, in a line for its model card: every option in force, and none that was not."""

from equipoise.ppo.config import DiversityConfig, TrainConfig
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import PROTOCOL_WEIGHTS

KL_IN = {
    "reward": "",
    "both": "exact KL in the loss and of later places in the reward",
    "loss": "exact KL in the loss alone",
}


def facts(config: TrainConfig, steps: int, kl_coef: float, *, warmed: bool) -> str:
    """Such as "PPO, 75 steps of 64 sentences, all weights, …". `kl_coef`: as it was at the end; `warmed`: whether the
    warm start, where one was wanted, was made."""
    ppo, policy, diversity = config.ppo, config.policy, config.diversity
    eight = " beside base weights in 8 bits" if policy.use_8bit else ""
    told = [
        f"{ppo.method.title}, {plural(steps, 'step')} of {plural(ppo.batch_size, 'sentence')}"
        + (f" in groups of {ppo.group_size}" if ppo.group_size > 1 else ""),
        "all weights" if policy.tuning == "full" else f"LoRA of rank {policy.lora_rank}{eight}",
        f"learning rate {ppo.learning_rate:g}",
        f"KL coefficient {kl_coef:.3g}"
        + (" in the loss" if ppo.method.kl_in_loss else "")
        + (" at the end, steered" if ppo.ref_kl_target is not None else ""),
        KL_IN[ppo.kl_in],
        _warm_start(config, warmed),
        f"entropy bonus {ppo.entropy_coef:g}" if ppo.entropy_coef else "",
        f"bonus for strict success {config.strict_bonus:g}" if config.strict_bonus else "",
        _diversity(diversity, config.task.pair_noun),
        f"malus for common openings {diversity.opening_weight:g}" if diversity.opening_weight else "",
        f"malus for a nat per token {config.fluency_weight:g}" if config.fluency_weight else "",
        f"penalty for cut-off sentences {config.missing_eos_penalty:g}" if config.missing_eos_penalty else "",
        "other weights of the reward than the protocol's" if config.reward != PROTOCOL_WEIGHTS else "",
    ]
    return ", ".join(filter(None, told))


def _diversity(diversity: DiversityConfig, pairs: str) -> str:
    if not diversity.diversity_weight:
        return ""
    told = f"diversity bonus {diversity.diversity_weight:g}"
    if diversity.diversity_on != "even":
        return told
    power = diversity.even_power
    aim = f"in proportion to their untrained shares to the power {power:g}" if power else "all alike"
    return f"{told} towards {pairs} {aim}"


def _warm_start(config: TrainConfig, warmed: bool) -> str:
    warm = config.warm_start
    if not warm.wanted or not warmed:
        return ""
    if warm.target != "off":
        source = f"sentences of the target {warm.target!r}"
    elif warm.warm_start_file:
        source = "sentences of a file"
    else:
        source = "forced sentences" if warm.warm_start == "forced" else "its own complying samples"
    return f"after a supervised warm start from {source}"
