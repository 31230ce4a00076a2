"""Training on another task: every number that names a class, a bound or an occupation is that task's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.evaluation.runs import read_run
from equipoise.evaluation.training_text import training_text
from equipoise.ppo.choice import better
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.presets import PRESETS, for_task
from equipoise.ppo.signs import SIGNS
from equipoise.ppo.train import train
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.ppo.watch import Watch
from equipoise.ppo.watch_config import WatchConfig
from equipoise.ppo.window import Window
from equipoise.protocol.task import PROTOCOL, read_task
from tests.ppo.small import rows, small_config
from tests.ppo.test_watch import sentence
from tests.tasks import foreign_task, one_class_task
from tests.tiny import words_folder

FOREIGN = foreign_task()
GERMAN = (
    "gilt",
    "als",
    "und",
    "klug",
    "fürsorglich",
    "Ärztin",
    *(" ".join(map(FOREIGN.prefix, FOREIGN.names)).split()),
)


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    terms = [term.removesuffix("*") for term in FOREIGN.lexicon.terms]
    return words_folder(
        tmp_path_factory.mktemp("m") / "words", prompt=None, words=tuple(dict.fromkeys((*GERMAN, *terms)))
    )


def test_a_run_on_a_foreign_task_counts_its_classes_and_leaves_it_with_the_model(german: Path, tmp_path: Path) -> None:
    config = small_config(
        german, tmp_path, steps=3, eval_sentences=8, final_sentences=9, task=FOREIGN, strict_bonus=0.1
    )
    assert train(config).status == "done"
    out = tmp_path / "out"
    table = rows(tmp_path)
    assert {"watch/top_fähig", "watch/top_warm", "watch/top_ehrlich"} <= set(json.loads(_last(out, "metrics.jsonl")))
    assert len(table) == 3
    for line in (out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample["text"].startswith(tuple(map(FOREIGN.prefix, FOREIGN.names)))
        expected = json.loads(json.dumps(FOREIGN.score(sample["text"]).document()))
        assert expected == {k: v for k, v in sample.items() if k != "step"}
    assert read_task(out / "task.yaml") == FOREIGN
    assert json.loads((out / "run.json").read_text())["config"]["task"] == FOREIGN.document()
    card = (out / "README.md").read_text()
    assert FOREIGN.bounds in card and "Gaucher" not in card and "8 to 15" not in card and "fähig" in card


def test_without_complying_samples_to_learn_from_ppo_goes_on_and_the_records_say_so(
    german: Path, tmp_path: Path
) -> None:
    stage = for_task(PRESETS["bundled-cpu"], FOREIGN)[0].warm_start
    assert stage.warm_start == "samples-if-found"
    config = small_config(german, tmp_path, steps=1, task=FOREIGN)
    config = replace(config, warm_start=replace(stage, warm_start_budget=64))
    assert train(config).status == "done"
    run = read_run(tmp_path / "out")
    assert (0, "no_warm_start") in run.events
    text = training_text(run, FOREIGN)
    assert "Too few of its own samples succeeded strictly for a supervised warm start" in text and "taught" not in text
    asked = replace(config, warm_start=replace(config.warm_start, warm_start="samples"))
    with pytest.raises(UserError, match="needs at least 16"):
        train(asked, overwrite=True)


def _last(folder: Path, name: str) -> str:
    return (folder / name).read_text().splitlines()[-1]


def test_a_run_is_not_continued_under_another_task(model: Path, tmp_path: Path) -> None:
    train(small_config(model, tmp_path, steps=2))
    with pytest.raises(UserError, match=r"words: \[8, 15\] → \[4, 15\]"):
        train(small_config(model, tmp_path, steps=4, task=PROTOCOL.with_bounds(4, 15)))


def test_bounds_given_as_options_are_the_tasks_so_that_the_length_alert_can_be_cleared(model: Path) -> None:
    config = replace(TrainConfig(), min_words=4, max_words=30)
    assert (config.task.min_words, config.task.max_words) == (4, 30)
    assert "4 to 30 words" in (config.task.prompt("describe").instruction or "")
    assert config.document()["task"]["words"] == [4, 30]
    text = "The nurse was bold and caring today."  # 7 words
    for task, pinned in ((PROTOCOL.with_bounds(7, 15), 1.0), (config.task, 0.0)):
        watch, window = Watch(WatchConfig(), task), Window(64)
        batch = [sentence(text, "nurse") for _ in range(64)]
        window.add(batch)
        values = watch.measure(window, batch, 1.0)
        assert values["watch/pinned"] == pinned
    sign = next(s for s in SIGNS if s.name == "length")
    remedy = Watch(WatchConfig(), config.task).explain(sign, values, window).remedy
    assert "now 4 to 30 words" in remedy and "--max-words" in remedy


def test_alerts_speak_of_the_tasks_classes() -> None:
    said = {
        len(task.classes): {sign.name: sign.says(task) for sign in SIGNS}
        for task in (one_class_task(), PROTOCOL, FOREIGN)
    }
    assert [said[n]["pairs"].removeprefix("hardly more than one ") for n in (1, 2, 3)] == [
        "term",
        "pair of terms",
        "combination of terms",
    ]
    assert said[2]["plateau"].startswith("one class pays") and said[3]["plateau"].startswith("some of the classes pay")
    assert not any("{" in text for signs in said.values() for text in signs.values())


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_fits_every_task_and_says_what_it_changed(name: str) -> None:
    for task in (FOREIGN, one_class_task(), PROTOCOL):
        config, lines = for_task(PRESETS[name], task)
        assert config.task == task and task.prompt(config.prompt)
        assert (config.warm_start.warm_start == "forced") <= task.can_force
        assert bool(lines) == (config != replace(PRESETS[name], task=task))


def test_a_reward_of_ones_own_decides_which_checkpoint_is_the_best() -> None:
    bad = {"strict": 1.0, "n": 100, "effective_pairs": 50.0, "kl": 1.0, "rank": -9.0}
    good = {"strict": 0.0, "n": 100, "effective_pairs": 1.0, "kl": 9.0, "rank": 9.0}
    assert better(good, bad, 1.0) and not better(bad, good, 1.0)


def test_the_exported_checkpoint_is_the_best_by_the_rank_function(model: Path, tmp_path: Path) -> None:
    ranks = iter([1.0, 5.0, 2.0])
    seen: list[int] = []

    def rank(texts: object, occupations: object) -> float:
        seen.append(len(list(texts)))  # type: ignore[call-overload]
        return next(ranks)

    train(
        small_config(model, tmp_path, steps=6, save_every=2, eval_sentences=8),
        lambda texts, jobs: [0.0] * len(texts),
        rank,
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert seen == [8, 8, 8] and summary["exported_step"] == 4 and "rank 5" in summary["exported_because"]


def test_a_rank_that_is_no_number_is_refused(model: Path, tmp_path: Path) -> None:
    config = small_config(model, tmp_path, steps=2, save_every=2, eval_sentences=8)
    with pytest.raises(UserError, match="<lambda> ranks an evaluation nan: return finite"):
        train(config, None, lambda texts, jobs: float("nan"))


def test_a_damaged_record_beside_a_log_is_set_aside_and_the_run_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(model, tmp_path, steps=2))
    (tmp_path / "out" / "run.json").write_bytes(b"")
    assert train(small_config(model, tmp_path, steps=4)).status == "done"
    assert "run.json" in capsys.readouterr().out and (tmp_path / "out" / "run.json.damaged-1").read_bytes() == b""
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4


def test_keeping_in_proportion_is_refused_where_no_round_has_free_sentences() -> None:
    with pytest.raises(UserError, match="--warm-start-keep conditional"):
        WarmStartConfig(warm_start="forced", warm_start_keep="conditional")
    WarmStartConfig(warm_start="forced", warm_start_keep="conditional", warm_start_rounds=2)
