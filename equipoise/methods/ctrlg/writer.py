"""Ctrl-G as a writer: prepared once for a model and its prompts, then asked for the sentences of any keys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from equipoise.methods.completions import Key
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.policy.load import Policy
from equipoise.policy.prompt import Tokenizer
from equipoise.policy.sample import SamplingConfig
from equipoise.protocol.lexicon import LEXICON, Lexicon
from equipoise.protocol.prompts import Prompt


@dataclass(frozen=True)
class Written:
    """Sentences in the order of their keys."""

    texts: list[str]
    log_weights: list[float]
    """log(p/q) of each sentence: p its probability under the model at this temperature, q under Ctrl-G, in nats.
    The mean of exp(log_weights) estimates without bias the share of the model's own sentences that comply."""
    tokens: int
    """Tokens drawn for them, the stop tokens counted."""


def check_feasible(
    tokenizer: Tokenizer, prompt: Prompt, sampling: SamplingConfig, config: CtrlGConfig, lexicon: Lexicon = LEXICON
) -> None:
    """Raises UserError, with the reason, if no sentence can meet the constraint within the bounds or the token limit,
    or if the tokenizer's tokens have no known bytes, or for temperature 0. Needs no weights: call it before loading.
    """
    raise NotImplementedError


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
        lexicon: Lexicon = LEXICON,
    ) -> None:
        """`prompts` maps each occupation to its prompt's token ids, `weights` is `prompted.fingerprint` of the model;
        both, and the settings, name the HMM's file in the folder `cache`.

        `sampling.top_p` is applied to the guided distribution, after the constraint: the model's own nucleus can lack
        every token that still allows a valid sentence. Give 1 for importance weights that cover all valid sentences.
        Raises UserError as `check_feasible`.
        """
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the sentences besides weights, prompts, sampling and seed: JSON values for a file's record."""
        raise NotImplementedError

    def prepare(self, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Load the HMM from the cache or distil it, and compute the look-ahead tables. Raises NonFiniteLogits.

        Returns facts for a record (JSON values): hidden_states, symbols, automaton_states, held_out_nats_per_token,
        sentences, generated_tokens (0 if the HMM came from the cache), distil_s, tables_s, cached.
        """
        raise NotImplementedError

    def __call__(self, keys: Sequence[Key], uniform_BT: Tensor) -> Written:
        """The sentences of `keys` from `uniform_BT`, (B, max_new_tokens) float64 in [0, 1) as `prompted.uniforms`
        draws them. One batch: the caller cuts. Every sentence meets the constraint. Raises NonFiniteLogits, and
        RuntimeError where memory does not suffice."""
        raise NotImplementedError
