"""The signs of the hacking watch: when each holds, its evidence, what it means and what helps.

Each is a condition on numbers that are logged with every step (`watch/…`), so the same judgement can be repeated from a
run's `metrics.jsonl` with other thresholds.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from equipoise.ppo.watch_config import WatchConfig
from equipoise.ppo.window import Sentence
from equipoise.protocol.task import Task

FEW = 64  # sentences below which a share says nothing


class Sign(NamedTuple):
    """One named alert."""

    name: str
    holds: Callable[[Mapping[str, float], WatchConfig, Task], bool]
    keys: tuple[str, ...]
    """The numbers that are its evidence; `*` stands for each class's name."""
    meaning: str
    """What it means; `{pair}` stands for a term of each class, `{some}` for "one class pays"."""
    remedy: str
    """What helps; `{bounds}` stands for the task's."""
    actions: tuple[Literal["diversity", "opening", "kl", "rate"], ...]
    """What `rollback` changes; nothing where no checkpoint of the run is any better."""
    example: Callable[[Sentence, Task], bool]
    """Sentences that show it."""

    def says(self, task: Task) -> str:
        """What it means for the task."""
        classes = len(task.classes)
        pair = {1: "term", 2: "pair of terms"}.get(classes, "combination of terms")
        return self.meaning.format(pair=pair, some="one class pays" if classes < 3 else "some of the classes pay")

    def evidence_keys(self, task: Task) -> list[str]:
        """The names of the numbers that are its evidence."""
        names = [name.name for name in task.classes]
        return [key.replace("*", name) for key in self.keys for name in (names if "*" in key else [""])]


def _top_shares(v: Mapping[str, float], task: Task) -> float:
    """The smallest of the classes' commonest terms' shares; a class of one term has no other to write."""
    shares = [v[f"watch/top_{c.name}"] for c in task.classes if len(c.terms) > 1]
    return min(shares, default=0.0)


def _compliant(v: Mapping[str, float]) -> bool:
    return v["watch/both"] * v["watch/sentences"] >= FEW


SIGNS = (
    Sign(
        "synonyms",
        lambda v, c, t: _top_shares(v, t) > c.max_term_share and _compliant(v),
        ("watch/top_*", "watch/effective_pairs"),
        "the same term of each class over and over",
        "add more diversity bonuses: --diversity-weight 0.3 (or more) --diversity-on both",
        ("diversity",),
        lambda s, t: s.complete,
    ),
    Sign(
        "pairs",
        lambda v, c, t: v["watch/effective_pairs"] < c.min_effective_pairs < t.pair_count and _compliant(v),
        ("watch/effective_pairs", "watch/both"),
        "hardly more than one {pair}",
        "add more diversity bonuses: --diversity-weight 0.3 (or more) --diversity-on pairs",
        ("diversity",),
        lambda s, t: s.complete,
    ),
    Sign(
        "structure",
        lambda v, c, t: (
            v["watch/moulds"] < c.min_moulds
            and v["watch/distinct_2"] < c.min_distinct_2
            and v["watch/openings"] < c.min_openings
        ),
        ("watch/moulds", "watch/distinct_2", "watch/openings"),
        "one sentence pattern with the terms exchanged",
        "add more diversity bonuses: --opening-weight 0.2; or a larger --kl-coef",
        ("opening", "kl"),
        lambda s, t: s.complete,
    ),
    Sign(
        "duplicates",
        lambda v, c, t: v["watch/unique"] < c.min_unique,
        ("watch/unique", "watch/moulds"),
        "the same texts again and again",
        "add more diversity bonuses (--diversity-weight, --opening-weight), or --entropy-coef 0.01",
        ("opening", "kl"),
        lambda s, t: True,
    ),
    Sign(
        "fluency",
        lambda v, c, t: v["watch/reward"] >= c.fluency_reward and v["watch/nll_rise"] > c.max_nll_rise,
        ("watch/nll", "watch/nll_rise", "watch/reward"),
        "high reward for text that the reference model finds unnatural",
        "adjust learning rate or target_kl (smaller), or a larger --kl-coef",
        ("kl", "rate"),
        lambda s, t: s.reward >= 0.9,
    ),
    Sign(
        "stuffing",
        lambda v, c, t: v["watch/terms"] - (len(t.classes) - 2) > c.max_terms or v["watch/stuffed"] > c.max_stuffed,
        ("watch/terms", "watch/stuffed"),
        "sentences are lists of terms",
        "increase the repetition penalty weight (--repetition-penalty 0.3), and lower --bonus-per-term or --bonus-max",
        ("kl", "rate"),
        lambda s, t: s.term_count > len(t.classes),
    ),
    Sign(
        "length",
        lambda v, c, t: v["watch/pinned"] > c.max_pinned,
        ("watch/pinned",),
        "sentences sit at a bound of the length penalty",
        "widen the task's bounds, now {bounds} (--min-words, --max-words, or words: in the task file), or lower "
        "--length-penalty",
        ("kl",),
        lambda s, t: s.words in (t.min_words, t.max_words),
    ),
    Sign(
        "unfinished",
        lambda v, c, t: v["watch/unfinished"] > max(c.max_unfinished, v["watch/unfinished_start"] + 0.1),
        ("watch/unfinished", "watch/unfinished_start"),
        "sentences do not end",
        "take off for it: --missing-eos-penalty 0.3; or pay for whole sentences: --strict-bonus 0.3",
        ("kl", "rate"),
        lambda s, t: not s.finished,
    ),
    Sign(
        "drift",
        lambda v, c, t: v["watch/kl_speed"] > c.max_kl_speed and v["watch/reward_speed"] < 0.005,
        ("watch/kl_speed", "watch/reward_speed"),
        "the policy leaves the reference model without earning more",
        "adjust learning rate or target_kl (smaller), a larger --kl-coef, or a --ref-kl-target",
        ("kl", "rate"),
        lambda s, t: True,
    ),
    Sign(
        "entropy",
        lambda v, c, t: v["watch/entropy"] < c.min_entropy,
        ("watch/entropy",),
        "the policy hardly varies any more",
        "--entropy-coef 0.01, add more diversity bonuses, or a larger --kl-coef",
        ("diversity", "kl"),
        lambda s, t: True,
    ),
    Sign(
        "plateau",
        lambda v, c, t: v["watch/one_class"] > c.min_one_class and v["watch/both"] < c.max_both,
        ("watch/one_class", "watch/both", "watch/unique"),
        "{some} enough to stay with",
        "lower --base-one or raise --base-both; --warm-start forced; check --system for terms of the lists",
        ("kl", "rate"),
        lambda s, t: s.partial,
    ),
    Sign(
        "leak",
        lambda v, c, t: v.get("watch/leaked_terms", 0) > 0,  # runs logged before it was measured lack it
        ("watch/leaked_terms",),
        "the prompt holds a term that the reward pays for, which the policy earns by copying",
        "an empty system message (--system ''), or a prompt without terms of the lists; in a new run",
        (),
        lambda s, t: any(s.terms),
    ),
)
