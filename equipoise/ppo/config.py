"""Every option of a training run. The field descriptions are what `--help` prints."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from equipoise.errors import UserError
from equipoise.options import TaskOption
from equipoise.policy.algorithms import ALGORITHMS, GROUP, Algorithm
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.ppo.run_config import RunConfig
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.ppo.watch_config import WatchConfig
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import PROTOCOL


@dataclass(frozen=True)
class DiversityConfig:
    diversity_weight: float = 0.0
    """Largest bonus of a sentence, and the most one whose terms are overused can lose. 0 turns it off."""
    diversity_window: int = 1024
    """Compliant sentences over which frequencies are counted."""
    diversity_on: Literal["terms", "pairs", "both", "even"] = "terms"
    """What has to be rare: `terms` of any class, `pairs` (combinations of a term of each class), or the mean of
    `both`, among the last compliant sentences. `even`: a sentence of strict success gets the weight times log w(pair),
    nats that are raised or lowered until all pairs come alike, or as --even-power says; they begin at --pair-rates
    where these are given. With the weight of --kl-coef that is what evenness costs, and nothing is wasted on it."""
    even_power: float = 0.0
    """With `even`, which then needs --pair-rates or --warm-start-target, and in the target of --warm-start-target even,
    pairs come in proportion to their share of the untrained model's successes to this power: 0 all alike, 1 as they
    are. 0.15 gives up a tenth of the effective pairs, the rarest ones, which cost the most."""
    opening_weight: float = 0.0
    """What a compliant sentence would lose if all others began as it does: the first two words after the frame, terms
    masked. It loses in proportion to their share. 0 turns it off."""

    def __post_init__(self) -> None:
        if self.diversity_window < 1:
            raise UserError(f"diversity-window {self.diversity_window} must be at least 1; 1024 is the default")
        if not 0 <= self.even_power <= 1:
            raise UserError(f"even-power {self.even_power} is not from 0 (all pairs alike) to 1 (pairs as they are)")
        if self.opening_weight < 0:
            raise UserError(f"opening-weight {self.opening_weight} must be 0 (off) or more; it is taken off")


@dataclass(frozen=True)
class PPOConfig:
    """The guide's numbers by default."""

    algorithm: Literal["ppo", "grpo", "rloo", "reinforce++"] = "ppo"
    """How sentences become advantages: `ppo` by a value head; `grpo` and `rloo` by the other sentences of the same
    occupation in the batch, `reinforce++` by the whole batch, all three without a value head."""
    num_generations: int = 0
    """Sentences of each occupation that is drawn for a batch, G. 0: with `grpo` and `rloo` the largest number up to 8
    that divides the batch, with the others 1."""
    batch_size: int = 64
    """Completions sampled per PPO step."""
    mini_batch_size: int = 16
    """Completions per optimizer step."""
    micro_batch_size: int = 16
    """Completions per forward and backward pass, fewer where memory needs it. Changes nothing else."""
    pieces: int = 0
    """Equal pieces of a mini-batch, each a pass of its own, that the processes of a run share alike. They decide how
    sums are rounded, and the number of processes nothing. 0: as many as processes, or as the continued run had."""
    ppo_epochs: int = 4
    """Times that an update goes over the completions of a step, unless `target_kl` ends it before."""
    learning_rate: float = 1e-5
    """Of the policy; Adam's."""
    value_learning_rate: float = 1e-3
    """Of the value head, whose last layer starts at zero."""
    value_hidden: int = 0
    """Units of a hidden layer of the value head. 0: none, the head is one linear layer."""
    warmup_steps: int = 20
    """PPO steps over which the learning rate rises from 1/warmup. Adam's first steps are sign steps: without a warm-up
    the first alone was measured to move the policy by 0.1–0.7 nats per token."""
    decay_steps: int = 0
    """PPO step after which the learning rate would be 0, having fallen linearly from the first; usually the number of
    steps. 0 keeps it."""
    value_warmup_steps: int = 0
    """First PPO steps in which only the value head learns, so that the first advantages are not measured against values
    of 0. The learning rate's warm-up begins after them."""
    average_weights: float = 0.0
    """Decay of a moving average of the trained weights over PPO steps, which is then what is evaluated and exported;
    0.98 averages about the last 50 steps. 0 turns it off."""
    target_kl: float = 0.03
    """KL(π_old‖π_θ) per token at which the update of a PPO step ends. Not the distance to the reference model."""
    kl_coef: float = 0.05
    """β: price of one nat of KL(π‖π_ref) per sentence, in units of reward; with `grpo` the weight of KL per token in
    the loss."""
    kl_in: Literal["reward", "both", "loss"] = "reward"
    """Where KL(π‖π_ref) is charged for. `reward`: log π − log π_ref of each sampled token, in its reward. `both`: the
    exact KL over the whole vocabulary, at the places visited: that of a place in the loss, that of the places after it
    in the reward; the same objective at the price of a second pass of the reference. `loss`: without the
    latter. For `ppo` and `reinforce++`."""
    ref_kl_target: float | None = None
    """KL(π‖π_ref) in nats per sentence that β is steered towards; None keeps β. It cannot be near 0 when the goal is
    met."""
    kl_horizon: int = 10_000
    """Completions over which the steering acts."""
    gamma: float = 1.0
    """Discount of later rewards, by token. 1: none, since a sentence is paid for at its end."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation: nearer to 1 is less bias and more variance."""
    clip: float = 0.2
    """Probability ratios beyond 1 ± clip earn nothing more."""
    value_clip: float = 0.2
    """Values may move this far, in units of reward, from their old ones in one PPO step."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss, which keeps the policy varied. 0: none."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    adam_eps: float = 1e-5
    """1e-5 as in OpenAI's PPO; it softens the first steps."""

    def __post_init__(self) -> None:
        at_least_1 = ("batch_size", "mini_batch_size", "micro_batch_size", "ppo_epochs", "kl_horizon")
        above_0 = ("target_kl", "ref_kl_target", "learning_rate", "clip", "value_clip", "max_grad_norm", "adam_eps")
        counts = ("pieces", "warmup_steps", "decay_steps", "value_warmup_steps", "value_hidden")
        at_least_0 = (
            *counts,
            "value_learning_rate",
            "average_weights",
            "kl_coef",
            "entropy_coef",
            "gamma",
            "gae_lambda",
        )
        for name in (*at_least_1, *above_0, *at_least_0):
            value = getattr(self, name)
            flag = name.replace("_", "-")
            if name in at_least_1 and value < 1:
                raise UserError(f"{flag} {value} must be at least 1")
            if name in above_0 and value is not None and value <= 0:
                raise UserError(f"{flag} {value} must be above 0")
            if name in at_least_0 and value < 0:
                raise UserError(f"{flag} {value} must not be negative")
            if name in ("learning_rate", "value_learning_rate", "gamma", "gae_lambda") and value > 1:
                raise UserError(f"{flag} {value} must be at most 1")
        if self.batch_size % self.mini_batch_size:
            raise UserError(
                f"batch-size {self.batch_size} is not a multiple of mini-batch-size {self.mini_batch_size}: "
                "every optimizer step must see equally many completions; give a --mini-batch-size that divides it"
            )
        self._check_groups()
        self._check_applies()
        if self.pieces and self.mini_batch_size % self.pieces:
            raise UserError(f"mini-batch-size {self.mini_batch_size} is not a multiple of pieces {self.pieces}")
        if self.average_weights >= 1:
            raise UserError(f"average-weights {self.average_weights} must be below 1: 1 would keep the first weights")

    def _check_groups(self) -> None:
        """Raises UserError where the batch cannot be made of whole groups."""
        given, batch, title = self.num_generations, self.batch_size, self.method.title
        if given < 0:
            raise UserError(f"num-generations {given} must be 0 (chosen by the batch) or more")
        if given and batch % given:
            raise UserError(
                f"batch-size {batch} is not a multiple of num-generations {given}: a batch is made of whole groups"
            )
        if self.method.grouped and self.group_size < 2:
            raise UserError(
                f"num-generations is 1, and {title} compares the sentences of a group: give 2 or more"
                if given
                else f"batch-size {batch} has no divisor from 2 to {GROUP}, and {title} compares the sentences of an "
                "occupation: choose another batch-size, or give --num-generations"
            )

    def _check_applies(self) -> None:
        """Raises UserError for an option that was given and that the algorithm has no use for."""
        method = self.method
        of_values = ("value_learning_rate", "value_hidden", "value_warmup_steps", "value_clip", "gae_lambda")
        idle = [*(() if method.value_head else of_values), *(() if method.token_credit else ("gamma",))]
        if wrong := [each for each in fields(self) if each.name in idle and getattr(self, each.name) != each.default]:
            first = wrong[0].name
            what = "rewards from token to token" if first == "gamma" else "a value head"
            without = " ".join(f"--{each.name.replace('_', '-')} {each.default}" for each in wrong)
            raise UserError(
                f"{first.replace('_', '-')} {getattr(self, first)} is about {what}, which {method.title} does not "
                f"have: leave it out, or where a preset has it give {without}"
            )
        if self.kl_in != "reward" and not method.token_credit:
            raise UserError(
                f"kl-in {self.kl_in} charges for the KL from token to token, which {method.title} does not: leave it "
                "out"
            )

    @property
    def method(self) -> Algorithm:
        """What the algorithm is made of."""
        return ALGORITHMS[self.algorithm]

    @property
    def group_size(self) -> int:
        """Sentences of one occupation that stand side by side in a batch."""
        return self.method.group_size(self.batch_size, self.num_generations)

    def policy_learning_rate(self, done: int) -> float:
        """That of the step after `done` steps: 0 while only the value head learns, the warm-up, then the decay."""
        if done < self.value_warmup_steps:
            return 0.0
        warm = min(1.0, (done - self.value_warmup_steps + 1) / max(1, self.warmup_steps))
        decayed = max(0.0, 1 - done / self.decay_steps) if self.decay_steps else 1.0
        return self.learning_rate * warm * decayed


@dataclass(frozen=True)
class EvaluationConfig:
    base_samples: int = 0
    """Sentences of the untrained model, sampled as in training, from which its rate of compliance is estimated: the
    distance to the optimum is measured with it. 0: a known rate, where there is one."""
    eval_sentences: int = 0
    """Sentences sampled at the generation settings at every multiple of save-every and at the end, always with the same
    random numbers; what is exported is chosen by them. 0: no such evaluation, and the last weights are exported."""
    final_sentences: int = 0
    """Sentences sampled from the model that is exported, for the closing summary, of all occupations alike."""
    eval_temperature: float = 1.0
    """Temperature of these sentences, as of `equipoise generate`."""
    eval_top_p: float = 0.95
    """Nucleus of these sentences, likewise."""
    pair_rates: str = ""
    """How often the untrained model succeeds strictly with each pair: the costs file of Ctrl-G's sentences. The KL of
    evaluations and of the closing summary is then split into what compliance costs, what variety costs, and waste. With
    --warm-start-target it is there by itself."""
    export: Literal["best", "last"] = "best"
    """Which weights are exported: `best` those of the evaluation with the highest strict success (within its sampling
    error the one with more effective pairs, then the one nearer to the reference model); `last` the last."""

    def __post_init__(self) -> None:
        for name in ("base_samples", "eval_sentences", "final_sentences"):
            if getattr(self, name) < 0:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} must be 0 (none) or more")
        SamplingConfig(self.eval_temperature, self.eval_top_p)

    def sampling(self, training: SamplingConfig) -> SamplingConfig:
        """The generation settings; how long a sentence may get is as in training."""
        return SamplingConfig(self.eval_temperature, self.eval_top_p, training.max_new_tokens)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; saved with it. Presets are values of this class."""

    preset: str = "bundled-cpu"
    """The defaults that options change: guide, bundled-gpu, varied, near, even or bundled-cpu."""
    task: TaskOption = PROTOCOL
    """What is studied: a task file with its own occupations, classes of terms, frame, bounds and prompts, or the name
    of a packaged task."""
    min_words: int | None = None
    """Fewest words of a sentence, the frame included. Default: the task's."""
    max_words: int | None = None
    """Most words of a sentence. Default: the task's."""
    prompt: str = ""
    """The name of one of the task's prompts (`raw` gives no instruction at all), or your own as NAME=INSTRUCTION with
    {occupation} in it. Default: the task's first."""
    system: str = ""
    """System message. Empty on purpose: some templates put one of their own that contains a term the reward pays
    for."""
    steps: int = 2000
    """PPO steps, each of batch-size completions."""
    seed: int = 0
    """Of everything that is random; on a CPU two runs of one seed write the same bytes."""
    holdout: bool = False
    """Train without the occupations that the task holds out, to test on ones that were never seen."""
    missing_eos_penalty: float = 0.0
    """Taken off the training reward of a completion that was cut off at max-new-tokens. Not part of the protocol's
    reward."""
    strict_bonus: float = 0.0
    """Added to the training reward of a sentence of strict success: every class, a length within the bounds, one
    complete sentence. Not part of the protocol's reward."""
    fluency_weight: float = 0.0
    """Taken off the training reward for each nat per token that the untrained model needs for the sentence by itself,
    without the prompt. Not part of the protocol's reward."""
    scoring: Literal["packed", "padded"] = "packed"
    """`packed` shares the tokens that prompts have in common; `padded` is its plain twin, one row per completion."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    reward: RewardWeights = field(default_factory=RewardWeights)
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        # A frozen dataclass lets only `object.__setattr__` store what follows from other fields. The bounds become the
        # task's, so that reward, strict success, watch and prompts all read them from one place.
        if self.min_words is not None or self.max_words is not None:
            task = self.task.with_bounds(self.min_words, self.max_words)
            for name, value in (("task", task), ("min_words", None), ("max_words", None)):
                object.__setattr__(self, name, value)
        if not self.prompt:
            object.__setattr__(self, "prompt", self.task.default_prompt.name)
        self.task.prompt(self.prompt)
        self.run.check_out(self.policy.tuning)
        if self.steps < 1:
            raise UserError(f"steps {self.steps} must be at least 1; the guide trains for 2000")
        for group in (self, *(getattr(self, each.name) for each in fields(self))):
            for option in fields(group) if is_dataclass(group) else ():
                value = getattr(group, option.name)
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"{option.name.replace('_', '-')} is {value}: give a finite number")
        if 0 < self.ppo.decay_steps < self.steps:
            raise UserError(
                f"decay-steps {self.ppo.decay_steps} is below steps {self.steps}: nothing would be learnt after it"
            )
        if self.sampling.temperature == 0:
            raise UserError("temperature 0 leaves nothing to learn from: train at 1.0, the protocol's temperature")
        if self.holdout and not self.task.held_out:
            raise UserError(f"the task {self.task.name} holds no occupation out: list some under held_out in its file")

    @property
    def occupations(self) -> tuple[str, ...]:
        """Those that are trained on."""
        return self.task.training_names(self.holdout)

    def document(self) -> dict[str, Any]:
        """The configuration as JSON gives it back, the task in the form of its file."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        del plain["task"], plain["min_words"], plain["max_words"]  # the bounds are the task's
        groups = {n: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for n, v in plain.items()}
        document: dict[str, Any] = json.loads(json.dumps(groups))
        return document | {"task": self.task.document()}
