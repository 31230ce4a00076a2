"""Which checkpoint is exported: the rule by hand, and that it holds in runs that are pruned and continued."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise.ppo import finish as finishing
from equipoise.ppo.choice import Choice, better
from equipoise.ppo.train import Outcome, train

from .small import checkpoints, results, rows, small_config, tensors


def found(step: int, strict: float, pairs: float = 10.0, kl: float = 8.0, n: int = 260) -> dict[str, float]:
    return {"step": step, "strict": strict, "effective_pairs": pairs, "kl": kl, "n": n}


def best_of(*evaluations: dict[str, float]) -> int | None:
    choice = Choice()
    for evaluation in evaluations:
        choice.consider(evaluation)
    return choice.step


def test_clearly_more_strict_success_wins_whatever_the_rest() -> None:
    assert best_of(found(1, 0.5, pairs=50, kl=1), found(2, 0.9, pairs=2, kl=20)) == 2
    assert best_of(found(1, 0.9, pairs=2, kl=20), found(2, 0.5, pairs=50, kl=1)) == 1


def test_within_the_sampling_error_more_pairs_win_and_of_as_many_the_lower_kl() -> None:
    """The 95 % Wilson interval of 247 of 260 (95 %) begins at 91.6 %."""
    assert best_of(found(1, 0.95, pairs=10), found(2, 0.92, pairs=12)) == 2
    assert best_of(found(1, 0.95, pairs=10), found(2, 0.91, pairs=12)) == 1
    assert best_of(found(1, 0.92, pairs=12), found(2, 0.95, pairs=10)) == 1
    assert best_of(found(1, 0.95, pairs=10, kl=8), found(2, 0.95, pairs=10.1, kl=7)) == 2
    assert best_of(found(1, 0.95, pairs=10, kl=7), found(2, 0.95, pairs=10.1, kl=8)) == 1
    assert best_of(found(1, 0.95), found(2, 0.95)) == 1  # of equals the earlier


def test_many_small_steps_down_cannot_lead_away_from_the_highest_strict_success() -> None:
    slide = [found(i, 0.95 - 0.01 * i, pairs=10 * 1.1**i) for i in range(20)]
    assert best_of(*slide) == 3  # 0.92 is the last within the error of 0.95


def test_the_best_is_left_when_a_higher_success_puts_it_out_of_reach() -> None:
    assert best_of(found(1, 0.90, pairs=50), found(2, 0.93, pairs=5), found(3, 0.99, pairs=1)) == 3
    assert not better(found(2, 0.2), found(1, 0.3), highest=0.9)  # both out of reach: the higher stays


def test_nothing_complied_at_all() -> None:
    assert best_of(found(1, 0.0, pairs=0, kl=0.5), found(2, 0.0, pairs=0, kl=0.1)) == 2


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Strict success by step, in place of what evaluations would find; 0 elsewhere."""
    script: dict[int, float] = {}
    evaluate = finishing.evaluate_checkpoint

    def pretend(training: Any, run: Any) -> Any:
        return evaluate(training, run) | {"strict": script.get(training.state.step, 0.0)}

    monkeypatch.setattr(finishing, "evaluate_checkpoint", pretend)
    return script


MOVING = {"eval_sentences": 8, "tuning": "full", "learning_rate": 0.01, "save_every": 1, "keep_checkpoints": 1}


def test_the_best_checkpoint_survives_pruning_and_is_what_is_exported(
    model: Path, tmp_path: Path, scripted: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted[2] = 1.0
    assert train(small_config(model, tmp_path, **MOVING)) == Outcome("done", 6, 0)
    # The last checkpoint at which nothing was amiss is kept too; it may be any.
    assert {2, 6} <= set(checkpoints(tmp_path)) and len(checkpoints(tmp_path)) <= 3
    exported = load_file(tmp_path / "out/model.safetensors")
    best, last = tensors(tmp_path, 2), tensors(tmp_path, 6)
    assert all(torch.equal(x, best[f"weights/{n}"]) for n, x in exported.items() if f"weights/{n}" in best)
    assert any(not torch.equal(x, last[f"weights/{n}"]) for n, x in exported.items() if f"weights/{n}" in last)
    said = " ".join(capsys.readouterr().out.split())
    assert "exported step 2: the best evaluation (strict success 100.0 % of 8 sentences" in said
    assert json.loads((tmp_path / "out/summary.json").read_text())["exported_step"] == 2
    assert "exported: step 2, the best evaluation" in (tmp_path / "out/README.md").read_text()


def test_the_last_is_exported_where_that_is_asked_or_nothing_was_evaluated(
    model: Path, tmp_path: Path, scripted: dict[int, float]
) -> None:
    scripted[2] = 1.0
    for name, changes in (("asked", {"export": "last"}), ("none", {"eval_sentences": 0})):
        where = tmp_path / name
        train(small_config(model, where, **(MOVING | changes)))
        exported, last = load_file(where / "out/model.safetensors"), tensors(where, 6)
        assert all(torch.equal(x, last[f"weights/{n}"]) for n, x in exported.items() if f"weights/{n}" in last)


def test_a_last_step_that_is_no_multiple_takes_part_without_being_remembered(
    model: Path, tmp_path: Path, scripted: dict[int, float]
) -> None:
    scripted |= {2: 0.5, 5: 1.0}
    settings = MOVING | {"save_every": 2, "steps": 5}
    train(small_config(model, tmp_path, **settings))
    assert json.loads((tmp_path / "out/summary.json").read_text())["exported_step"] == 5
    assert json.loads((tmp_path / "checkpoints/checkpoint-5/state.json").read_text())["choice"]["best"]["step"] == 2
    evaluated = [json.loads(line)["step"] for line in (tmp_path / "out/eval.jsonl").read_text().splitlines()]
    assert evaluated == [2, 4]


def test_a_run_in_parts_evaluates_chooses_and_exports_as_an_uninterrupted_one(model: Path, tmp_path: Path) -> None:
    settings = MOVING | {"save_every": 2, "max_new_tokens": 12, "eval_sentences": 20}
    for steps in (1, 3, 5, 6):
        train(small_config(model, tmp_path / "parts", **(settings | {"steps": steps})))
    train(small_config(model, tmp_path / "straight", **settings))
    assert results(tmp_path / "parts", 6) == results(tmp_path / "straight", 6)
    assert (tmp_path / "parts/out/eval.jsonl").read_bytes() == (tmp_path / "straight/out/eval.jsonl").read_bytes()


def test_evaluating_leaves_the_training_as_it_is(model: Path, tmp_path: Path) -> None:
    train(small_config(model, tmp_path / "with", eval_sentences=8, final_sentences=8))
    train(small_config(model, tmp_path / "without"))
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    assert len((tmp_path / "with/out/final_sentences.jsonl").read_text().splitlines()) == 8


def test_a_best_checkpoint_that_is_gone_is_said_and_the_last_exported(
    model: Path, tmp_path: Path, scripted: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted[2] = 1.0
    monkeypatch.setattr(finishing.SharedRun, "checkpoint_at", lambda self, step: None)
    train(small_config(model, tmp_path, **MOVING))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["exported_step"] == 6 and "is gone" in summary["exported_because"]
