"""The hacking watch: each sign on text made to show it, the judgement over steps, and what a run does about it."""

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import UserError
from equipoise.policy.memory import RowLimit
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.signs import SIGNS, Sign
from equipoise.ppo.state import State
from equipoise.ppo.train import Outcome, train
from equipoise.ppo.watch import TextSigns, Watch
from equipoise.ppo.watch_config import WatchConfig
from equipoise.ppo.window import Sentence, Window
from equipoise.protocol.task import PROTOCOL
from tests.default import AGENTIC, COMMUNAL, OCCUPATIONS
from tests.tiny import CHAT_TEMPLATE, words_folder

from .small import checkpoints, events, results, rows, small_config

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


# In a run. With these thresholds the sign of low entropy holds at every step: the alert comes at step 3.
ALWAYS = {"min_entropy": 1e9, "alert_from_step": 1, "alert_after": 3, "alert_within": 3}
OFF = {"min_moulds": 0.0, "min_distinct_2": 0.0, "min_openings": 0.0, "min_unique": 0.0, "max_pinned": 1.0,
       "max_unfinished": 1.0, "max_terms": 99.0, "max_stuffed": 1.0, "max_kl_speed": 99.0}  # fmt: skip


def alerts(where: Path) -> list[dict[str, Any]]:
    lines = (where / "out" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "alert"]


def test_a_warning_is_written_down_printed_in_one_line_and_changes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet, warned = tmp_path / "quiet", tmp_path / "warned"
    train(small_config(model, quiet, **OFF, min_entropy=0.0))
    capsys.readouterr()
    assert train(small_config(model, warned, **OFF, **ALWAYS)) == Outcome("done", 6, 0)
    (alert,) = alerts(warned)
    assert (alert["step"], alert["name"]) == (3, "entropy") and len(alert["evidence"]["sentences"]) == 2
    assert alert["evidence"]["numbers"] == {"watch/entropy": pytest.approx(rows(warned)[2]["watch/entropy"])}
    out = capsys.readouterr().out
    assert out.count("step 3: alert entropy:") == 1 and "alerts     entropy ×1" in out
    assert [row["watch/standing"] for row in rows(warned)] == [0, 0, 1, 1, 1, 1]
    for a, b in zip(rows(quiet), rows(warned), strict=True):
        assert {k: v for k, v in a.items() if k != "watch/standing"} == {
            k: v for k, v in b.items() if k != "watch/standing"
        }


def test_with_stop_the_run_saves_and_ends_with_code_4_and_the_same_command_goes_on(model: Path, tmp_path: Path) -> None:
    config = small_config(model, tmp_path / "a", **OFF, **ALWAYS, on_alert="stop")
    assert train(config) == Outcome("alert", 3, 4)
    assert checkpoints(tmp_path / "a")[-1] == 3 and not (tmp_path / "a/out/model.safetensors").exists()
    assert train(config) == Outcome("done", 6, 0)
    assert len(alerts(tmp_path / "a")) == 1


def test_rollback_goes_back_to_the_last_healthy_checkpoint_with_a_remedy_and_at_most_so_often(
    model: Path, tmp_path: Path
) -> None:
    """Entropy is called low only in text of steps after 2: those thresholds are crossed by a reward that rises."""
    settings = {**OFF, "min_entropy": 0.0, "fluency_reward": -9.0, "max_nll_rise": 1e-9, "alert_from_step": 1,
                "alert_after": 2, "alert_within": 2, "on_alert": "rollback", "alert_rollbacks": 2, "steps": 10,
                "save_every": 1, "learning_rate": 0.01, "target_kl": 9.0, "kl_coef": 0.0}  # fmt: skip
    config = small_config(model, tmp_path, **settings)
    assert train(config) == Outcome("done", 10, 0)
    backs = [
        e for e in map(json.loads, (tmp_path / "out/events.jsonl").read_text().splitlines()) if e["kind"] == "rollback"
    ]
    assert 1 <= len(backs) <= 2 and events(tmp_path).index("alert") < events(tmp_path).index("rollback")
    table = rows(tmp_path)
    assert [row["step"] for row in table] == list(range(1, 11))
    last = json.loads((tmp_path / "checkpoints/checkpoint-10/state.json").read_text())
    assert last["remedies"]["rollbacks"] == len(backs) and last["remedies"]["rate"] == 0.5 ** len(backs)
    assert last["kl_coef"] == pytest.approx(0.02 * 2 ** (len(backs) - 1))
    assert table[-1]["ppo/learning_rate"] == pytest.approx(0.01 * 0.5 ** len(backs))
    # Killed anywhere and continued, it takes the same way: here, cut at every step count.
    parts = tmp_path / "parts"
    for steps in (4, 7, 10):
        assert train(small_config(model, parts, **(settings | {"steps": steps}))).status == "done"
    assert results(parts, 10) == results(tmp_path, 10)


def test_without_a_healthy_checkpoint_a_rollback_only_warns(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_config(model, tmp_path, **OFF, **ALWAYS, on_alert="rollback")) == Outcome("done", 6, 0)
    assert "no checkpoint from before the signs" in capsys.readouterr().out
    assert "rollback" not in events(tmp_path)


HELPFUL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MUTED = {**OFF, "min_entropy": 0.0, "max_nll_rise": 99.0, "min_one_class": 1.0}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = words_folder(tmp_path_factory.mktemp("models") / "chat", prompt=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_term_in_the_system_message_raises_leak_once_at_alert_from_step(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**MUTED, "prompt": "describe", "alert_from_step": 5}
    assert train(small_config(chat_model, tmp_path / "told", **settings, system=HELPFUL)).status == "done"
    (alert,) = alerts(tmp_path / "told")
    assert (alert["step"], alert["name"]) == (5, "leak")
    assert alert["evidence"]["numbers"] == {"watch/leaked_terms": 1} and alert["evidence"]["terms"] == ["helpful"]
    assert "(leaked_terms 1, helpful)" in capsys.readouterr().out
    assert [row["watch/leaked_terms"] for row in rows(tmp_path / "told")] == [1.0] * 6
    # Replayed from its records it comes again.
    again = Watch(WatchConfig(alert_from_step=5), PROTOCOL)
    lines = (tmp_path / "told/out/metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "leak" in names(again.judge(row["step"], row))] == [5]

    assert train(small_config(chat_model, tmp_path / "empty", **settings)).status == "done"
    assert alerts(tmp_path / "empty") == []
    assert [row["watch/leaked_terms"] for row in rows(tmp_path / "empty")] == [0.0] * 6


def names(signs: Sequence[Sign]) -> set[str]:
    return {sign.name for sign in signs}


def test_a_leak_is_not_rolled_back_and_leaves_checkpoints_healthy_for_other_alerts(
    chat_model: Path, tmp_path: Path
) -> None:
    settings = {**MUTED, "prompt": "describe", "system": HELPFUL, "alert_from_step": 3, "on_alert": "rollback"}
    assert train(small_config(chat_model, tmp_path, **settings)) == Outcome("done", 6, 0)
    assert "rollback" not in events(tmp_path) and len(alerts(tmp_path)) == 1
    state = json.loads((tmp_path / "checkpoints/checkpoint-6/state.json").read_text())
    assert state["watch"]["healthy_step"] == 6 and state["remedies"]["rollbacks"] == 0


def test_a_finished_run_can_be_judged_again_with_other_thresholds(model: Path, tmp_path: Path) -> None:
    train(small_config(model, tmp_path, **OFF, min_entropy=0.0))
    command = [sys.executable, "benchmarks/calibrate_watch.py", "--healthy", str(tmp_path / "out"), "--hacked"]
    command.append(f"{tmp_path / 'out'}=entropy,length")
    for name, value in (OFF | ALWAYS).items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert "entropy at 3   FALSE ALARM" in done.stdout and "MISSED length" in done.stdout
    assert "false alarms: 1 of 1" in done.stdout and "misses: 1 of 1" in done.stdout
