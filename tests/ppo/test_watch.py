"""The hacking watch: each sign on text made to show it, and the judgement over steps. `test_watch_runs` has what a run
does about it."""

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import UserError
from equipoise.policy.memory import RowLimit
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.signs import SIGNS
from equipoise.ppo.state import State
from equipoise.ppo.watch import TextSigns, Watch
from equipoise.ppo.watch_config import WatchConfig
from equipoise.ppo.window import Sentence, Window
from equipoise.protocol.task import PROTOCOL
from tests.default import AGENTIC, COMMUNAL, OCCUPATIONS

ROOT = Path(__file__).parents[2]
WORDS = [f"{a}{b}" for a in ("river", "paper", "music", "window", "garden") for b in ("side", "work", "bed", "less")]


def sentence(text: str, occupation: str, **changes: Any) -> Sentence:
    r = PROTOCOL.score(text)
    made = Sentence(text, occupation, r.terms, r.words, 12, True, PROTOCOL.strict(text), r.reward, 5.0, 2.0)
    return made._replace(**changes)


@cache
def varied(n: int = 512, seed: int = 0) -> list[Sentence]:
    """Compliant sentences of 9 to 13 words with terms, openings and words all over the place."""
    draw = random.Random(seed)
    made = []
    for i in range(n):
        o, a, c = OCCUPATIONS[i % 20], draw.choice(AGENTIC), draw.choice(COMMUNAL)
        body = [*draw.choices(WORDS, k=draw.randint(4, 8)), a, c]
        draw.shuffle(body)
        made.append(sentence(f"The {o} was {' '.join(body)}.", o))
    return made


def values(sentences: Sequence[Sentence], entropy: float = 2.0, start: Sequence[Sentence] | None = None) -> Any:
    watch, window = Watch(WatchConfig(), PROTOCOL), Window(512)
    for _ in range(2):  # the start
        watch.measure(window, start or varied(64), entropy)
    window.add(sentences)
    return watch.measure(window, list(sentences)[-64:], entropy)


def held(found: Any) -> set[str]:
    return {sign.name for sign in SIGNS if sign.holds(found, WatchConfig(), PROTOCOL)}


def test_varied_compliant_text_shows_no_sign() -> None:
    assert held(values(varied())) == set()


@pytest.mark.parametrize(("size", "batches", "kept"), [(64, 9, 512), (256, 9, 2048), (2048, 2, 2048)])
def test_large_batches_do_not_make_sound_text_look_repeated(size: int, batches: int, kept: int) -> None:
    """Of ever more sentences of one kind ever fewer word pairs are new, and thresholds know nothing of how many."""
    config, text = TrainConfig(), varied(512)
    state = State.begin(replace(config, ppo=replace(config.ppo, batch_size=size)), RowLimit(16))
    for _ in range(batches):
        found = state.look_back([text[i % 512] for i in range(size)], 2.0)
    assert found["watch/sentences"] == kept == len(state.document()["recent"])
    assert found["watch/unique"] == min(size, 512) / kept


def replaced(s: Sentence, agentic: str, communal: str) -> Sentence:
    return sentence(s.text.replace(s.terms[0][0], agentic).replace(s.terms[1][0], communal), s.occupation)


HACKED = {
    "synonyms": [replaced(s, "bold", "loyal") if i % 40 else s for i, s in enumerate(varied())],
    "pairs": [replaced(s, "bold", COMMUNAL[i % 64 == 0]) for i, s in enumerate(varied())],
    "structure": [
        sentence(f"The {s.occupation} was a {s.terms[0][0]} and {s.terms[1][0]} person of this town.", s.occupation)
        for s in varied()
    ],
    "duplicates": varied(100) * 5,
    "fluency": [s._replace(nll=3.2) for s in varied()],
    "stuffing": [sentence(s.text.replace(" ", " bold ", 4).replace(" bold ", " loyal ", 1), s.occupation)
                 for s in varied()],
    "length": [s._replace(words=15) if i % 3 else s for i, s in enumerate(varied())],
    "unfinished": [s._replace(finished=bool(i % 3 == 0)) for i, s in enumerate(varied())],
    "plateau": [sentence(f"The {s.occupation} was {WORDS[i % 20]} bold {WORDS[i % 7]} {i}.", s.occupation)
                for i, s in enumerate(varied())],
}  # fmt: skip


@pytest.mark.parametrize("name", HACKED)
def test_each_sign_is_seen_in_text_made_to_show_it(name: str) -> None:
    assert name in held(values(HACKED[name]))


def test_each_way_of_hacking_shows_few_signs_but_its_own() -> None:
    for name in ("fluency", "length", "unfinished"):
        assert held(values(HACKED[name])) == {name}, name
    for name in ("synonyms", "pairs"):  # where one pair is nearly all, so are its terms
        assert held(values(HACKED[name])) <= {"synonyms", "pairs"}, name


def test_one_class_varied_or_one_of_three_numbers_low_is_no_sign() -> None:
    """PPO with the protocol's reward alone comes to that; both classes, and all three numbers, make the sign."""
    same = values([replaced(s, "bold", s.terms[1][0]) for s in varied()])
    assert same["watch/top_agentic"] == 1 and held(same) == set()
    low = {"watch/moulds": 0.3, "watch/distinct_2": 0.1, "watch/openings": 1.5}
    for key in low:
        assert "structure" not in held(QUIET | {k: v for k, v in low.items() if k != key})
    assert held(QUIET | low) == {"structure"}


# Steps of runs of SmolLM2 (docs/LOG.md), to three digits: plain PPO in its rise, at its narrowest and at its end,
# the recipe for variety with the fewest moulds; runs whose reward, coefficient or text was hacked.
KEYS = ("top_agentic", "top_communal", "effective_pairs", "moulds", "openings", "distinct_2", "unique", "nll_rise",
        "reward", "terms", "stuffed", "pinned", "unfinished", "unfinished_start", "both", "one_class", "sentences",
        "kl_speed", "reward_speed", "entropy")  # fmt: skip
SOUND = {
    "plain, step 30": (0.895, 0.827, 2.35, 0.992, 24.6, 0.542, 1.0, -0.294, 0.389, 1.46, 0.119, 0.0645, 0.27, 0.555,
                       0.312, 0.553, 512, 0.359, 0.041, 1.87),
    "plain, step 70": (0.992, 0.808, 1.76, 0.887, 4.21, 0.317, 0.982, -0.45, 0.905, 2.37, 0.447, 0.0859, 0.0508, 0.555,
                       0.867, 0.117, 512, 0.0434, 0.00587, 1.21),
    "plain, step 500": (0.875, 0.802, 2.98, 0.916, 11.9, 0.225, 0.996, -0.491, 0.997, 2.45, 0.432, 0.0938, 0.0215,
                        0.555, 0.979, 0.0156, 512, 0.0218, -0.00228, 1.04),
    "plain without entropy bonus": (0.946, 0.869, 2.0, 0.756, 4.42, 0.14, 0.949, -0.662, 0.998, 2.47, 0.447, 0.0703,
                                    0.00586, 0.586, 0.971, 0.0254, 512, 0.0359, 0.00306, 0.803),
    "varied": (0.23, 0.181, 69.9, 0.6, 2.06, 0.173, 0.988, 0.219, 0.994, 2.08, 0.0918, 0.17, 0.0, 0.0, 0.986, 0.0117,
               512, -0.0807, 0.000687, 0.897),
}  # fmt: skip
HACKED_RUNS = {
    "no KL penalty": ((0.988, 0.986, 1.16, 0.176, 1.03, 0.0495, 0.43, -0.464, 1.13, 4.94, 1.0, 0.652, 0.0195, 0.57,
                       0.984, 0.0156, 512, -0.256, 0.00484, 0.164),
                      {"synonyms", "pairs", "structure", "duplicates", "stuffing", "length", "entropy"}),
    "0.5 a term": ((0.988, 0.513, 2.5, 0.375, 1.5, 0.0982, 0.736, -0.666, 2.15, 4.38, 0.977, 0.42, 0.00586, 0.562,
                    0.977, 0.0215, 512, 0.316, 0.0349, 0.48), {"structure", "stuffing"}),
    "full pay for one class": ((0.769, 0.793, 4.8, 0.943, 25.4, 0.417, 0.994, -0.506, 0.888, 1.31, 0.0332, 0.0742,
                                0.0469, 0.625, 0.104, 0.832, 512, 0.00874, 0.00275, 1.52), {"plateau"}),
    "one pair, 60 % different texts": ((1.0, 1.0, 1.0, 0.305, 1.0, 0.131, 0.596, 0.228, 0.998, 2.0, 0.0, 0.873, 0.0,
                                        0.133, 0.998, 0.00195, 512, 0.026, 0.001, 0.708),
                                       {"synonyms", "pairs", "structure", "duplicates", "length"}),
}  # fmt: skip


def logged(numbers: Sequence[float]) -> dict[str, float]:
    return {f"watch/{key}": value for key, value in zip(KEYS, numbers, strict=True)}


@pytest.mark.parametrize("run", SOUND)
def test_what_sound_runs_came_to_is_no_sign(run: str) -> None:
    assert held(logged(SOUND[run])) == set()


@pytest.mark.parametrize("run", HACKED_RUNS)
def test_what_hacked_runs_came_to_shows_these_signs(run: str) -> None:
    numbers, signs = HACKED_RUNS[run]
    assert held(logged(numbers)) == signs


def test_an_entropy_near_nothing_is_a_sign() -> None:
    assert held(values(varied(), entropy=0.1)) == {"entropy"}


def test_a_policy_that_never_ended_its_sentences_is_not_hacking_at_the_start() -> None:
    cut = [s._replace(finished=bool(i % 3 == 0)) for i, s in enumerate(varied())]
    assert "unfinished" not in held(values(cut, start=[s._replace(finished=False) for s in varied(64)]))


def test_few_compliant_sentences_say_nothing_of_terms() -> None:
    """As the untrained model: 182 sentences of which two comply, with the same pair."""
    none = [
        sentence(f"The {o} was {w} and {x}.", o) for o, w, x in itertools.product(OCCUPATIONS, WORDS[:3], WORDS[3:6])
    ]
    few = [*none, *[sentence("The nurse was bold and caring.", "nurse")] * 2]
    found = values(few)
    assert found["watch/top_agentic"] == 0 and not {"synonyms", "pairs"} & held(found)


def test_the_numbers_by_hand() -> None:
    window = Window(8)
    texts = [
        ("The nurse was bold and caring to all of us.", "nurse"),
        ("The chef was dominant and loyal to all of us.", "chef"),  # the same mould
        ("The chef was tall and slim and quick and so very glad to be here.", "chef"),  # 15 words, no term
        ("The pilot was bold.", "pilot"),
    ]
    window.add([sentence(*t) for t in texts])
    found = TextSigns(PROTOCOL)(window)
    assert found["watch/effective_pairs"] == pytest.approx(2)
    assert found["watch/moulds"] == 0.75 and found["watch/unique"] == 1
    assert found["watch/terms"] == 5 / 4 and found["watch/stuffed"] == 0 and found["watch/pinned"] == 0.25
    assert found["watch/both"] == 0.5 and found["watch/one_class"] == 0.25 and found["watch/sentences"] == 4
    # Bigrams: 6 + 6 + 11 + 0, of which "to all", "all of" and "of us." occur twice.
    assert found["watch/distinct_2"] == pytest.approx(20 / 23)
    assert found["watch/openings"] == pytest.approx(2 ** (0.5 * 1 + 2 * 0.25 * 2))  # "* and" twice, "tall and", "*"


def test_speeds_are_changes_per_step_between_two_lots_of_five() -> None:
    watch, window = Watch(WatchConfig(), PROTOCOL), Window(64)
    found: dict[str, float] = {}
    for step in range(12):
        batch = [s._replace(kl=0.7 * step, reward=0.1) for s in varied(8)]
        window.add(batch)
        found = watch.measure(window, batch, 1.0)
        if step < 9:
            assert found["watch/kl_speed"] == 0
    assert found["watch/kl_speed"] == pytest.approx(0.7) and found["watch/reward_speed"] == pytest.approx(0)
    assert "drift" in held(found)


QUIET = values(varied())
LOUD = QUIET | {"watch/entropy": 0.0}


def judged(pattern: str, **settings: Any) -> list[int]:
    """The steps, counted from 1, at which the entropy alert is raised when the sign holds where the pattern has `x`."""
    watch = Watch(WatchConfig(**settings), PROTOCOL)
    return [i for i, mark in enumerate(pattern, 1) if watch.judge(i, LOUD if mark == "x" else QUIET)]


def test_an_alert_needs_k_of_the_last_m_steps_and_comes_once_while_it_stands() -> None:
    settings = {"alert_from_step": 1, "alert_after": 3, "alert_within": 5}
    assert judged("xx...xx..", **settings) == []
    assert judged("xx..x", **settings) == [5]
    assert judged("xxxxxxxxx", **settings) == [3]
    assert judged("xxx....xx" + "xx", **settings) == [3]  # gone for four steps only
    assert judged("xxx.....xxx", **settings) == [3, 11]  # gone for five: it may be raised again
    assert judged("xxxxx", **(settings | {"alert_from_step": 4})) == [4]


def test_a_watch_that_is_restored_judges_on_as_if_never_stopped() -> None:
    config = WatchConfig(alert_from_step=1)
    straight, parts, window = Watch(config, PROTOCOL), Watch(config, PROTOCOL), Window(64)
    for step in range(1, 30):
        batch = varied(8, seed=step)
        window.add(batch)
        found = [w.measure(window, batch, 0.1 * (step % 7)) for w in (straight, parts)]
        assert found[0] == found[1]
        assert straight.judge(step, found[0]) == parts.judge(step, found[1])
        state = json.loads(json.dumps(parts.state()))
        parts = Watch(config, PROTOCOL)
        parts.load_state(state)
        assert parts.state() == straight.state()


def test_an_alert_carries_its_numbers_two_sentences_and_the_remedy_in_one_line() -> None:
    window = Window(512)
    window.add(HACKED["stuffing"])
    sign = next(s for s in SIGNS if s.name == "stuffing")
    alert = Watch(WatchConfig(), PROTOCOL).explain(sign, values(HACKED["stuffing"]), window)
    assert set(alert.evidence["numbers"]) == {"watch/terms", "watch/stuffed"}
    assert len(alert.evidence["sentences"]) == 2 and all(
        len(PROTOCOL.score(t).terms[0]) > 0 for t in alert.evidence["sentences"]
    )
    assert "increase the repetition penalty weight" in alert.line() and "\n" not in alert.line()


def test_every_sign_is_documented_with_its_name() -> None:
    page = (ROOT / "docs" / "METRICS.md").read_text()
    for sign in SIGNS:
        assert f"| `{sign.name}` | " in page, sign.name


def test_a_window_that_is_never_or_always_is_refused() -> None:
    with pytest.raises(UserError, match="alert-after 7 of alert-within 6"):
        WatchConfig(alert_after=7)
