"""The files for clusters: every option in them is there, and what they do at the end of a job is what the page says."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.test_docs import PAGES, ROOT, blocks, understand

EXAMPLES = ROOT / "examples/cluster"
SBATCH = EXAMPLES / "slurm.sbatch"
VALUES = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "head": "node1"}
VALUES |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}


def started(name: str) -> list[str]:
    """What the example calls torchrun with, its variables put in."""
    text = (EXAMPLES / name).read_text()
    if name.endswith("pytorchjob.yaml"):
        container = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
        return list(container["command"])
    script = yaml.safe_load(text)["run"] if name.endswith(".yaml") else text
    line = re.search(r"torchrun \\\n(?:.*\\\n)*.*", script)
    assert line
    whole = line[0].replace("\\\n", " ").removesuffix("&")
    whole = re.sub(r'"\$\(.*?\)"(?=\s)', "10.0.0.1", whole)
    whole = re.sub(r"\$\{(\w+):-\w+\}", "0", whole)
    return shlex.split(re.sub(r"\$(\w+)", lambda name: VALUES[name[1]], whole))


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml", "pytorchjob.yaml"])
def test_torchrun_and_the_program_know_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *argv = started(name)
    assert program == "torchrun"
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    parsed = get_args_parser().parse_args(argv)
    assert {
        option.partition("=")[0] for option in argv[: argv.index(parsed.training_script)] if option[:1] == "-"
    } <= known
    assert Path(parsed.training_script).name == "train_rlhf.py"
    understand(["train", *parsed.training_script_args], monkeypatch)


def test_torchrun_takes_n_for_its_own_but_behind_two_dashes() -> None:
    lines = [line for block in blocks("docs/CLUSTER.md", "sh") for line in block.splitlines() if "torchrun" in line]
    assert len(lines) == 2
    for line in lines:
        assert get_args_parser().parse_args(shlex.split(line)[1:]).training_script_args[-2:] == ["--n", "250"]
        with pytest.raises(SystemExit):
            get_args_parser().parse_args(shlex.split(line.replace(" -- ", " "))[1:])


def test_both_kinds_of_host_of_the_pytorchjob_are_one() -> None:
    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text())["spec"]
    replicas = job["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"] == replicas["Worker"]
    limits = replicas["Master"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert job["nprocPerNode"] == str(limits["nvidia.com/gpu"])


def test_scripts_are_read_by_bash() -> None:
    sky = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    page = blocks("docs/CLUSTER.md", "bash")
    for script in (SBATCH.read_text(), sky["run"], sky["setup"], *page):
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_every_call_of_the_program_within_another_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = re.findall(r"\bequipoise [^'>|\n]+", "\n".join(blocks("docs/CLUSTER.md", "bash")))
    assert len(calls) == 2
    for call in calls:
        with monkeypatch.context() as patch:
            understand(shlex.split(call.replace("$SLURM_ARRAY_TASK_ID", "1"))[1:], patch)


def test_the_page_names_every_file() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == set(
        re.findall(r"\(\.\./examples/cluster/([\w.]+)\)", PAGES["docs/CLUSTER.md"])
    )


# What the script does at the end of a job, under commands that stand for Slurm's.


def stub(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def slurm(where: Path, step: str) -> "subprocess.Popen[str]":
    """The script with `srun` doing `step`; what Slurm is told goes to `told`."""
    tools = where / "bin"
    tools.mkdir()
    stub(tools, "srun", step)
    stub(tools, "scontrol", f'[ "$1" = show ] && echo node1 || echo "$@" >> {where}/told')
    stub(tools, "scancel", f'echo "$@" >> {where}/told; kill -TERM "$(cat {where}/step)"')
    settings = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    settings |= {"SLURM_GPUS_ON_NODE": "8", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(SBATCH)], cwd=where, env=os.environ | settings, stdout=subprocess.PIPE, text=True
    )


def told(where: Path) -> list[str]:
    return (where / "told").read_text().splitlines() if (where / "told").exists() else []


@pytest.mark.parametrize(
    ("code", "ends", "asks"),
    [(0, 0, []), (143, 0, ["requeue 7"]), (1, 1, []), (2, 2, []), (3, 3, []), (4, 4, [])],
)
def test_a_job_that_was_stopped_is_queued_again_and_no_other(
    tmp_path: Path, code: int, ends: int, asks: list[str]
) -> None:
    assert slurm(tmp_path, f"exit {code}").wait() == ends
    assert told(tmp_path) == asks


@pytest.mark.parametrize("code", [143, 1, 0])
def test_a_signal_before_the_time_is_up_reaches_the_processes_and_the_job_waits_for_them(
    tmp_path: Path, code: int
) -> None:
    step = (
        f'trap "touch {tmp_path}/saved; exit {code}" TERM; echo $$ > {tmp_path}/step; echo ready; '
        f"read < {tmp_path}/never"
    )
    os.mkfifo(tmp_path / "never")
    job = slurm(tmp_path, step)
    keep = os.open(tmp_path / "never", os.O_RDWR)  # so that the step waits until the signal comes
    try:
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        job.terminate()
        assert job.wait() == 0
    finally:
        os.close(keep)
    assert (tmp_path / "saved").exists()
    assert told(tmp_path) == ["--signal=TERM 7.0", *(["requeue 7"] if code else [])]


def test_the_ray_script_runs_every_command_and_ends_with_the_worst_code(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text(
        "def init(): pass\n"
        "def get(values): return values\n"
        "class _Remote:\n"
        "    def __init__(self, function): self.remote = function\n"
        "def remote(**options):\n"
        "    assert options['num_gpus'] == 1\n"
        "    return _Remote\n"
    )
    stub(
        tmp_path,
        "equipoise",
        f'if [ "${{@: -1}}" = --commands ]; then echo "equipoise sweep s.yaml --only \'a b\'"; echo "equipoise x"; '
        f'else echo "$#" >> {tmp_path}/ran; [ "$1" = sweep ] || exit 3; fi',
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(EXAMPLES / "ray_sweep.py"), "s.yaml"]
    ended: Any = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert (tmp_path / "ran").read_text().split() == ["4", "1"]
