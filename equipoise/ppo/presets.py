"""Named configurations, and what they become on another task. Needs no torch, as options do not."""

from collections.abc import Collection
from dataclasses import replace

from equipoise.errors import UserError
from equipoise.policy.config import LLAMA_8B, PolicyConfig
from equipoise.ppo.config import DiversityConfig, EvaluationConfig, PPOConfig, TrainConfig
from equipoise.ppo.run_config import RunConfig
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import PROTOCOL, Task

# Seconds on a GPU: the untrained model's rates, an evaluation at every checkpoint, the closing summary.
MEASURED = EvaluationConfig(base_samples=20_000, eval_sentences=260, final_sentences=1000)

# One pass over many sentences: several over few made loops of them (docs/LOG.md).
NEAR = WarmStartConfig(
    warm_start_target="near",
    warm_start_pool=100_000,
    warm_start_target_rounds=2,
    warm_start_target_samples=60_000,
    warm_start_sentences=36_000,
    warm_start_copies=4,
    warm_start_batch_size=64,
    warm_start_epochs=1,
    warm_start_learning_rate=6e-4,
)
# Near the optimum nearly all of a gradient is noise, and Adam goes as far for noise as for anything else. Adapters give
# it a seventh of the weights to spoil, large batches have less of it, and a value head that learns fast, with a hidden
# layer, takes it out of the advantages. λ is 1: with 0.95 the advantages vary less, but what the value head says of the
# rest of a sentence is wrong where it may yet fail, and two to three times as many did (docs/LOG.md).
ADAPTERS = PolicyConfig(model="bundled", tuning="lora", lora_rank=64, lora_alpha=64)
TARGETED = PPOConfig(
    batch_size=2048,
    mini_batch_size=512,
    micro_batch_size=512,
    ppo_epochs=2,
    learning_rate=3e-4,
    value_learning_rate=1e-2,
    value_hidden=512,
    value_warmup_steps=3,
    warmup_steps=5,
    kl_coef=0.12,
    gae_lambda=1.0,
    average_weights=0.95,
)

NEAR_PRESET = TrainConfig(
    preset="near",
    prompt="describe",
    steps=350,
    strict_bonus=1.0,
    policy=ADAPTERS,
    reward=RewardWeights(bonus_per_term=0.0),
    warm_start=NEAR,
    # A nat has a higher price than in `even`: the less a failure costs, the fewer beginnings are avoided for its sake.
    # What is left falls with the steps for long: 1.69 nats of waste after 100, 1.53 after 220, 1.46 after 350
    # (docs/LOG.md).
    ppo=replace(TARGETED, decay_steps=350, kl_coef=0.15),
    # The last: the highest success is not what is looked for, and the learning rate has come to 0 there.
    evaluation=replace(MEASURED, eval_sentences=500, export="last"),
    run=RunConfig(save_every=50, sample_every=50, keep_checkpoints=3),
)
PRESETS = {
    # The guide: its model, its prompt, its numbers, and beside them two things of which it says nothing (`ADDED`).
    "guide": TrainConfig(
        preset="guide",
        prompt="study",
        policy=PolicyConfig(model=LLAMA_8B, tuning="lora"),
        evaluation=MEASURED,
        ppo=PPOConfig(entropy_coef=0.01, average_weights=0.98),
    ),
    # Plain: PPO alone with the protocol's reward and the guide's numbers, on a model that needs neither access nor a
    # large card. Without the entropy bonus the `study` prompt stays at one class for hundreds of steps; with it all
    # nine runs that came to 372 steps or more had reward 0.9 by step 392. The average of the last 50 steps succeeds
    # more often than any one of them (docs/LOG.md, docs/FRONTIER.md).
    "bundled-gpu": TrainConfig(
        preset="bundled-gpu",
        prompt="describe",
        policy=PolicyConfig(model="bundled", tuning="full"),
        evaluation=MEASURED,
        ppo=PPOConfig(entropy_coef=0.01, average_weights=0.98),
        run=RunConfig(keep_checkpoints=3),
    ),
    # Best: all pairs of terms, near the base model's fluency. Two rounds of supervised learning from the model's own
    # sentences (all pairs alike, the likeliest of four) leave little for PPO to do: to make them succeed, gently enough
    # to keep their variety. docs/FRONTIER.md has it beside the others.
    "varied": TrainConfig(
        preset="varied",
        prompt="describe",
        steps=75,
        strict_bonus=1.0,
        policy=PolicyConfig(model="bundled", tuning="full"),
        warm_start=WarmStartConfig(
            warm_start="forced",
            warm_start_sentences=4000,
            warm_start_candidates=4,
            warm_start_rounds=2,
            warm_start_batch_size=64,
            warm_start_learning_rate=6e-5,
            warm_start_budget=200_000,
        ),
        diversity=DiversityConfig(diversity_weight=1.0, diversity_on="pairs"),
        ppo=PPOConfig(
            learning_rate=3e-6,
            warmup_steps=5,
            decay_steps=75,
            kl_coef=0.02,
            entropy_coef=0.02,
            average_weights=0.9,
        ),
        evaluation=replace(MEASURED, eval_sentences=500),
        run=RunConfig(save_every=25, sample_every=25, keep_checkpoints=3),
    ),
    # Nearest: what the untrained model writes where it succeeds, and as it does. Rounds of importance sampling give
    # such sentences, the policy learns them, and PPO does the rest with a reward that only tells success from failure:
    # anything else that is paid for is waste.
    "near": NEAR_PRESET,
    # Even: pairs nearly alike, the rarest a little rarer since they cost the most, and otherwise as near as that is,
    # but for fluency, which is cheap: without it rare pairs make for unnatural sentences. A pair is paid what it costs
    # at the price of a nat, found by dual ascent: paid by estimates alone, pairs collapsed onto those whose rate was
    # too low. The target's sentences are more than twice as many as `near` has, so that the rates of all but three
    # pairs are known within a half. A failure costs 18 to 23 nats; at 10 to 14 pairs are as even and 0.08 nats fewer
    # are wasted, but 98.3 % succeed (three seeds) for 99.8 (one; docs/LOG.md).
    "even": replace(
        NEAR_PRESET,
        preset="even",
        strict_bonus=2.0,
        warm_start=replace(NEAR, warm_start_target="even", warm_start_fluency=1.2, warm_start_target_samples=150_000),
        diversity=DiversityConfig(
            diversity_weight=TARGETED.kl_coef, diversity_on="even", diversity_window=4096, even_power=0.12
        ),
        fluency_weight=0.9 * TARGETED.kl_coef,
        ppo=replace(TARGETED, decay_steps=NEAR_PRESET.steps),
    ),
    # Minutes on two cores, and PPO does the work: a short warm start makes both classes findable (about one sentence in
    # four has them after it), and the reward rises from there. A larger learning rate than `varied` has, since adapters
    # take it and steps are few; the bonuses keep the variety (docs/LOG.md has the search). A checkpoint of the adapters
    # takes a fraction of a second, so there is one after every step.
    "bundled-cpu": TrainConfig(
        preset="bundled-cpu",
        prompt="describe",
        steps=20,
        strict_bonus=1.0,
        policy=PolicyConfig(model="bundled", tuning="lora"),
        warm_start=WarmStartConfig(
            warm_start="forced",
            warm_start_sentences=128,
            warm_start_epochs=3,
            warm_start_learning_rate=3.4e-4,
            warm_start_budget=4000,
        ),
        diversity=DiversityConfig(diversity_weight=1.0, diversity_on="pairs"),
        ppo=PPOConfig(ppo_epochs=2, learning_rate=1e-4, warmup_steps=2, kl_coef=0.02, entropy_coef=0.02),
        evaluation=EvaluationConfig(eval_sentences=100, final_sentences=500),
        run=RunConfig(save_every=10, save_minutes=0.0, keep_checkpoints=2, sample_every=5),
    ),
}


ADDED = {"entropy_coef": "an entropy bonus", "average_weights": "a moving average of the weights"}
"""What the preset `guide` adds to the guide's numbers, by the option. Without the bonus the `study` prompt stalls at
one class on the bundled model; the average of the last 50 steps succeeds more often than any one of them."""


def additions(config: TrainConfig) -> list[str]:
    """A line that says what is trained with besides the guide's numbers, and how to do without it; only for the preset
    `guide`, and only of what is in force."""
    found = {name: getattr(config.ppo, name) for name in ADDED}
    told = [f"{ADDED[name]} ({value:g})" for name, value in found.items() if value]
    if config.preset != "guide" or not told:
        return []
    without = " ".join(f"--{name.replace('_', '-')} 0" for name, value in found.items() if value)
    return [f"guide     beside the guide's own numbers: {' and '.join(told)}; without: {without}"]


def for_model(config: TrainConfig, given: Collection[str]) -> tuple[TrainConfig, list[str]]:
    """What a preset becomes where its learning rates are not for the weights that are trained, and a line that says so;
    options that were `given`, by name, stay as they are. `guide` trains all weights of the bundled model, or the line
    says what adapters would need; `near` and `even` have other rates where all weights are trained.

    The guide's learning rate is one for all weights. Adapters, which the 8B model has because nothing else fits, need
    some thirty times as much to learn as fast (docs/LOG.md)."""
    policy = config.policy
    if config.preset in ("near", "even") and policy.tuning == "full":
        return _for_all_weights(config, given)
    if config.preset != "guide" or policy.model != "bundled" or policy.tuning == "full":
        return config, []
    if "tuning" in given or policy.use_8bit:
        slow = config.ppo.learning_rate <= PRESETS["guide"].ppo.learning_rate
        what = "all weights do, or --learning-rate 3e-4"
        return config, [
            f"note      adapters hardly learn at the guide's learning rate on this model: {what}"
        ] if slow else []
    why = "all weights of the bundled model, since adapters hardly learn at the guide's learning rate"
    return replace(config, policy=replace(policy, tuning="full")), [f"tuning    {why}; --tuning lora keeps them"]


ALL_WEIGHTS = {"learning_rate": 4e-5, "warm_start_learning_rate": 1e-4}
"""What `near` and `even` learn with where all weights are trained and not adapters (docs/LOG.md)."""


def _for_all_weights(config: TrainConfig, given: Collection[str]) -> tuple[TrainConfig, list[str]]:
    asked = [f"--{name.replace('_', '-')} {rate:g}" for name, rate in ALL_WEIGHTS.items() if name not in given]
    if "learning_rate" not in given:
        config = replace(config, ppo=replace(config.ppo, learning_rate=ALL_WEIGHTS["learning_rate"]))
    if "warm_start_learning_rate" not in given:
        rate = ALL_WEIGHTS["warm_start_learning_rate"]
        config = replace(config, warm_start=replace(config.warm_start, warm_start_learning_rate=rate))
    why = "since the preset's own are for adapters and all weights are trained"
    return config, [f"tuning    {' '.join(asked)}, {why}"] if asked else []


def preset(name: str, task: Task = PROTOCOL) -> TrainConfig:
    """The preset of that name for a task (see `for_task`). Raises UserError."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose {', '.join(PRESETS)}")
    return for_task(PRESETS[name], task)[0]


def for_task(config: TrainConfig, task: Task) -> tuple[TrainConfig, dict[str, str]]:
    """A preset on another task, and for each option that had to be changed a line that says why: a prompt that the task
    does not have becomes its first, and a warm start from forced sentences, where the task has no openings, learns from
    free samples, if enough of them comply."""
    prompt, warm = config.prompt, config.warm_start
    lines: dict[str, str] = {}
    if prompt not in [each.name for each in task.prompts]:
        prompt = task.default_prompt.name
        lines["prompt"] = f"prompt    {prompt!r}, since the task has no {config.prompt!r}"
    if warm.warm_start == "forced" and not task.can_force:
        warm = replace(warm, warm_start="samples-if-found")
        why = "warm start from the model's own complying samples, since the task has no openings to force terms"
        lines["warm_start"] = why
    return replace(config, task=task, prompt=prompt, warm_start=warm), lines
