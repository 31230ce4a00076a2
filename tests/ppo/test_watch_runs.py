"""What a run does about the alerts of its watch: warns, stops or goes back; and judging a finished run again."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.ppo.signs import Sign
from equipoise.ppo.train import Outcome, train
from equipoise.ppo.watch import Watch
from equipoise.ppo.watch_config import WatchConfig
from equipoise.protocol.task import PROTOCOL
from tests.tiny import CHAT_TEMPLATE, words_folder

from .small import checkpoints, events, results, rows, small_config

ROOT = Path(__file__).parents[2]

# With these thresholds the sign of low entropy holds at every step: the alert comes at step 3.
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
