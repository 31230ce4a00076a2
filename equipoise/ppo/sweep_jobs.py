"""The runs of a sweep as processes, commands and jobs of a cluster. What is finished, its result in the folder says."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.policy.packaged import ACCEPT
from equipoise.ppo.sweep_files import open_log, write_task
from equipoise.ppo.tool_config import SweepConfig
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.signals import StopSignals

POLL = 2.0
"""Seconds between two looks at the jobs."""
GRACE = 120
"""Seconds before a job's time is up: enough to finish a step and save."""

_CHILD = """import sys
from equipoise.runs.signals import end_with_parent
end_with_parent()
from equipoise.cli import main
sys.argv[0] = "equipoise"
sys.exit(main(sys.argv[1:]))"""
"""A run as a process of its own. Its standard input is a pipe to which nothing is written, and which ends with us."""


def start(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """`equipoise` with these arguments as a process that ends with this one; what it prints is added to the log in
    `folder`."""
    command = [sys.executable, "-c", _CHILD, *arguments]
    with open(open_log(folder), "ab") as file:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment)


# Commands


def arguments_of(name: str, config: SweepConfig) -> list[str]:
    """What `equipoise` is to be called with to run the run of that name alone, from the folder that this process is
    in."""
    arguments = ["sweep", str(config.file), "--output-dir", config.output_dir, "--only", name]
    if config.task != PROTOCOL:
        arguments += ["--task", str(_task_file(config))]
    if os.environ.get(ACCEPT) == "1":  # other machines do not know of it
        arguments.append("--accept-terms")
    return arguments if config.keep == SweepConfig.keep else [*arguments, "--keep", config.keep]


def _task_file(config: SweepConfig) -> Path:
    """The task of the whole sweep, written where every machine finds it."""
    return write_task(Path(config.output_dir), config.task.to_yaml())


def print_commands(names: Sequence[str], config: SweepConfig) -> None:
    """A line for each name on standard output, and how many on standard error."""
    for name in names:
        print(shlex.join(["equipoise", *arguments_of(name, config)]))
    print(f"{plural(len(names), 'run')} to do", file=sys.stderr)


# Jobs


class Job:
    """What a job does: one run. `checkpoint` is called by submitit when the job's time is nearly up or its place is
    needed; the same job is queued again, and the run goes on from where it was saved."""

    def __init__(self, arguments: Sequence[str], folder: Path, run: Path) -> None:
        """`folder`: where it is started; `run`: the run's own folder, which gets its log."""
        self.arguments, self.folder, self.run = list(arguments), folder, run
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Its exit code."""
        os.chdir(self.folder)
        self._process = start(self.arguments, self.run, dict(os.environ))
        # Not `wait`, which holds a lock that the signal handler below, in this same thread, would wait for.
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        assert self._process.stdin is not None
        self._process.stdin.close()
        return code

    def checkpoint(self) -> Any:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            end = time.monotonic() + GRACE - 10
            while self._process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.arguments, self.folder, self.run))


def run_jobs(folders: Mapping[str, Path], config: SweepConfig) -> int:
    """Submit a job for each run, named with its folder, and wait for them. Returns the first exit code that is not 0.

    Raises UserError where submitit or Slurm is not there. When it is stopped the jobs go on.
    """
    if not folders:
        return 0
    executor, here = _executor(config, len(folders)), Path.cwd()
    running: dict[str, Any] = {}
    with _refusals(), executor.batch():
        for name, folder in folders.items():
            running[name] = executor.submit(Job(arguments_of(name, config), here, folder.absolute()))
    print(f"submitted {plural(len(running), 'job')}; their logs: {config.output_dir}/NAME/log.txt", flush=True)
    failed = 0
    with StopSignals(lambda _: None) as stop:
        while running:
            for name, job in list(running.items()):
                if stop.received is not None:
                    print(
                        f"stopped waiting: {plural(len(running), 'job')} not done, and left at work. Once nothing is "
                        "at work the same command prints the table; before, it submits what is not finished once more",
                        flush=True,
                    )
                    return stop.exit_code
                if job.done():
                    del running[name]
                    code = _code(job)
                    failed = failed or code
                    print(f"{name} {'is finished' if code == 0 else f'ended with code {code}'}", flush=True)
            time.sleep(POLL if running else 0)
    return failed


def _code(job: Any) -> int:
    """The exit code of a job that is done; 1 where it was lost, and its log says no more."""
    if (error := job.exception()) is not None:
        print(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__, file=sys.stderr)
        return 1
    return int(job.result())


def _executor(config: SweepConfig, runs: int) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError(
            f"--executor {config.executor} needs the package submitit, which is not installed: install "
            "'equipoise[slurm]', or let --commands print the commands"
        ) from None
    with _refusals():
        options = {"slurm_max_num_timeout": 10_000} if config.executor == "slurm" else {}
        executor = submitit.AutoExecutor(Path(config.output_dir) / "jobs", cluster=config.executor, **options)
        executor.update_parameters(
            name="equipoise-sweep",
            timeout_min=config.job_minutes,
            gpus_per_node=config.job_gpus,
            cpus_per_task=config.job_cpus,
            slurm_signal_delay_s=GRACE,
            slurm_array_parallelism=config.jobs or runs,
            slurm_additional_parameters=config.sbatch,
        )
    return executor


@contextmanager
def _refusals() -> Iterator[None]:
    """What Slurm refuses, in one line."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the jobs could not be submitted ({text[-1]:.200}): mend that, or let --commands print the commands"
        ) from None
