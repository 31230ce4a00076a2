"""The runs of a sweep as commands and as jobs: the folders say what is finished, however the runs were started."""

import csv
import os
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from equipoise import cli
from equipoise.errors import UserError
from equipoise.policy.packaged import ACCEPT
from equipoise.ppo import sweep_jobs
from equipoise.ppo.sweep import given, read_plans
from equipoise.ppo.sweep_files import write_given
from equipoise.ppo.sweep_jobs import Job, arguments_of
from equipoise.ppo.tool_config import SweepConfig

from .test_sweep import write

TWO = "settings:\n  plain: {}\n  hot: {kl-coef: 0.0}\nevaluate: {n: 1}\n"
LONG = "settings:\n  long: {steps: 1000000, save-every: 1000000}\n"


def commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert cli.main(["sweep", *argv, "--commands"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def values(out: Path) -> list[dict[str, str]]:
    with (out / "runs.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def one_process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    where = tmp_path_factory.mktemp("one")
    assert cli.main(["sweep", str(write(where, model, TWO)), "--output-dir", str(where / "out")]) == 0
    return values(where / "out")


@pytest.mark.slow
def test_the_commands_do_what_one_process_does_and_those_of_finished_runs_are_not_printed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_process: list[dict[str, str]]
) -> None:
    (tmp_path / "a folder").mkdir()
    argv = [str(write(tmp_path / "a folder", model, TWO)), "--output-dir", str(tmp_path / "a folder" / "out")]
    found = commands(argv, capsys)
    assert [line[0] for line in found] == ["equipoise"] * 2 and not (tmp_path / "a folder" / "out").exists()
    assert cli.main(found[1][1:]) == 0
    assert (tmp_path / "a folder" / "out" / "hot-0" / "result.json").exists()
    capsys.readouterr()
    assert commands(argv, capsys) == found[:1]
    assert cli.main(found[1][1:]) == 0  # again: nothing to do
    assert "hot-0 is finished" in capsys.readouterr().out
    assert cli.main(found[0][1:]) == 0
    assert not (tmp_path / "a folder" / "out" / "runs.csv").exists()  # other runs might write it at the same time
    capsys.readouterr()
    assert commands(argv, capsys) == []
    assert cli.main(["sweep", *argv]) == 0
    assert values(tmp_path / "a folder" / "out") == one_process


def test_a_command_accepts_the_terms_that_the_sweep_was_told_are_accepted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [str(write(tmp_path, model, TWO)), "--output-dir", str(tmp_path / "out")]
    monkeypatch.delenv(ACCEPT, raising=False)
    assert "--accept-terms" not in commands(argv, capsys)[0]
    monkeypatch.setenv(ACCEPT, "1")  # as the option does
    assert all("--accept-terms" in line for line in commands(argv, capsys))


def test_a_command_names_the_task_and_what_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(write(tmp_path, model, TWO)), "--output-dir", str(tmp_path / "out"), "--keep", "all"]
    found = commands([*argv, "--task", "competence-warmth"], capsys)[0]
    assert found[-2:] == ["--keep", "all"]
    task = Path(found[found.index("--task") + 1])
    assert task.read_text(encoding="utf-8").count("competence-warmth") and task.parent == tmp_path / "out"
    assert "--task" not in commands(argv, capsys)[0]


@pytest.mark.parametrize("option", [["--commands"], ["--only", "plain-0"], ["--executor", "slurm"]])
def test_a_preset_that_depends_on_the_machine_is_refused_where_another_may_run_it(
    model: Path, tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, TWO)
    path.write_text(path.read_text().replace("preset: bundled-cpu, ", ""))
    assert cli.main(["sweep", str(path), "--output-dir", str(tmp_path / "out"), *option]) == 2
    error = capsys.readouterr().err
    assert "name a preset, under base for instance" in error and error.count("\n") == 1
    assert [p.name for p in read_plans(SweepConfig(path, str(tmp_path / "out")))] == ["plain-0", "hot-0"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "cold-0"], "has no run 'cold-0': choose one of plain-0, hot-0"),
        (["--commands", "--only", "hot-0"], "give one of them"),
        (["--commands", "--executor", "slurm"], "give one of them"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--executor", "slurm", "--job-gpus", "-1"], "--job-gpus -1 must be at least 0"),
        (["--executor", "slurm", "--slurm", "partition"], "write KEY=VALUE"),
        (["--executor", "slurm", "--slurm", "=gpu"], "write KEY=VALUE"),
        (["--executor", "cloud"], "invalid choice"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    model: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", str(write(tmp_path, model, TWO)), "--output-dir", str(tmp_path / "out"), *options]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_submitit_the_line_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"equipoise\[slurm\].*--commands"):
        sweep_jobs.run_jobs({"plain-0": tmp_path}, SweepConfig(tmp_path / "sweep.yaml", executor="slurm"))


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_its_run_and_is_queued_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = ModuleType("submitit.helpers")
    helpers.DelayedSubmission = lambda job: SimpleNamespace(function=job)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    config = SweepConfig(write(tmp_path, model, LONG), str(tmp_path / "out"), only="long-0")
    (plan,) = read_plans(config)
    write_given(run := plan.folder, given(plan))  # as `equipoise sweep` does before it submits
    job, codes = Job(arguments_of("long-0", config), Path.cwd(), run), []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    while not (run / "training_metrics.csv").exists() or (run / "training_metrics.csv").read_text().count("\n") < 3:
        assert thread.is_alive(), (run / "log.txt").read_text()
        time.sleep(0.05)
    again = job.checkpoint().function
    thread.join()
    assert codes == [143] and list((run / "checkpoints").glob("checkpoint-*"))
    assert not (run / "result.json").exists()
    assert (again.arguments, again.folder, again.run) == (job.arguments, job.folder, job.run)


class Pretended:
    """An executor whose jobs are done as `outcomes` say: an exit code, or how the job was lost."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes, self.jobs = list(outcomes), []

    @contextmanager
    def batch(self) -> Iterator[None]:
        yield

    def submit(self, job: Job) -> Any:
        self.jobs.append(job)
        outcome = self.outcomes[len(self.jobs) - 1]
        lost = outcome if isinstance(outcome, Exception) else None

        def done() -> bool:
            if outcome is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return outcome is not None

        return SimpleNamespace(done=done, exception=lambda: lost, result=lambda: outcome)


@pytest.mark.parametrize(
    ("outcomes", "code", "says"),
    [
        ((0, 0), 0, "a-1 is finished"),
        ((0, 3), 3, "a-1 ended with code 3"),
        ((RuntimeError("Job was lost\nnode failed"), 0), 1, "a-0 ended with code 1"),
        ((0, None), 143, "stopped waiting: 1 job not done"),
    ],
)
def test_what_became_of_the_jobs_is_said_and_is_the_exit_code(
    tmp_path: Path,
    outcomes: tuple[Any, ...],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    executor = Pretended(*outcomes)
    monkeypatch.setattr(sweep_jobs, "_executor", lambda *_: executor)
    monkeypatch.setattr(sweep_jobs, "POLL", 0.0)
    config = SweepConfig(tmp_path / "sweep.yaml", str(tmp_path / "out"), executor="slurm")
    assert sweep_jobs.run_jobs({f"a-{i}": tmp_path / f"a-{i}" for i in (0, 1)}, config) == code
    printed = capsys.readouterr()
    assert says in printed.out and "submitted 2 jobs" in printed.out
    assert [job.arguments[-1] for job in executor.jobs] == ["a-0", "a-1"]
    assert printed.err == ("node failed\n" if code == 1 else "")


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sweep_jobs, "POLL", 0.05)
    return pytest.importorskip("submitit")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["debug", "local"])
def test_jobs_do_what_one_process_does(
    submitit: Any,
    model: Path,
    tmp_path: Path,
    executor: str,
    one_process: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    out = tmp_path / "out"
    argv = ["sweep", str(write(tmp_path, model, TWO)), "--output-dir", str(out), "--executor", executor]
    assert cli.main([*argv, "--job-gpus", "0"]) == 0
    printed = capsys.readouterr().out
    assert "plain-0 is finished" in printed and "hot-0 is finished" in printed and "strict success %" in printed
    assert values(out) == one_process
    assert "summary of 2 steps" in (out / "hot-0" / "log.txt").read_text()
    jobs = sorted((out / "jobs").glob("*"))
    assert cli.main([*argv, "--job-gpus", "0"]) == 0  # nothing is submitted any more
    assert sorted((out / "jobs").glob("*")) == jobs


@pytest.mark.slow
def test_a_job_that_fails_gives_its_exit_code_and_the_others_go_on(
    submitit: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "plain-0").mkdir(parents=True)
    (out / "plain-0" / "config.json").write_text("{}")  # somebody else's model is in the way
    argv = ["sweep", str(write(tmp_path, model, TWO)), "--output-dir", str(out), "--executor", "debug"]
    assert cli.main(argv) == 2
    printed = capsys.readouterr().out
    assert "plain-0 ended with code 2" in printed and "hot-0 is finished" in printed
    assert [row["setting"] for row in values(out)] == ["hot"]


def test_a_job_is_one_run(submitit: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "sweep",
        str(write(tmp_path, model, "evaluate: {n: 1}\n")),
        "--output-dir",
        str(tmp_path / "out"),
        "--executor",
        "debug",
    ]
    assert cli.main(argv) == 0
    assert "base-0 is finished" in capsys.readouterr().out and len(values(tmp_path / "out")) == 1


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_is_asked_for_what_the_options_say_and_its_refusal_is_one_line(
    submitit: Any,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["sweep", str(write(tmp_path, model, TWO)), "--output-dir", str(tmp_path / "out"), "--executor", "slurm"]
    assert cli.main(argv) == 2
    assert "could not be submitted" in (error := capsys.readouterr().err) and error.count("\n") == 1  # no Slurm here
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "srun", "exit 0")
    script(tmp_path / "bin" / "sbatch", f'cp "$1" {tmp_path}/asked; echo "invalid partition specified" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    argv += ["--slurm", "partition=gpu", "account=lab", "--job-minutes", "90", "--job-gpus", "2", "--jobs", "1"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("equipoise: the jobs could not be submitted (invalid partition specified)")
    assert "Traceback" not in error
    asked = (tmp_path / "asked").read_text()
    for line in ("partition=gpu", "account=lab", "time=90", "gpus-per-node=2", "signal=USR2@120", "array=0-1%1"):
        assert f"#SBATCH --{line}\n" in asked
