"""A reward of the user's own: in every record, the same until the end, and nothing lost where it fails."""

import functools
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from equipoise.errors import UserError
from equipoise.ppo.functions import FunctionFailed, Functions, name_of, source_hash
from equipoise.ppo.train import Outcome, train

from .small import checkpoints, events, results, small_config


def short(texts: Sequence[str], _: Sequence[str]) -> list[float]:
    return [1.0 / len(text.split()) for text in texts]


def other(texts: Sequence[str], _: Sequence[str]) -> list[float]:
    return [2.0 / len(text.split()) for text in texts]


def spread(texts: Sequence[str], _: Sequence[str]) -> float:
    return len(set(texts)) / len(texts)


def test_the_function_is_the_reward_of_the_run_on_screen_in_samples_summary_record_and_card(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(model, tmp_path, steps=2, sample_every=1), short, spread)
    out, name = tmp_path / "out", "tests.ppo.test_functions.short"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"reward: the function {name} (source {source_hash(short)[:8]}), in place of the task's"
    assert printed[1].startswith("rank of checkpoints: the function tests.ppo.test_functions.spread (source ")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["reward_fn"] for s in samples] == [1.0 / len(s["text"].split()) for s in samples]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    means = [sum(s["reward_fn"] for s in samples if s["step"] == step) / 8 for step in (1, 2)]
    assert [row["reward/function"] for row in metrics] == pytest.approx(means)
    steps = [line for line in printed if line.startswith("step 1/")]
    assert f"reward {means[0]:.3f}" in steps[0]
    shown = next(line for line in printed if line.startswith(f"  {samples[0]['reward_fn']:+.2f}  "))
    assert "the task's reward" in printed[printed.index(shown) + 1]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["reward_fn"], summary["reward_fn_source"]) == (name, source_hash(short))
    assert summary["reward_last"] == pytest.approx(sum(means) / 2) and summary["good_step"] is None
    assert any(line.startswith("  reward ") and line.endswith(f"by {name}") for line in printed)
    record = json.loads((out / "run.json").read_text())
    assert record["reward_fn_source"] == source_hash(short) and record["rank_fn"].endswith(".spread")
    assert f"- Reward: the function `{name}`, in place of the task's" in (out / "README.md").read_text()


def test_without_a_function_no_record_speaks_of_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(model, tmp_path, steps=1, save_every=1))
    for name in ("run.json", "summary.json", "samples.jsonl", "metrics.jsonl", "README.md"):
        assert "reward_fn" not in (tmp_path / "out" / name).read_text()
    assert "in place of the task's" not in capsys.readouterr().out + (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        (short, None, r"reward_fn: tests\.ppo\.test_functions\.short \(source \w{8}\) → none"),
        (None, short, r"reward_fn: none → tests\.ppo\.test_functions\.short"),
        (short, other, r"short \(source \w{8}\) → tests\.ppo\.test_functions\.other"),
    ],
)
def test_a_run_goes_on_with_its_own_function_only_or_with_another_that_is_recorded(
    model: Path, tmp_path: Path, first: Any, then: Any, says: str
) -> None:
    train(small_config(model, tmp_path, steps=2), first)
    config = small_config(model, tmp_path, steps=3)
    (tmp_path / "out" / "run.json").write_text((tmp_path / "out" / "run.json").read_text().replace("_fn", "_gone"))
    with pytest.raises(UserError, match=f"holds a run with other functions .*{says}"):
        train(config, then)
    with pytest.raises(UserError, match="rank_fn: none → "):
        train(config, first, spread)
    assert checkpoints(tmp_path) == [2]
    if first is None or then is None:  # one CSV cannot have a column for some of its rows
        with pytest.raises(UserError, match=r"holds a run with other functions .*to continue it, other folders"):
            train(config, then, changed_functions=True)
        return
    assert train(config, then, changed_functions=True).status == "done"
    assert "functions_changed" in events(tmp_path)
    assert train(small_config(model, tmp_path, steps=4), then).status == "done"


def made(source: str, tmp_path: Path) -> Callable[..., Any]:
    """`f` of a module that a file of this source is."""
    path = tmp_path / "made.py"
    path.write_text(textwrap.dedent(source))
    import linecache

    linecache.clearcache()
    module = ModuleType("made")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module.f  # type: ignore[no-any-return]


def test_the_hash_tells_apart_sources_defaults_closures_and_attributes(tmp_path: Path) -> None:
    sources = [
        "def f(t, o): return [1.0 for _ in t]",
        "def f(t, o): return [2.0 for _ in t]",
        "def f(t, o, k=1): return [k for _ in t]",
        "def f(t, o, k=2): return [k for _ in t]",
        "def g(k):\n    def f(t, o): return [k for _ in t]\n    return f\nf = g(1)",
        "def g(k):\n    def f(t, o): return [k for _ in t]\n    return f\nf = g(2)",
        "def g(h):\n    def f(t, o): return [h() for _ in t]\n    return f\ndef h(): return 1\nf = g(h)",
        "def g(h):\n    def f(t, o): return [h() for _ in t]\n    return f\ndef h(): return 2\nf = g(h)",
        "import functools\ndef g(k, t, o): return [k for _ in t]\nf = functools.partial(g, 1)",
        "import functools\ndef g(k, t, o): return [k for _ in t]\nf = functools.partial(g, 2)",
    ]
    hashes = [source_hash(made(source, tmp_path)) for source in sources]
    assert len(set(hashes)) == len(sources)
    assert hashes == [source_hash(made(source, tmp_path)) for source in sources]

    class Weighed:
        def __init__(self, weight: float) -> None:
            self.weight, self.cache = weight, object()

        def __call__(self, texts: Sequence[str], _: Sequence[str]) -> list[float]:
            return [self.weight] * len(texts)

    assert source_hash(Weighed(1.0)) == source_hash(Weighed(1.0)) != source_hash(Weighed(2.0))
    assert name_of(Weighed(1.0)).endswith("Weighed")
    assert name_of(functools.partial(short)) == "functools.partial of tests.ppo.test_functions.short"
    assert source_hash(len) == source_hash(len)


def failing(at: int, calls: list[int]) -> Callable[..., Any]:
    """`short`, which raises for one sentence in the `at`-th batch."""

    def reward(texts: Sequence[str], occupations: Sequence[str]) -> list[float]:
        if len(texts) > 1:
            calls.append(len(texts))
            failing.bad = texts[5]  # type: ignore[attr-defined]
        if len(calls) == at and failing.bad in texts:  # type: ignore[attr-defined]
            raise ZeroDivisionError("no words\nin it")
        return short(texts, occupations)

    return reward


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_where_the_reward_raises_the_state_is_saved_and_one_line_names_function_and_sentence(
    model: Path, tmp_path: Path, at: int
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(small_config(model, straight, save_every=3), short)
    with pytest.raises(FunctionFailed) as caught:
        train(small_config(model, broken, save_every=3), failing(at, []))
    line = str(caught.value)
    assert "\n" not in line and repr(failing.bad) in line  # type: ignore[attr-defined]
    assert "failing.<locals>.reward raised ZeroDivisionError: no words in it for the sentence" in line
    assert f"Step {at - 1} is saved" in line and isinstance(caught.value.__cause__, ZeroDivisionError)
    kept = (broken / "out" / "function_error.txt").read_text()
    assert "in reward" in kept and "ZeroDivisionError" in kept
    assert checkpoints(broken)[-1] == at - 1 and events(broken)[-1] == "function_failed"
    outcome = train(small_config(model, broken, save_every=3), short, changed_functions=True)
    assert outcome == Outcome("done", 6, 0) and results(broken, 6) == results(straight, 6)


@pytest.mark.parametrize("at", [2, pytest.param(4, marks=pytest.mark.slow)])  # evaluations: of step 2, of step 4
def test_where_the_rank_raises_the_evaluation_is_made_up_for_when_the_run_goes_on(
    model: Path, tmp_path: Path, at: int
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    changes = {"eval_sentences": 8, "export": "best"}
    train(small_config(model, straight, **changes), None, spread)
    calls: list[int] = []

    def rank(texts: Sequence[str], occupations: Sequence[str]) -> float:
        calls.append(len(texts))
        if len(calls) == at // 2:
            raise KeyError("judge")
        return spread(texts, occupations)

    with pytest.raises(FunctionFailed, match=rf"rank raised KeyError: 'judge' for an .* 8 sentences\. Step {at} is"):
        train(small_config(model, broken, **changes), None, rank)
    assert checkpoints(broken)[-1] == at
    outcome = train(small_config(model, broken, **changes), None, spread, changed_functions=True)
    assert outcome == Outcome("done", 6, 0) and results(broken, 6) == results(straight, 6)
    assert (broken / "out" / "eval.jsonl").read_bytes() == (straight / "out" / "eval.jsonl").read_bytes()


def test_what_a_function_does_to_its_lists_is_its_own_affair() -> None:
    def spoiling(texts: list[str], occupations: list[str]) -> list[float]:
        numbers = [float(len(text)) for text in texts]
        texts.clear()
        occupations[:] = ["nobody"]
        return numbers

    texts, occupations = ["a", "bc"], ["nurse", "pilot"]
    assert Functions(spoiling).rewards(texts, occupations) == [1.0, 2.0]
    assert Functions(spoiling, lambda *given: sum(spoiling(*given))).rank_of(texts, occupations) == 3.0
    assert (texts, occupations) == (["a", "bc"], ["nurse", "pilot"])
