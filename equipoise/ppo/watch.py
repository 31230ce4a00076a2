"""The hacking watch: it measures every step and raises an alert where a sign of `signs.py` holds for long enough.

The signs tell that the reward rises for the wrong reasons, or that the policy collapses. They tell what has happened,
not what will: they audit.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from equipoise.measures.variety import effective, pair_counts
from equipoise.ppo.signs import FEW, SIGNS, Sign
from equipoise.ppo.watch_config import WatchConfig
from equipoise.ppo.window import Sentence, Window
from equipoise.protocol.task import Task

SPEED_STEPS = 5  # speeds compare the mean of so many steps with that of as many before
START_STEPS = 2  # steps whose mean is what "at the start" means: the learning rate is still warming up


def _top_share(firsts: Sequence[str]) -> float:
    """Share of the commonest; 0 for too few."""
    return max(Counter(firsts).values()) / len(firsts) if len(firsts) >= FEW else 0.0


class TextSigns:
    """The numbers that follow from the last sentences alone. A sentence stays in the window for several steps, and
    looking for its terms is what takes the time, so what is found is remembered."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._mould = lru_cache(maxsize=4096)(task.mould)
        self._opening = lru_cache(maxsize=4096)(task.opening)
        self._bigrams = lru_cache(maxsize=4096)(self._word_pairs)

    def _word_pairs(self, text: str, occupation: str) -> tuple[tuple[str, str], ...]:
        """Adjacent words of what follows the prefix."""
        return tuple(pairwise(text.lower().split()[self.task.prefix_words(occupation) :]))

    def __call__(self, recent: Window) -> dict[str, float]:
        rows = list(recent.sentences)
        n = max(1, len(rows))
        counts = [s.term_count for s in rows]
        bigrams = [pair for s in rows for pair in self._bigrams(s.text, s.occupation)]
        bounds = (self.task.min_words, self.task.max_words)
        return {
            **{
                f"watch/top_{c.name}": _top_share([s.terms[i][0] for s in rows if s.terms[i]])
                for i, c in enumerate(self.task.classes)
            },
            "watch/effective_pairs": effective(pair_counts(s.pair for s in rows)),
            "watch/moulds": len({self._mould(s.text, s.occupation) for s in rows}) / n,
            "watch/openings": effective(Counter(self._opening(s.text, s.occupation) for s in rows)),
            "watch/distinct_2": len(set(bigrams)) / len(bigrams) if bigrams else 1.0,
            "watch/unique": len({s.text for s in rows}) / n,
            "watch/nll": recent.mean(s.nll for s in rows),
            "watch/terms": sum(counts) / n,
            "watch/stuffed": sum(count > len(self.task.classes) for count in counts) / n,
            "watch/pinned": max(sum(s.words == bound for s in rows) for bound in bounds) / n,
            "watch/unfinished": sum(not s.finished for s in rows) / n,
            "watch/both": sum(s.complete for s in rows) / n,
            "watch/one_class": sum(s.partial for s in rows) / n,
            "watch/reward": recent.mean(s.reward for s in rows),
            "watch/sentences": len(rows),
        }


class Alert(NamedTuple):
    sign: Sign
    meaning: str
    remedy: str
    evidence: dict[str, Any]
    """The numbers, two sentences, and the terms of the prompt where they are the matter."""

    def line(self) -> str:
        numbers = [f"{k.partition('/')[2]} {v:.3g}" for k, v in self.evidence["numbers"].items()]
        shown = ", ".join([*numbers, *self.evidence.get("terms", ())])
        return f"alert {self.sign.name}: {self.meaning} ({shown}). Remedy: {self.remedy}"


class Watch:
    """Looks at every step. `leaked`: the terms in the prompt. All else it knows is in `state`."""

    def __init__(self, config: WatchConfig, task: Task, leaked: Sequence[str] = ()) -> None:
        self.config, self.task = config, task
        self.text_signs = TextSigns(task)
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
        values = self.text_signs(recent)
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
            held.append(int(sign.holds(values, self.config, self.task)))
            if sign.name in self.standing:
                if not any(held):
                    self.standing.discard(sign.name)
            elif sum(held) >= self.config.alert_after and step >= self.config.alert_from_step:
                self.standing.add(sign.name)
                raised.append(sign)
        return raised

    def explain(self, sign: Sign, values: Mapping[str, float], recent: Window) -> Alert:
        """The alert with its evidence: the sign's numbers, its two latest sentences that differ, for `leak` the
        terms."""
        shown: list[str] = []
        for s in reversed(recent.sentences):
            if sign.example(s, self.task) and s.text not in shown:
                shown.append(s.text)
            if len(shown) == 2:
                break
        numbers = {key: round(float(values[key]), 6) for key in sign.evidence_keys(self.task)}
        terms = {"terms": list(self.leaked)} if sign.name == "leak" else {}
        remedy = sign.remedy.format(bounds=self.task.bounds)
        return Alert(sign, sign.says(self.task), remedy, {"numbers": numbers, "sentences": shown, **terms})

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
