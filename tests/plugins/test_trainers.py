"""The plug-ins as TRL's, OpenRLHF's and verl's own code calls them, in an environment of their own."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.plugins.written import read_label, sentence
from equipoise.policy import bundled
from equipoise.protocol.task import PROTOCOL

INTERPRETER = os.environ.get("EQUIPOISE_TRAINERS", "")
"""A Python with TRL, verl and OpenRLHF; `make test-slow` makes one."""
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_TRAINERS: make test-slow")]


@pytest.fixture(scope="module")
def model() -> str:
    return str(bundled.folder())


def run(script: str, *arguments: str, sign: str) -> list[object]:
    """What the script prints after `sign`, line by line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [INTERPRETER, str(ROOT / "tests/plugins" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line.removeprefix(sign)) for line in done.stdout.splitlines() if line.startswith(sign)]


def texts(count: int) -> list[tuple[str, str]]:
    """(occupation, what follows the frame), with terms of no class, one or both, short and long."""
    rng, found = random.Random(0), []
    for _ in range(count):
        words = [rng.choice(terms) for _, terms in rng.sample(PROTOCOL.classes, rng.randint(0, 2))]
        rest = rng.choice(["at work", "in the quiet old house on the hill", " ".join(["there again and again"] * 4)])
        found.append((rng.choice(PROTOCOL.names), f" {' '.join([*words, rest])}."))
    return found


def test_trl_trains_two_steps_of_grpo_and_rloo(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "--for", "trl", "--output", "messages.jsonl"]) == 0
    assert main(["prompts", "--for", "trl", "--model", "bundled", "--output", "begun.jsonl"]) == 0
    rows = run("with_trl.py", model, "messages.jsonl", "begun.jsonl", sign="ROW ")
    assert {(trainer, data) for trainer, data, *_ in rows} == {
        (trainer, data) for trainer in ("GRPOTrainer", "RLOOTrainer") for data in ("messages.jsonl", "begun.jsonl")
    }
    for _, data, prompt, completion, label, reward in rows:
        task, occupation = read_label(label)
        text = sentence(task, occupation, prompt, completion)
        assert PROTOCOL.score(text).reward == reward
        if data == "begun.jsonl":
            assert text.startswith(PROTOCOL.prefix(occupation))
            assert text.count(PROTOCOL.prefix(occupation)) == 1 + completion.count(PROTOCOL.prefix(occupation))


def test_openrlhf_gives_the_rewards_of_score(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "--for", "openrlhf", "--model", "bundled", "--output", "data.jsonl"]) == 0
    rows = {read_label(row["label"])[1]: row for row in map(json.loads, Path("data.jsonl").read_text().splitlines())}
    given = texts(100)
    Path("given.jsonl").write_text(
        "".join(json.dumps([rows[name]["prompt"], rows[name]["label"], rest]) + "\n" for name, rest in given)
    )
    (rewards,) = run("with_openrlhf.py", model, "given.jsonl", sign="REWARDS ")
    assert rewards == [PROTOCOL.score(PROTOCOL.prefix(name) + rest).reward for name, rest in given]


def test_verl_gives_the_rewards_of_score(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "--for", "verl", "--output", "data.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    by_name = {row["extra_info"]["occupation"]: row for row in rows}
    given = texts(100)
    lines = [json.dumps([by_name[name], PROTOCOL.prefix(name) + rest]) for name, rest in given]
    Path("given.jsonl").write_text("\n".join(lines))
    (rewards,) = run("with_verl.py", model, "given.jsonl", sign="REWARDS ")
    expected = [PROTOCOL.score(PROTOCOL.prefix(name) + rest).reward for name, rest in given]
    assert rewards == pytest.approx(expected, abs=1e-6)
