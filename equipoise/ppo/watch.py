"""The hacking watch: signs that the reward rises for the wrong reasons, or that the policy collapses.

Every sign is a condition on numbers that are logged with each step (`watch/…`), so the same judgement can be repeated
from a run's `metrics.jsonl` with other thresholds. Such signs tell what has happened, not what will: they audit.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from equipoise.measures.variety import effective, masked, opening, pair_counts
from equipoise.ppo.config import WatchConfig
from equipoise.ppo.window import Sentence, Window
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS

SPEED_STEPS = 5  # speeds compare the mean of so many steps with that of as many before
START_STEPS = 2  # steps whose mean is what "at the start" means: the learning rate is still warming up
FEW = 64  # sentences below which a share says nothing


# What is measured


# A sentence stays in the window for several steps, and looking for its terms is what takes the time.
_mould = lru_cache(maxsize=4096)(masked)
_opening = lru_cache(maxsize=4096)(opening)


def _top_share(firsts: Sequence[str]) -> float:
    """Share of the commonest; 0 for too few."""
    return max(Counter(firsts).values()) / len(firsts) if len(firsts) >= FEW else 0.0


@lru_cache(maxsize=4096)
def _bigrams(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(pairwise(text.lower().split()[3:]))


def _distinct_2(sentences: Sequence[Sentence]) -> float:
    bigrams = [pair for s in sentences for pair in _bigrams(s.text)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def text_signs(recent: Window) -> dict[str, float]:
    """The numbers that follow from the last sentences alone."""
    rows = list(recent.sentences)
    pairs = pair_counts((s.agentic, s.communal) for s in rows)
    n = max(1, len(rows))
    terms = [len(s.agentic) + len(s.communal) for s in rows]
    return {
        "watch/top_agentic": _top_share([s.agentic[0] for s in rows if s.agentic]),
        "watch/top_communal": _top_share([s.communal[0] for s in rows if s.communal]),
        "watch/effective_pairs": effective(pairs),
        "watch/moulds": len({_mould(s.text, s.occupation) for s in rows}) / n,
        "watch/openings": effective(Counter(_opening(s.text) for s in rows)),
        "watch/distinct_2": _distinct_2(rows),
        "watch/unique": len({s.text for s in rows}) / n,
        "watch/nll": recent.mean(s.nll for s in rows),
        "watch/terms": sum(terms) / n,
        "watch/stuffed": sum(t > 2 for t in terms) / n,
        "watch/pinned": max(sum(s.words == bound for s in rows) for bound in (MIN_WORDS, MAX_WORDS)) / n,
        "watch/unfinished": sum(not s.finished for s in rows) / n,
        "watch/both": sum(s.both for s in rows) / n,
        "watch/one_class": sum(bool(s.agentic) != bool(s.communal) for s in rows) / n,
        "watch/reward": recent.mean(s.reward for s in rows),
        "watch/sentences": len(rows),
    }


# What is judged


class Sign(NamedTuple):
    """One named alert."""

    name: str
    holds: Callable[[Mapping[str, float], WatchConfig], bool]
    keys: tuple[str, ...]
    """The numbers that are its evidence."""
    meaning: str
    remedy: str
    actions: tuple[Literal["diversity", "opening", "kl", "rate"], ...]
    """What `rollback` changes; nothing where no checkpoint of the run is any better."""
    example: Callable[[Sentence], bool]
    """Sentences that show it."""


def _compliant(v: Mapping[str, float]) -> bool:
    return v["watch/both"] * v["watch/sentences"] >= FEW


SIGNS = (
    Sign(
        "synonyms",
        lambda v, c: min(v["watch/top_agentic"], v["watch/top_communal"]) > c.max_term_share and _compliant(v),
        ("watch/top_agentic", "watch/top_communal", "watch/effective_pairs"),
        "the same term of each class over and over",
        "add more diversity bonuses: --diversity-weight 0.3 (or more) --diversity-on both",
        ("diversity",),
        lambda s: s.both,
    ),
    Sign(
        "pairs",
        lambda v, c: v["watch/effective_pairs"] < c.min_effective_pairs and _compliant(v),
        ("watch/effective_pairs", "watch/both"),
        "hardly more than one pair of terms",
        "add more diversity bonuses: --diversity-weight 0.3 (or more) --diversity-on pairs",
        ("diversity",),
        lambda s: s.both,
    ),
    Sign(
        "structure",
        lambda v, c: (
            v["watch/moulds"] < c.min_moulds
            and v["watch/distinct_2"] < c.min_distinct_2
            and v["watch/openings"] < c.min_openings
        ),
        ("watch/moulds", "watch/distinct_2", "watch/openings"),
        "one sentence pattern with the terms exchanged",
        "add more diversity bonuses: --opening-weight 0.2; or a larger --kl-coef",
        ("opening", "kl"),
        lambda s: s.both,
    ),
    Sign(
        "duplicates",
        lambda v, c: v["watch/unique"] < c.min_unique,
        ("watch/unique", "watch/moulds"),
        "the same texts again and again",
        "add more diversity bonuses (--diversity-weight, --opening-weight), or --entropy-coef 0.01",
        ("opening", "kl"),
        lambda s: True,
    ),
    Sign(
        "fluency",
        lambda v, c: v["watch/reward"] >= c.fluency_reward and v["watch/nll_rise"] > c.max_nll_rise,
        ("watch/nll", "watch/nll_rise", "watch/reward"),
        "high reward for text that the reference model finds unnatural",
        "adjust learning rate or target_kl (smaller), or a larger --kl-coef",
        ("kl", "rate"),
        lambda s: s.reward >= 0.9,
    ),
    Sign(
        "stuffing",
        lambda v, c: v["watch/terms"] > c.max_terms or v["watch/stuffed"] > c.max_stuffed,
        ("watch/terms", "watch/stuffed"),
        "sentences are lists of terms",
        "increase the repetition penalty weight (--repetition-penalty 0.3), and lower --bonus-per-term or --bonus-max",
        ("kl", "rate"),
        lambda s: len(s.agentic) + len(s.communal) > 2,
    ),
    Sign(
        "length",
        lambda v, c: v["watch/pinned"] > c.max_pinned,
        ("watch/pinned",),
        "sentences sit at a bound of the length penalty",
        "widen the bounds (--min-words, --max-words) or lower --length-penalty",
        ("kl",),
        lambda s: s.words in (MIN_WORDS, MAX_WORDS),
    ),
    Sign(
        "unfinished",
        lambda v, c: v["watch/unfinished"] > max(c.max_unfinished, v["watch/unfinished_start"] + 0.1),
        ("watch/unfinished", "watch/unfinished_start"),
        "sentences do not end",
        "take off for it: --missing-eos-penalty 0.3; or pay for whole sentences: --strict-bonus 0.3",
        ("kl", "rate"),
        lambda s: not s.finished,
    ),
    Sign(
        "drift",
        lambda v, c: v["watch/kl_speed"] > c.max_kl_speed and v["watch/reward_speed"] < 0.005,
        ("watch/kl_speed", "watch/reward_speed"),
        "the policy leaves the reference model without earning more",
        "adjust learning rate or target_kl (smaller), a larger --kl-coef, or a --ref-kl-target",
        ("kl", "rate"),
        lambda s: True,
    ),
    Sign(
        "entropy",
        lambda v, c: v["watch/entropy"] < c.min_entropy,
        ("watch/entropy",),
        "the policy hardly varies any more",
        "--entropy-coef 0.01, add more diversity bonuses, or a larger --kl-coef",
        ("diversity", "kl"),
        lambda s: True,
    ),
    Sign(
        "plateau",
        lambda v, c: v["watch/one_class"] > c.min_one_class and v["watch/both"] < c.max_both,
        ("watch/one_class", "watch/both", "watch/unique"),
        "one class pays enough to stay with",
        "lower --base-one or raise --base-both; --warm-start forced; check --system for terms of the lists",
        ("kl", "rate"),
        lambda s: bool(s.agentic) != bool(s.communal),
    ),
    Sign(
        "leak",
        lambda v, c: v.get("watch/leaked_terms", 0) > 0,  # runs logged before it was measured lack it
        ("watch/leaked_terms",),
        "the prompt holds a term that the reward pays for, which the policy earns by copying",
        "an empty system message (--system ''), or a prompt without terms of the lists; in a new run",
        (),
        lambda s: bool(s.agentic or s.communal),
    ),
)


class Alert(NamedTuple):
    sign: Sign
    evidence: dict[str, Any]
    """The numbers, two sentences, and the terms of the prompt where they are the matter."""

    def line(self) -> str:
        numbers = [f"{k.partition('/')[2]} {v:.3g}" for k, v in self.evidence["numbers"].items()]
        shown = ", ".join([*numbers, *self.evidence.get("terms", ())])
        return f"alert {self.sign.name}: {self.sign.meaning} ({shown}). Remedy: {self.sign.remedy}"


class Watch:
    """Looks at every step. `leaked`: the terms in the prompt. All else it knows is in `state`."""

    def __init__(self, config: WatchConfig, leaked: Sequence[str] = ()) -> None:
        self.config = config
        self.leaked = tuple(leaked)
        self.start: dict[str, list[float]] = {"nll": [], "unfinished": []}
        self.series: dict[str, deque[float]] = {
            name: deque(maxlen=2 * SPEED_STEPS) for name in ("kl", "reward", "entropy")
        }
        self.held: dict[str, deque[int]] = {s.name: deque(maxlen=config.alert_within) for s in SIGNS}
        self.standing: set[str] = set()
        self.healthy_step: int | None = None
        """The last checkpoint at which the watch was at ease."""

    def measure(self, recent: Window, batch: Sequence[Sentence], entropy: float) -> dict[str, float]:
        """The `watch/…` numbers of a step whose sentences, `batch`, are in `recent` already."""
        n = len(batch)
        if len(self.start["nll"]) < START_STEPS:
            self.start["nll"].append(sum(s.nll for s in batch) / n)
            self.start["unfinished"].append(sum(not s.finished for s in batch) / n)
        self.series["kl"].append(sum(s.kl for s in batch) / n)
        self.series["reward"].append(sum(s.reward for s in batch) / n)
        self.series["entropy"].append(entropy)
        values = text_signs(recent)
        at_start = {name: sum(seen) / len(seen) for name, seen in self.start.items()}
        last = list(self.series["entropy"])[-SPEED_STEPS:]
        return {
            **values,
            "watch/nll_rise": values["watch/nll"] - at_start["nll"],
            "watch/unfinished_start": at_start["unfinished"],
            "watch/kl_speed": _speed(self.series["kl"]),
            "watch/reward_speed": _speed(self.series["reward"]),
            "watch/entropy": sum(last) / len(last),
            "watch/leaked_terms": len(self.leaked),
        }

    def judge(self, step: int, values: Mapping[str, float]) -> list[Sign]:
        """The signs whose alert is raised by this step: each held in `alert_after` of the last `alert_within` steps.

        An alert stands until its sign has not held for `alert_within` steps; only then can it be raised again.
        """
        raised = []
        for sign in SIGNS:
            held = self.held[sign.name]
            held.append(int(sign.holds(values, self.config)))
            if sign.name in self.standing:
                if not any(held):
                    self.standing.discard(sign.name)
            elif sum(held) >= self.config.alert_after and step >= self.config.alert_from_step:
                self.standing.add(sign.name)
                raised.append(sign)
        return raised

    @property
    def at_ease(self) -> bool:
        """No sign held in the last step, but such as no checkpoint is free of."""
        treatable = (self.held[sign.name] for sign in SIGNS if sign.actions)
        return not any(held and held[-1] for held in treatable)

    def state(self) -> dict[str, Any]:
        return {
            "start": {name: list(values) for name, values in self.start.items()},
            "series": {name: list(values) for name, values in self.series.items()},
            "held": {name: list(values) for name, values in self.held.items()},
            "standing": sorted(self.standing),
            "healthy_step": self.healthy_step,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.start = {name: list(values) for name, values in state["start"].items()}
        for name, series in self.series.items():
            series.clear()
            series.extend(state["series"][name])
        for name, held in self.held.items():
            held.clear()
            held.extend(state["held"][name])
        self.standing = set(state["standing"])
        self.healthy_step = state["healthy_step"]


def _speed(series: Sequence[float]) -> float:
    """Change per step: the mean of the last `SPEED_STEPS` values against that of those before; 0 while too few."""
    values = list(series)
    if len(values) < 2 * SPEED_STEPS:
        return 0.0
    return (sum(values[SPEED_STEPS:]) - sum(values[:SPEED_STEPS])) / SPEED_STEPS**2


def explain(sign: Sign, values: Mapping[str, float], recent: Window, leaked: Sequence[str] = ()) -> Alert:
    """The alert with its evidence: the sign's numbers, its two latest sentences that differ, for `leak` the terms."""
    shown: list[str] = []
    for s in reversed(recent.sentences):
        if sign.example(s) and s.text not in shown:
            shown.append(s.text)
        if len(shown) == 2:
            break
    numbers = {key: round(float(values[key]), 6) for key in sign.keys}
    terms = {"terms": list(leaked)} if sign.name == "leak" else {}
    return Alert(sign, {"numbers": numbers, "sentences": shown, **terms})
