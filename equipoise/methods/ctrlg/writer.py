"""Ctrl-G as a writer: prepared once for a model and its prompts, then asked for the sentences of any keys."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.methods.completions import Key
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.distil import Free, fit, sample_freely, symbols
from equipoise.methods.ctrlg.guide import CtrlGuide
from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import lift
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.prompt import Tokenizer, sentences_of, stop_ids
from equipoise.policy.sample import sample
from equipoise.protocol.prompts import Prompt
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks

VERSION = 3
"""Raised when other sentences come of the same settings, so that a file is not continued with them."""
PACKAGED = Path(__file__).parent / "packaged" / "hmm.safetensors"
"""A small HMM of the bundled model, for `equipoise demo`; used wherever its settings are asked for."""
HMM_VERSION = 2
"""Raised when the distillation changes, so that an HMM made before is not used."""


@dataclass(frozen=True)
class Written:
    """Sentences in the order of their keys."""

    texts: list[str]
    log_weights: list[float]
    """log(p/q) of each sentence: p its probability under the model at this temperature, q under Ctrl-G, in nats.
    The mean of exp(log_weights) estimates without bias the share of the model's own sentences that comply. With several
    candidates, the log of their mean p/q: the same is true of it, and minus its mean is an upper bound of
    KL(q‖p), q now being the sentences that are kept."""
    tokens: int
    """Tokens drawn for them, the stop tokens counted."""


def check_feasible(
    tokenizer: Tokenizer, prompt: Prompt, sampling: SamplingConfig, config: CtrlGConfig, task: Task
) -> None:
    """Raises UserError, with the reason, if some occupation has no sentence that meets the constraint within the bounds
    and the token limit, or if the tokenizer's tokens have no known bytes, or for temperature 0. Needs no weights: call
    it before loading.
    """
    _check_temperature(sampling)
    lift(tokenizer, stop_ids(tokenizer, None, prompt), config, task, max_new_tokens=sampling.max_new_tokens)


def _check_temperature(sampling: SamplingConfig) -> None:
    if sampling.temperature == 0:
        raise UserError("Ctrl-G samples: temperature 0 leaves it nothing to weigh; use 1.0, the model as it is")


class CtrlG:
    """Writes the sentence of any key; which one depends on nothing but key, weights and settings, to rounding."""

    def __init__(
        self,
        policy: Policy,
        prompts: Mapping[str, Sequence[int]],
        sampling: SamplingConfig,
        config: CtrlGConfig,
        cache: Path,
        *,
        weights: str,
        task: Task,
    ) -> None:
        """`prompts` maps each occupation of the task to its prompt's token ids, `weights` is `prompted.fingerprint` of
        the model; both, and the settings, name the HMM's file in the folder `cache`.

        `sampling.top_p` is applied to the guided distribution, after the constraint: the model's own nucleus can lack
        every token that still allows a valid sentence. Give 1 for importance weights that cover all valid sentences.
        Raises UserError as `check_feasible`.
        """
        _check_temperature(sampling)
        self.policy, self.prompts, self.sampling = policy, {o: list(p) for o, p in prompts.items()}, sampling
        on_gpu = policy.device.type == "cuda"
        self.config, self.cache, self.task = config.resolved(task, on_gpu=on_gpu), cache, task
        assert self.config.hidden_states is not None and self.config.distil_sentences is not None
        self.hidden, self.sentences = self.config.hidden_states, self.config.distil_sentences
        self.batch_size = 1024 if on_gpu else 100
        """Sentences at a time while distilling."""
        self.automaton = lift(
            policy.tokenizer,
            policy.stop_ids,
            config,
            task,
            max_new_tokens=sampling.max_new_tokens,
            vocabulary=policy.model.config.get_text_config().vocab_size,
        )
        self._distillation = {
            "version": HMM_VERSION,
            "weights": weights,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "prompts": hashlib.sha256(json.dumps(self.prompts, sort_keys=True).encode()).hexdigest(),
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "classes": hashlib.sha256(self.automaton.class_V.tobytes()).hexdigest(),
            "hidden_states": self.hidden,
            "sentences": self.sentences,
            "passes": config.em_passes,
            "seed": config.distil_seed,
        }
        self.guide: CtrlGuide | None = None

    @property
    def path(self) -> Path:
        """The HMM's file."""
        text = json.dumps(self._distillation, sort_keys=True)
        return self.cache / f"ctrlg-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def prepare(
        self, say: Callable[[str], None] = print, *, may_distil: bool = True, ranks: Ranks = ALONE
    ) -> dict[str, Any]:
        """Load the HMM from the cache or distil it, and compute the look-ahead tables. All ranks get rank 0's HMM,
        whose cache alone is looked into. Raises, on all, NonFiniteLogits, and UserError where there is none and
        `may_distil` is false.

        Returns facts for a record (JSON values): hidden_states, symbols, automaton_states, held_out_nats_per_token,
        model_nats_per_token (the language model's own), sentences, generated_tokens (0 if the HMM came from the cache),
        distil_s, tables_s, cached.
        """
        # Decoders keep their guide, and with it the tables of a writer that was here before.
        self.policy.decoders.clear()
        self.policy.graphs.clear()
        started = time.perf_counter()
        loaded = ranks.first_does(self._load)
        if loaded is None and not may_distil:
            raise UserError(f"there is no hidden Markov model of this very model, prompt and task in {self.cache}")
        model, symbol_V, facts = loaded or self._distil(say, ranks)
        distilled = time.perf_counter()
        ranks.each(lambda: self._look_ahead(model, symbol_V))
        return facts | {
            "generated_tokens": 0 if loaded else facts["distilled_tokens"],
            "hidden_states": self.hidden,
            "symbols": len(model.emission_SH),
            "automaton_states": len(self.automaton.next_RC) - 2,
            "cached": loaded is not None,
            "distil_s": round(distilled - started, 2),
            "tables_s": round(time.perf_counter() - distilled, 2),
        }

    def _look_ahead(self, model: HMM, symbol_V: Tensor) -> None:
        self.guide = CtrlGuide(
            self.automaton,
            model,
            symbol_V,
            self.prompts,
            self.sampling,
            self.config.guidance,
            self.policy.device,
        )
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)

    def _load(self) -> tuple[HMM, Tensor, dict[str, Any]] | None:
        # An HMM that was made in another dtype guides as well: weights are exact whatever guides.
        for path, unlike in ((self.path, ()), (PACKAGED, ("dtype",))):
            try:
                model, metadata, more = HMM.load(path)
                made = parse_json(metadata["distillation"])
                if made | {key: self._distillation[key] for key in unlike} == self._distillation:
                    return model, more["symbols"].long(), parse_json(metadata["facts"])
            except (OSError, SafetensorError, KeyError, ValueError, TypeError):
                continue  # absent, or cut short: made anew
        return None

    def _distil(self, say: Callable[[str], None], ranks: Ranks) -> tuple[HMM, Tensor, dict[str, Any]]:
        """The sentences are dealt out: they take longer the larger the model is, and fitting the HMM, which rank 0 does
        by itself, does not. Through the CPU the counts of a batch, some 50 MB, would be slower to send than to take."""
        say(f"distilling the model into an HMM of {self.hidden} states, from {self.sentences:,} of its own sentences")
        prompts = list(self.prompts.values())
        seed = self.config.distil_seed
        free = sample_freely(self.policy, prompts, self.sampling, self.sentences, seed, self.batch_size, say, ranks)
        # The recorder's buffers and graphs are not needed again.
        self.policy.decoders.clear()
        self.policy.graphs.clear()

        def fit_and_keep() -> tuple[HMM, Tensor, dict[str, Any]]:
            assert free is not None
            return self._fit(free, say)

        return ranks.first_does(fit_and_keep)

    def _fit(self, free: Free, say: Callable[[str], None]) -> tuple[HMM, Tensor, dict[str, Any]]:
        """The HMM of the sentences, in the cache from now on. Raises UserError."""
        prompts, seed = list(self.prompts.values()), self.config.distil_seed
        symbol_V = symbols(free, self.automaton.class_V)
        made = fit(free, symbol_V, len(prompts), self.hidden, self.config.em_passes, seed, say)
        facts = {
            "held_out_nats_per_token": round(made.held_out, 4),
            "model_nats_per_token": round(made.held_out_model, 4),
            "sentences": made.sentences,
            "distilled_tokens": made.tokens,
        }
        say(f"the HMM gives held-out tokens {made.held_out:.3f} nats each, the model itself {made.held_out_model:.3f}")
        metadata = {"distillation": json.dumps(self._distillation), "facts": json.dumps(facts)}
        part = self.path.with_suffix(".part")
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # what a kill left, or a link
            made.model.save(part, metadata, symbols=made.symbol_V)
            part.replace(self.path)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write the HMM to {self.cache} ({reason}): make room there, or set EQUIPOISE_CACHE to another "
                "folder"
            ) from None
        # On its way to other processes it must not name this one's GPU.
        return made.model.to(torch.device("cpu")), made.symbol_V, facts

    def __call__(self, keys: Sequence[Key], uniform_BT: Tensor) -> Written:
        """The sentences of `keys` from `uniform_BT`, (B, max_new_tokens) float64 in [0, 1) as `prompted.uniforms`
        draws them. One batch: the caller cuts. Every sentence meets the constraint. Raises NonFiniteLogits, and
        RuntimeError where memory does not suffice."""
        assert self.guide is not None, "prepare first"
        occupations, count = [key.occupation for key in keys], self.config.candidates
        prompts = [self.prompts[occupation] for occupation in occupations]
        # A candidate's numbers are the key's, shifted modulo 1: each is by itself as random as the first.
        rollouts = [
            sample(
                self.policy,
                prompts,
                self.sampling,
                uniform_BT=torch.remainder(uniform_BT + c / count, 1.0),
                guide=self.guide,
            ).cpu()
            for c in range(count)
        ]
        for rollout in rollouts:
            assert bool(rollout.report["valid"].all()), "a sentence that the automaton does not accept"
        log_weight_BC = torch.stack([rollout.report["log_weight"] for rollout in rollouts], dim=1)
        chosen_B, log_weight_B = _choose(log_weight_BC, uniform_BT.cpu())
        texts = [""] * len(keys)
        for c, rollout in enumerate(rollouts):
            rows = torch.nonzero(chosen_B == c).squeeze(-1)
            named = [occupations[i] for i in rows.tolist()]
            for i, text in zip(
                rows.tolist(), sentences_of(self.policy.tokenizer, rollout.select(rows), named, self.task), strict=True
            ):
                texts[i] = text
        return Written(texts, log_weight_B.tolist(), sum(int(rollout.lengths_B.sum()) for rollout in rollouts))


def _choose(log_weight_BC: Tensor, uniform_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) which candidate, drawn in proportion to its weight, and (B,) the log of the candidates' mean weight: an
    unbiased estimate of the same probability as a single one's (importance resampling; C. Andrieu, A. Doucet and
    R. Holenstein, 2010, JRSS B 72(3))."""
    count = log_weight_BC.shape[1]
    mean_B = torch.logsumexp(log_weight_BC, dim=1) - math.log(count)
    # The number's trailing bits, which decided no token.
    point_B1 = torch.remainder(uniform_BT[:, :1] * 2.0**26, 1.0)
    share_BC = torch.softmax(log_weight_BC, dim=1).cumsum(dim=1)
    return torch.searchsorted(share_BC, point_B1, right=True).squeeze(1).clamp(max=count - 1), mean_B
