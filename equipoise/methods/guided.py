"""Ctrl-G's sentences for any keys, with what they say of the base model."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from equipoise.measures.decomposition import Pair, pair_rates, rates_document
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.constraint import constraint_of
from equipoise.methods.ctrlg.writer import VERSION, CtrlG, check_feasible
from equipoise.methods.estimates import mean_over_occupations
from equipoise.methods.kl import outcomes_of
from equipoise.methods.prompted import Prompted, Written, uniforms
from equipoise.policy import bundled
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.source import load_tokenizer
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks

BOOTSTRAPS = 2000


class Guided(Prompted):
    """As `Prompted`, its tokens drawn under Ctrl-G."""

    def __init__(
        self,
        config: PolicyConfig,
        guidance: CtrlGConfig,
        *,
        prompt: str | None,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int | None = None,
        task: Task | None = None,
    ) -> None:
        """Raises UserError, for a constraint that no sentence can meet as well."""
        super().__init__(config, prompt=prompt, sampling=sampling, seed=seed, batch_size=batch_size, task=task)
        check_feasible(load_tokenizer(self.source), self.prompt, sampling, guidance, self.task)
        self.guidance = guidance.resolved(self.task, on_gpu=self.device.type == "cuda")
        self.settings |= asdict(self.guidance) | {"ctrlg_version": VERSION}
        self.facts: dict[str, Any] = {}
        """Of the hidden Markov model, once it is there."""
        self._ctrlg: CtrlG | None = None
        self.may_distil = True
        """Whether a hidden Markov model that is not kept is made, which takes minutes."""
        self._cut = True
        """Whether the token limit may end a sentence."""

    def load(self, say: Callable[[str], None] = print, ranks: Ranks = ALONE) -> None:
        """Bring the weights into memory and the hidden Markov model, which is distilled where rank 0 keeps none. Raises
        UserError, NonFiniteLogits, on all ranks."""
        super().load(say, ranks)
        self._ctrlg = self._guide(self.sampling, say, ranks)

    def unload(self) -> None:
        self._ctrlg = None
        super().unload()

    def _guide(self, sampling: SamplingConfig, say: Callable[[str], None], ranks: Ranks) -> CtrlG:
        lifted: list[CtrlG] = []

        def lift() -> None:
            assert self.policy is not None
            weights, cache = str(self.settings["weights"]), bundled.cache_folder()
            lifted.append(
                CtrlG(self.policy, self.prompts, sampling, self.guidance, cache, weights=weights, task=self.task)
            )

        ranks.each(lift)
        (made,) = lifted
        facts = made.prepare(say, may_distil=self.may_distil, ranks=ranks)
        self._cut = bool(made.automaton.accepts_R.any())
        # What depends on whether the model was kept from before is no part of a file's account.
        self.facts = {k: v for k, v in facts.items() if k not in ("generated_tokens", "cached", "distil_s", "tables_s")}
        return made

    def _write(self, keys: Sequence[Key]) -> list[Written]:
        assert self._ctrlg is not None
        made = self._ctrlg(keys, uniforms(self.seed, keys, self.sampling.max_new_tokens))
        # Only their sum is known, and a batch is paid for as a whole.
        each, rest = divmod(made.tokens, len(keys))
        tokens = [each + (i < rest) for i in range(len(keys))]
        return [Written(*row) for row in zip(made.texts, tokens, made.log_weights, strict=True)]

    @property
    def covers_all(self) -> bool:
        """Whether every compliant sentence of the base model can come up, at its own temperature."""
        return (self.sampling.temperature, self.sampling.top_p) == (1.0, 1.0)

    @property
    def event(self) -> str:
        """What the sentences are conditioned on, and p0 is the probability of: `both` or `strict`, cut-off sentences
        counted as everywhere; in words where it is neither."""
        name = "strict" if self.guidance.shape == "strict" else "both"
        asked, own = (constraint_of(c, self.task) for c in (self.guidance, CtrlGConfig(shape=self.guidance.shape)))
        if asked.strict and asked != own:
            name = f"{name} with {asked.min_words} to {asked.max_words} words"
        return name if self._cut else f"{name}, finished within {self.sampling.max_new_tokens} tokens"

    def distance(
        self,
        runs: int,
        say: Callable[[str], None],
        own: tuple[Mapping[Key, str], Mapping[Key, float]] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Any]:
        """`kl`, `outcomes`, `p0`, `pair_rates` and `ess` from `runs` sentences of each occupation, drawn by all ranks.
        Raises UserError, NonFiniteLogits, on all.

        Drawn at temperature 1 and top-p 1, so that every compliant sentence of the base model can come up: then
        E[w] = P(the base model's sentence complies), w = p/q, and KL(q‖p) = −E[log w]. `own`: the writer's own
        sentences and their log weights, which save drawing others where it `covers_all`.
        """
        keys = all_keys(runs, self.task.names)
        if own is None:
            texts, log_weights = self._drawn_anew(keys, say, ranks)
        else:
            assert self.covers_all
            if self._ctrlg is None:  # a finished file was continued: only for the facts
                self.load(say, ranks)
            texts, log_weights = ({key: each[key] for key in keys} for each in own)  # type: ignore[assignment]
        how = (
            f"{plural(len(keys), 'sentence')} of Ctrl-G, {runs} of each occupation, drawn at temperature 1 and top-p 1"
        )
        kl = mean_over_occupations({key: -weight for key, weight in log_weights.items()})
        # Of several candidates, log w is that of their mean: their joint distribution is farther from the base model's
        # than the chosen sentence's.
        bound = ", an upper bound with several candidates" if self.guidance.candidates > 1 else ""
        known: dict[str, Any] = {
            "kl": {**kl, "how": f"mean of −log w over {how}{bound}; 95 % normal interval, stratified by occupation"}
        }
        if self.guidance.terms == "both":
            p0 = mean_weight(log_weights)
            known["p0"] = {
                **p0,
                "n": len(keys),
                "event": self.event,
                "how": f"mean importance weight of {how}; 95 % bootstrap interval within occupations",
            }
            if runs > 1:
                own_pairs = ((key.occupation, self._pair(texts[key]), log_weights[key]) for key in keys)
                rates = pair_rates(grouped(own_pairs))
                known["pair_rates"] = {"event": self.event, **rates_document(rates)}
        known["outcomes"] = outcomes_of(texts, {key: -weight for key, weight in log_weights.items()}, self.task)
        return known | {"ess": effective_size(list(log_weights.values())), "hmm": self.facts}

    def _pair(self, text: str) -> Pair:
        pair = self.task.match(text).first
        assert pair is not None, "what meets the constraint holds every class"
        return pair

    def _drawn_anew(
        self, keys: Sequence[Key], say: Callable[[str], None], ranks: Ranks
    ) -> tuple[dict[Key, str], dict[Key, float]]:
        """Sentences at temperature 1 and top-p 1, and their log weights."""
        sampling = SamplingConfig(1.0, 1.0, self.sampling.max_new_tokens)
        if self.policy is None:
            Prompted.load(self, say, ranks)
        self._ctrlg = None  # its tables are no smaller than those to come
        guide = self._guide(sampling, say, ranks)

        def draw(part: Sequence[Key]) -> list[tuple[str, float]]:
            made = guide(part, uniforms(f"{self.seed}/kl", part, sampling.max_new_tokens))
            return list(zip(made.texts, made.log_weights, strict=True))

        drawn = dict(zip(keys, self.in_batches(keys, draw, say, ranks), strict=True))
        return {key: text for key, (text, _) in drawn.items()}, {key: weight for key, (_, weight) in drawn.items()}


def grouped(sentences: Iterable[tuple[str, Pair, float]]) -> list[list[tuple[Pair, float]]]:
    """(occupation, pair, log weight) of Ctrl-G's sentences, as `pair_rates` takes them."""
    groups: dict[str, list[tuple[Pair, float]]] = {}
    for occupation, pair, log_weight in sentences:
        groups.setdefault(occupation, []).append((pair, math.exp(log_weight)))
    return list(groups.values())


def effective_size(log_weights: Sequence[float]) -> float:
    """(Σw)² / Σw², Kish's effective sample size."""
    top = max(log_weights)
    weights = [math.exp(x - top) for x in log_weights]
    return sum(weights) ** 2 / sum(w * w for w in weights)


def mean_weight(log_weights: Mapping[Key, float], seed: int = 0) -> dict[str, float]:
    """{value, low, high} of E[w], every occupation with equally many weights. The interval is the bootstrap's 2.5 and
    97.5 percentiles, drawing anew within occupations."""
    occupations = dict.fromkeys(key.occupation for key in log_weights)
    rows = [[x for key, x in log_weights.items() if key.occupation == o] for o in occupations]
    weights_OR = torch.tensor(rows, dtype=torch.float64).exp()
    generator = torch.Generator().manual_seed(seed)
    size = (BOOTSTRAPS, *weights_OR.shape)
    chosen_DOR = torch.randint(weights_OR.shape[1], size, generator=generator)
    means_D = weights_OR.expand(size).gather(2, chosen_DOR).mean((1, 2))
    low, high = means_D.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(weights_OR.mean()), "low": low, "high": high}
