"""The sweep: what it runs, what it skips, and the arithmetic of its table."""

import csv
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise import cli
from equipoise.commands.sweep import main
from equipoise.errors import UserError
from equipoise.ppo import sweep
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.summary import first_good_step
from equipoise.ppo.sweep import read_plans
from equipoise.ppo.sweep_files import check_run, delete_checkpoints, open_log, read_result, write_given
from equipoise.ppo.sweep_table import statistics_of, table, values_of
from equipoise.ppo.tool_config import SweepConfig
from equipoise.ppo.train import Outcome
from equipoise.protocol.task import PROTOCOL, read_task
from equipoise.runs.command import typed
from equipoise.runs.locks import FolderLock
from equipoise.runs.signals import StopSignals
from tests.default import strict_success
from tests.ppo.small import changed
from tests.tasks import foreign_task, one_class_task


def write(where: Path, model: Path, text: str) -> Path:
    path = where / "sweep.yaml"
    base = (
        f"base: {{preset: bundled-cpu, model: {model}, prompt: raw, dtype: float32, device: cpu, steps: 2, "
        "batch-size: 8, mini-batch-size: 4, max-new-tokens: 8, base-samples: 16, eval-sentences: 0, holdout: true, "
        "warm-start: off}\n"
    )
    path.write_text(base + text)
    return path


TWO = (
    "settings:\n  plain: {}\n  hot: {kl-coef: 0.0, learning-rate: 1e-3}\nseeds: [0, 3]\nevaluate: {n: 2, top_p: 0.9}\n"
)


def test_a_file_becomes_runs_each_in_a_folder_of_its_own(model: Path, tmp_path: Path) -> None:
    plans = read_plans(SweepConfig(write(tmp_path, model, TWO), str(tmp_path / "out")))
    assert [p.name for p in plans] == ["plain-0", "plain-3", "hot-0", "hot-3"]
    configs = [p.config for p in plans]
    assert [c.seed for c in configs] == [0, 3, 0, 3]
    assert [c.ppo.kl_coef for c in configs] == [0.02, 0.02, 0.0, 0.0] and configs[2].ppo.learning_rate == 1e-3
    assert {c.run.output_dir for c in configs} == {str(tmp_path / "out" / p.name) for p in plans}
    assert len({c.run.checkpoint_dir for c in configs}) == 4
    assert all(c.evaluation.final_sentences == 40 and c.evaluation.eval_top_p == 0.9 for c in configs)
    assert all(c.preset == "bundled-cpu" and c.ppo.ppo_epochs == 2 for c in configs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sets: {}\n", "there is no 'sets'"),
        ("settings: {a/b: {}}\n", "'a/b' names a folder"),
        ("settings: {a: {no-such: 1}}\n", "no_such"),
        ("settings: {a: {learning-rate: fast}}\n", "learning-rate"),
        ("settings: [a]\n", "settings is"),
        ("seeds: 3\n", "seeds is 3"),
        ("seeds: [yes]\n", "whole numbers"),
        ("evaluate: {m: 3}\n", "evaluate has no 'm'"),
        ("evaluate: {n: many}\n", "n under evaluate is 'many'"),
        ("settings: {a: {seed: 1}}\n", "a: seed has no effect here: write it under seeds"),
        ("settings: {a: {output-dir: here}}\n", "output_dir has no effect here"),
        ("settings: {a: {run: {checkpoint_dir: here}}}\n", "checkpoint_dir has no effect here"),
        ("settings: {a: {final-sentences: 9}}\n", "final_sentences has no effect here: write n under evaluate"),
        ("settings: {a: {evaluation: {eval_top_p: 0.5}}}\n", "write top_p under evaluate"),
        ("settings: {a: {batch-size: 4, batch_size: 8}}\n", "batch_size is given twice"),
        ("settings: {a: {batch-size: 4, ppo: {batch_size: 8}}}\n", "batch_size is given twice"),
        ("settings: {a: {steps: 3}, b: {}, a: {steps: 4}}\n", "line 2: the key 'a' stands on line 2 already"),
        ("seeds: [0]\nseeds: [1]\n", "line 3: the key 'seeds' stands on line 2 already"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_before_anything_runs(
    model: Path, tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read_plans(SweepConfig(write(tmp_path, model, text), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("sweep")
    assert cli.main(["sweep", str(write(where, model, TWO)), "--output-dir", str(where / "out")]) == 0
    return where


def test_every_run_is_trained_sampled_and_measured(swept: Path) -> None:
    out = swept / "out"
    with (out / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(r["setting"], r["seed"]) for r in runs] == [("plain", "0"), ("plain", "3"), ("hot", "0"), ("hot", "3")]
    for run in runs:
        folder = out / f"{run['setting']}-{run['seed']}"
        lines = [json.loads(line) for line in (folder / "final_sentences.jsonl").read_text().splitlines()]
        assert len(lines) == 40 and max(line["run_id"] for line in lines) == 2
        assert float(run["final.strict"]) == pytest.approx(sum(strict_success(x["text"]) for x in lines) / 40)
        assert {"base", "summary", "config"} <= json.loads((folder / "result.json").read_text()).keys() | {"base"}
        assert (folder / "model.safetensors").exists() and not (folder / "checkpoints").exists()
        assert run["groups.held_out.strict"] != "" and run["kl_bound"] != ""
    assert {r["base.nll"] for r in runs} == {runs[0]["base.nll"]}  # the same untrained model


def test_the_same_command_again_runs_nothing_and_prints_the_same_table(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "train", None)
    before = {p: p.read_bytes() for p in (swept / "out").glob("*.*")}
    assert cli.main(["sweep", str(swept / "sweep.yaml"), "--output-dir", str(swept / "out")]) == 0
    printed = capsys.readouterr().out
    assert "4 of them finished" in printed and "strict success %" in printed
    assert {p: p.read_bytes() for p in (swept / "out").glob("*.*")} == before


def test_a_finished_run_of_other_options_is_refused(swept: Path, model: Path) -> None:
    changed = swept / "changed.yaml"
    changed.write_text((swept / "sweep.yaml").read_text().replace("kl-coef: 0.0", "kl-coef: 0.1"))
    with pytest.raises(UserError, match=r"hot-0 holds a finished run with other settings \(kl-coef: 0.0 → 0.1"):
        main([str(changed), "--output-dir", str(swept / "out")])


@pytest.mark.parametrize("name", ["runs.csv", "table.csv", "sweep.json", "plain-0/result.json"])
@pytest.mark.parametrize("planted", ["file", "link"])
def test_what_no_sweep_wrote_is_not_replaced_and_refused_before_anything_runs(
    model: Path, tmp_path: Path, name: str, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "train", None)  # nothing may be trained
    file, path = write(tmp_path, model, TWO), tmp_path / "out" / name
    mine = tmp_path / "mine" if planted == "link" else path
    path.parent.mkdir(parents=True)
    mine.write_text('{"mine": 1}' if name.endswith("json") else "my,own,table\n")
    if planted == "link":
        path.symlink_to(mine)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"{path} (is there and equipoise sweep did not|cannot be read, damaged or)"):
        main([str(file), "--output-dir", str(tmp_path / "out")])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["options.yaml", "sweep-task.yaml", "log.txt"])
@pytest.mark.parametrize("planted", ["file", "link"])
def test_what_no_sweep_wrote_into_the_folder_of_a_run_is_not_replaced(
    model: Path, tmp_path: Path, name: str, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_start", None)
    file, path = write(tmp_path, model, TWO), tmp_path / "out" / "hot-3" / name
    mine = tmp_path / "mine" if planted == "link" else path
    path.parent.mkdir(parents=True)
    mine.write_text("steps: 9\n")
    if planted == "link":
        path.symlink_to(mine)
    with pytest.raises(UserError, match=f"{path} is there and equipoise sweep did not"):
        main([str(file), "--output-dir", str(tmp_path / "out"), "--jobs", "2"])
    assert mine.read_text() == "steps: 9\n" and [p.name for p in (tmp_path / "out").iterdir()] == ["hot-3"]


def test_what_a_sweep_gives_its_runs_is_its_own_also_where_an_earlier_version_wrote_it(
    model: Path, tmp_path: Path
) -> None:
    plan = read_plans(SweepConfig(write(tmp_path, model, TWO), str(tmp_path / "out")))[0]
    given = sweep.given(plan)
    write_given(plan.folder, given)
    with open(open_log(plan.folder), "w") as log:
        log.write("step 1\n")
    check_run(plan.folder, given)
    read = yaml.safe_load((plan.folder / "options.yaml").read_text())
    assert read == plan.options and read_task(str(plan.folder / "sweep-task.yaml")) == PROTOCOL
    for name, text in zip(("options.yaml", "sweep-task.yaml"), given, strict=True):
        (plan.folder / name).write_text(text)
    check_run(plan.folder, given)


def test_a_damaged_result_is_refused_in_one_line(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "out", tmp_path / "out")
    path = tmp_path / "out" / "hot-0" / "result.json"
    path.write_text(path.read_text()[:90])
    with pytest.raises(UserError, match=r"hot-0/result\.json cannot be read, damaged .*delete it"):
        read_result(path.parent)


def test_only_checkpoints_are_deleted_with_checkpoints(swept: Path, tmp_path: Path) -> None:
    assert not list((swept / "out").glob("*/checkpoints"))
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    for name in ("checkpoint-2", "checkpoint-4", "nonfinite", "mine"):
        (folder / name).mkdir(parents=True)
    other.mkdir()
    (other / "x").write_text("x")
    (folder / "checkpoint-6").symlink_to(other)
    (folder / "notes.txt").write_text("mine")
    delete_checkpoints(folder)
    assert {p.name for p in folder.iterdir()} == {"mine", "notes.txt", "checkpoint-6"} and (other / "x").exists()
    link = tmp_path / "link"
    link.symlink_to(folder)
    delete_checkpoints(link)
    assert (folder / "notes.txt").exists() and link.is_symlink()


def test_two_sweeps_cannot_share_a_folder(swept: Path) -> None:
    with FolderLock(swept / "out", "x"), pytest.raises(UserError, match="another process is running the sweep in"):
        main([str(swept / "sweep.yaml"), "--output-dir", str(swept / "out")])


@pytest.mark.slow
def test_runs_adjacent_order_are_those_one_after_another(swept: Path, model: Path, tmp_path: Path) -> None:
    file = write(tmp_path, model, TWO.replace("seeds: [0, 3]", "seeds: [0]"))
    assert cli.main(["sweep", str(file), "--output-dir", str(tmp_path / "out"), "--jobs", "2"]) == 0
    for name in ("plain-0", "hot-0"):
        ours, theirs = (
            json.loads((where / "out" / name / "result.json").read_text())["values"] for where in (tmp_path, swept)
        )
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in theirs.items() if "seconds" not in k
        }
        assert json.loads((tmp_path / "out" / name / "run.json").read_text())["command"] == typed()
    assert "summary of 2 steps" in (tmp_path / "out" / "hot-0" / "log.txt").read_text()


def test_a_setting_in_a_group_replaces_that_one_setting_and_no_other_of_the_base(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"base: {{preset: bundled-cpu, model: {model}, prompt: raw, ppo: {{kl_coef: 0.5, clip: 0.1}}}}\n"
        "settings: {flat: {kl-coef: 0.25}, grouped: {ppo: {kl_coef: 0.25}}}\n"
    )
    plans = read_plans(SweepConfig(path, str(tmp_path / "out")))
    assert [(p.config.ppo.kl_coef, p.config.ppo.clip) for p in plans] == [(0.25, 0.1)] * 2


def test_a_setting_may_have_a_task_of_its_own_and_is_measured_by_it(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path, model, "settings: {other: {task: competence-warmth}, plain: {}}\nevaluate: {n: 2}\n")
    other, plain = read_plans(SweepConfig(path, str(tmp_path / "out")))
    assert (other.config.task.name, plain.config.task.name) == ("competence-warmth", PROTOCOL.name)
    assert other.config.evaluation.final_sentences == 2 * len(other.config.task.names)
    with pytest.raises(UserError, match="another is given for the sweep"):
        read_plans(SweepConfig(path, str(tmp_path / "out"), task=read_task("gaucher-stems")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_that_comes_while_a_run_finishes_ends_the_sweep_after_that_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    ran, closed = [], []

    def train(config: TrainConfig, **_: Any) -> Outcome:
        with StopSignals(lambda _: None):
            ran.append(config.seed)
            os.kill(os.getpid(), number)  # its steps are done: nothing of it looks at signals any more
        return Outcome("done", 2, 0)

    def close(plan: sweep.Plan, *_: Any) -> dict[str, Any]:
        closed.append(plan.name)
        return {"summary": {"base": None}}

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "close", close)
    plans = read_plans(SweepConfig(write(tmp_path, model, TWO), str(tmp_path / "out")))
    assert sweep._run_here(plans, SweepConfig(), lambda config: config) == 128 + number
    assert ran == [0] and closed == ["plain-0"]


def test_runs_in_one_process_begin_with_their_targets_sentences_as_those_in_several_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(config: TrainConfig, **_: Any) -> Outcome:
        trained.append(config.warm_start.warm_start_file)
        return Outcome("stopped", 1, 143)

    def prepared(config: TrainConfig) -> TrainConfig:
        return changed(config, warm_start_file=f"near-{config.seed}.csv")

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr("equipoise.methods.target.prepared", prepared)
    path = write(tmp_path, model, "settings: {near: {warm-start-target: near}}\nseeds: [0, 3]\n")
    argv = [str(path), "--output-dir", str(tmp_path / "out")]
    assert main(argv) == main([*argv, "--only", "near-3"]) == 143
    assert trained == ["near-0.csv", "near-3.csv", "near-3.csv"]


PARENT = """
import sys
from pathlib import Path
from equipoise.ppo.sweep import _start, read_plans
from equipoise.ppo.tool_config import SweepConfig
plan = read_plans(SweepConfig(Path(sys.argv[1]), sys.argv[2]))[0]
print(_start(plan, None).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is nobody's child any more")
def test_the_runs_of_a_sweep_end_with_it_even_where_it_is_killed(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path, model, "settings: {long: {steps: 1000000}}\n")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(path), str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert parent.stdout is not None and parent.stdin is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([child], [], [], 120)
    os.close(child)
    parent.stdout.close()
    parent.stdin.close()
    assert ended, "the run goes on though the sweep is dead"


def result(setting: str, seed: int, **values: Any) -> dict[str, Any]:
    return {"setting": setting, "seed": seed, "values": values}


def test_the_table_by_hand() -> None:
    results = [
        result("a", 0, **{"final.strict": 0.5, "good_step": 10}),
        result("a", 1, **{"final.strict": 0.75, "good_step": None}),
        result("b", 0, **{"final.strict": 1.0, "good_step": None}),
    ]
    found = statistics_of(results)
    assert found["a"]["final.strict"] == {"mean": 0.625, "low": 0.5, "high": 0.75, "runs": 2}
    assert found["a"]["good_step"] == {"mean": 10, "low": 10, "high": 10, "runs": 1} and "good_step" not in found["b"]
    lines = table(results, [PROTOCOL]).splitlines()
    assert lines[0].split() == ["a", "b"] and lines[1].split() == ["runs", "2", "1"]
    assert any(line.split("%")[-1].split() == ["62.50", "[50.00–75.00]", "100.00"] for line in lines)
    assert any("10 [10–10] of 1" in line for line in lines)
    assert len(lines) == 4  # what no run has is left out


def test_pairs_are_called_what_the_tasks_that_were_trained_on_call_them() -> None:
    results = [result("a", 0, **{"final.pairs": 3, "final.effective_pairs": 2.5})]
    for tasks, noun in (
        ([PROTOCOL], "pairs"),
        ([foreign_task()], "combinations"),
        ([one_class_task()], "terms"),
        ([PROTOCOL, one_class_task()], "combinations"),
    ):
        titles = [line.rsplit(None, 1)[0].strip() for line in table(results, tasks).splitlines()[2:]]
        assert titles == [f"unique {noun}", f"effective {noun}"]


def test_values_come_from_anywhere_in_a_summary_and_are_none_where_it_has_none() -> None:
    values = values_of({"alerts": {"stuffing": 2, "plateau": 1}, "final": {"strict": 0.5}, "reward_last": 0.9})
    assert values["alerts"] == 3 and values["final.strict"] == 0.5 and values["reward_last"] == 0.9
    assert values["groups.held_out.strict"] is None


def test_the_reward_counts_as_learnt_once_ten_steps_in_a_row_average_nine_tenths() -> None:
    assert first_good_step([0.9] * 10, list(range(1, 11))) == 10
    assert first_good_step([0.9] * 9, list(range(1, 10))) is None
    assert first_good_step([0.0] + [1.0] * 9 + [0.9], list(range(2, 13))) == 11  # (0 + 9)/10; steps as numbered
    assert first_good_step([0.8] * 50, list(range(50))) is None
