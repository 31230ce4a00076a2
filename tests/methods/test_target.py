"""Sentences of a target: what is resampled, and a run that begins with them."""

import csv
import importlib
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import cli
from equipoise.errors import UserError
from equipoise.learning.rounds import Target
from equipoise.measures.decomposition import PairRates, Rate, read_rates
from equipoise.methods import target
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.guided import Guided
from equipoise.methods.target import COPIES, Weighted, prepared, rates_of, resample
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.ppo.config import EvaluationConfig, TrainConfig
from equipoise.ppo.even import EvenPairs
from equipoise.ppo.train import train
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.task import PROTOCOL
from tests.killing import exit_code, in_child
from tests.ppo.small import changed, results, small_config
from tests.tiny import words_folder


def found(pairs: dict[tuple[str, str], list[float]]) -> list[Weighted]:
    return [
        Weighted("nurse", f"{' '.join(pair)} {i}", pair, math.log(weight))
        for pair, weights in pairs.items()
        for i, weight in enumerate(weights)
    ]


A, B, C = ("bold", "caring"), ("bold", "loyal"), ("decisive", "loyal")


def test_near_draws_in_proportion_to_the_weights_whatever_the_pair() -> None:
    pool = found({A: [1.0, 2.0], B: [5.0]})
    first: Counter[str] = Counter()
    for seed in range(4000):
        (chosen,) = resample(pool, Target("near"), 1, seed).sentences
        first[chosen.text] += 1
    for each in pool:
        share = math.exp(each.log_weight) / 8
        assert abs(first[each.text] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    made = resample(pool, Target("near"), 3, 0)
    assert {each.text for each in made.sentences} == {each.text for each in pool}
    assert made.effective == pytest.approx(8**2 / (1 + 4 + 25))


def test_even_draws_every_pair_alike_and_within_a_pair_by_the_weights() -> None:
    pool = found({A: [1.0] * 50, B: [1.0, 3.0] + [1e-9] * 20, C: [2.0]})
    made = resample(pool, Target("even"), 30, 0)
    count = Counter(each.pair for each in made.sentences)
    assert count == {A: 10, B: 10, C: COPIES}  # a single sentence, so often and no more
    texts = Counter(each.text for each in made.sentences if each.pair != C)
    assert set(texts.values()) == {1}
    first = Counter(
        each.text
        for seed in range(2000)
        for each in resample(pool, Target("even"), 3, seed).sentences
        if each.pair == B
    )
    assert first["bold loyal 1"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_with_a_power_each_pair_comes_as_often_as_ppo_wants_it() -> None:
    """That is in proportion to the root of its share, 0.8, 0.09, 0.1 − 10⁻⁶ and 10⁻⁶; a pair that is only forced, and
    one of which a single sentence carries all weight, count as the rarest of them."""
    rare, forced, unknown = ("bold", "friendly"), ("decisive", "caring"), ("decisive", "friendly")
    weights = {A: [0.8 / 600] * 600, B: [0.09 / 600] * 600, C: [(0.1 - 1e-6) / 600] * 600, rare: [1e-6 / 50] * 50}
    pool = found(weights | {unknown: [0.01]})
    spare = [Weighted("nurse", f"spare {i}", forced, 0.0) for i in range(100)]
    made = resample(pool, Target("even", 0.5), 1000, 0, spare)
    roots = {A: math.sqrt(0.8), B: 0.3, C: math.sqrt(0.1 - 1e-6), rare: 1e-3, forced: 1e-3, unknown: 1e-3}
    count = Counter(each.pair for each in made.sentences)
    assert count == {pair: math.ceil(1000 * root / sum(roots.values())) for pair, root in roots.items()}
    wanted = EvenPairs(6, 100, rates_of(pool), 0.5)
    assert [wanted.wanted[pair] for pair in weights] == pytest.approx([roots[p] / sum(roots.values()) for p in weights])
    assert wanted.wanted_rest == pytest.approx(wanted.wanted[rare])


def test_a_pair_with_too_few_gets_spare_sentences_before_any_comes_twice() -> None:
    pool = found({A: [1.0] * 50, B: [1.0, 3.0]})
    spare = [
        Weighted("nurse", f"spare {pair} {i}", pair, 0.0) for pair, n in ((A, 5), (B, 3), (C, 20)) for i in range(n)
    ]
    made = resample(pool, Target("even"), 30, 0, spare).sentences
    assert Counter(each.pair for each in made) == {A: 10, B: 10, C: 10}
    texts = Counter(each.text for each in made)
    assert not any(text.startswith(f"spare {A}") for text in texts)
    assert {texts[each.text] for each in made if each.pair != B} == {1}
    assert sorted(texts[each.text] for each in pool[50:]) == [2, 2]  # its own first, and again once the spare are used
    assert resample(pool, Target("near"), 30, 0, spare).sentences == resample(pool, Target("near"), 30, 0).sentences


def test_more_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(UserError, match="4 sentences cannot be drawn from 3"):
        resample(found({A: [1.0, 2.0], B: [5.0]}), Target("near"), 4, 0)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None, spread=0.05)


def run(words: Path, where: Path, kind: str = "even") -> TrainConfig:
    warm = WarmStartConfig(
        warm_start_target=kind,  # type: ignore[arg-type]
        warm_start_pool=400,
        warm_start_sentences=100,
        warm_start_target_rounds=2,
        warm_start_target_samples=600,
        warm_start_copies=4,
        warm_start_epochs=1,
        warm_start_learning_rate=1e-2,
    )
    config = small_config(words, where, steps=2, max_new_tokens=16, tuning="full", kl_in="both")
    return replace(config, warm_start=warm, evaluation=EvaluationConfig(eval_sentences=20, final_sentences=40))


def test_a_run_begins_with_the_targets_sentences_and_the_next_run_has_them_already(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    small = CtrlGConfig(hidden_states=8, distil_sentences=200, em_passes=1)
    monkeypatch.setattr(target, "CtrlGConfig", lambda: small)
    config = run(words, tmp_path)
    said: list[str] = []

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(target, "learn_towards", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(config, said.append)
    with monkeypatch.context() as after:  # what Ctrl-G wrote is kept
        after.setattr(target, "write", lambda *_: pytest.fail("they are there"))
        made = prepared(config, said.append)
    path = Path(made.warm_start.warm_start_file)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(PROTOCOL.strict(row["Text"]) for row in rows)
    pairs = Counter(PROTOCOL.match(row["Text"]).first for row in rows)
    assert len(pairs) > 50 and max(pairs.values()) <= 3
    (beside,) = (tmp_path / "cache").glob("even-*.csv.json")
    rates = read_rates(json.loads(beside.read_text()))
    (pool,) = (tmp_path / "cache").glob("pool-*.csv")
    with pool.open(newline="") as file:
        weights = [math.exp(float(row["LogWeight"])) for row in csv.DictReader(file)]
    assert len(weights) == 400 and rates.n == 400 + 2 * 600
    assert 0.05 < rates.p0 < 0.1  # Ctrl-G's sentences hold no <unk>, which a text does not show
    assert sum("effective sample size" in line for line in said) == 3 and any("the target itself" in x for x in said)

    monkeypatch.setattr(target, "write", lambda *_: pytest.fail("they are there"))
    assert prepared(config, said.append) == made
    near = prepared(run(words, tmp_path, "near"), said.append)  # from the same pool
    assert near.warm_start.warm_start_file != made.warm_start.warm_start_file
    assert train(made).status == "done"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(row["n"] for row in summary["outcomes"]) == 40
    final = summary["final"]
    assert final["kl_compliance"] + final["kl_variety"] + final["kl_waste"] == pytest.approx(final["kl"], abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert all("eval/kl_waste" in line for line in lines) and lines
    mean = sum(row["n"] * row["mean"] for row in summary["outcomes"]) / 40
    assert mean == pytest.approx(summary["final"]["kl"], abs=1e-6)


def dies_in(place: str) -> Callable[..., None]:
    """In place of a function, kills the process at its call; "MODULE.NAME:N" at the N-th, all before being made."""
    where, _, number = place.partition(":")
    module, _, name = where.rpartition(".")
    real, left = getattr(importlib.import_module(f"equipoise.{module}"), name), int(number or 1)

    def call(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    return call


def test_a_run_towards_even_pairs_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a round, between the two files of the target, before it learns from them, while the first checkpoint is
    written, and in the second step."""
    small = CtrlGConfig(hidden_states=4, distil_sentences=60, em_passes=1)
    monkeypatch.setattr(target, "CtrlGConfig", lambda: small)

    def work(where: Path) -> int:
        monkeypatch.setenv("EQUIPOISE_CACHE", str(where / "cache"))
        argv = ["train", "--preset", "even", "--model", str(words), "--prompt", "raw", "--device", "cpu"]
        argv += [
            "--dtype",
            "float32",
            "--steps",
            "3",
            "--batch-size",
            "8",
            "--mini-batch-size",
            "4",
            "--save-every",
            "1",
            "--value-warmup-steps",  # the preset's three would leave the policy as it is
            "1",
        ]
        argv += ["--base-samples", "0", "--eval-sentences", "0", "--final-sentences", "0", "--max-new-tokens", "16"]
        argv += ["--warm-start-pool", "60", "--warm-start-sentences", "32", "--warm-start-target-samples", "300"]
        argv += ["--output-dir", str(where / "out"), "--checkpoint-dir", str(where / "checkpoints")]
        return cli.main([*argv, "--tensorboard-dir", str(where / "runs")])

    def killed(where: Path, place: str) -> int:
        module, _, name = place.partition(":")[0].rpartition(".")
        setattr(importlib.import_module(f"equipoise.{module}"), name, dies_in(place))
        return work(where)

    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    assert work(undisturbed) == 0
    for place in (
        "learning.rounds.draw:2",
        "methods.target._put:2",
        "ppo.warm_start.supervise",
        "ppo.train._run_steps",
        "ppo.train.ppo_step:2",
    ):
        assert exit_code(in_child(partial(killed, disturbed, place))) == -signal.SIGKILL, place
    assert work(disturbed) == 0
    assert results(disturbed, 3) == results(undisturbed, 3)


def test_the_sentences_do_not_depend_on_what_the_process_did_before(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = CtrlGConfig(hidden_states=4, distil_sentences=60, em_passes=1)
    monkeypatch.setattr(target, "CtrlGConfig", lambda: small)
    config, files = changed(run(words, tmp_path, "near"), tuning="lora"), []  # adapters start at random
    for name in "ab":
        monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / name))
        files.append(Path(prepared(config, lambda _: None).warm_start.warm_start_file).read_bytes())
        torch.manual_seed(99)
    assert files[0] == files[1]


@pytest.mark.parametrize("ends", ["well", "killed"])
def test_who_wants_what_another_process_writes_waits_for_it(
    ends: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is stopped in the middle of Ctrl-G's sentences, until this one says that it waits. Where the other is
    killed then, this one writes them itself."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    small = CtrlGConfig(hidden_states=4, distil_sentences=60, em_passes=1)
    monkeypatch.setattr(target, "CtrlGConfig", lambda: small)
    config, real = run(words, tmp_path, "near"), target.write
    (begun, has_begun), (go, goes_on) = os.pipe(), os.pipe()

    def stops(*given: Any) -> Any:
        os.write(has_begun, b"x")
        assert os.read(go, 1) == b"x"
        if ends == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    def other() -> int:
        monkeypatch.setattr(target, "write", stops)
        prepared(config, lambda _: None)
        return 0

    said, written = [], []

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            os.write(goes_on, b"x")

    def counted(*given: Any) -> Any:
        written.append(1)
        return real(*given)

    child = in_child(other)
    assert os.read(begun, 1) == b"x"
    monkeypatch.setattr(target, "write", counted)
    made = prepared(config, say)
    os.write(goes_on, b"x")  # should nobody have waited
    assert exit_code(child) == (0 if ends == "well" else -signal.SIGKILL)
    assert "another process writes near-" in said[0] and len(written) == (ends == "killed")
    assert Path(made.warm_start.warm_start_file).is_file()


@pytest.mark.parametrize(("there", "said"), [("link", "is a link"), ("folder", "is a folder"), ("pipe", "is no file")])
def test_what_lies_in_place_of_a_lock_is_named_before_anything_is_written(
    there: str, said: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(target, "_write_target", lambda *_: None)
    prepared(run(words, tmp_path, "near"))
    (lock,) = (tmp_path / "cache").iterdir()
    lock.unlink()
    {"link": lambda: lock.symlink_to(tmp_path / "elsewhere"), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[
        there
    ]()
    monkeypatch.setattr(target, "_write_target", lambda *_: pytest.fail("nothing is written"))
    with pytest.raises(UserError, match=rf"cannot write .*\.lock \(near-\w+\.csv\.lock {said}\): .* EQUIPOISE_CACHE"):
        prepared(run(words, tmp_path, "near"))


@pytest.mark.parametrize("ending", [".csv", ".csv.json", "pool"])
def test_a_folder_in_place_of_a_targets_file_is_refused_before_anything_is_written(
    ending: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(target, "_write_target", lambda _, __, pool, files, ___: named.extend([pool, *files]))
    named: list[Path] = []
    prepared(run(words, tmp_path, "near"))
    place = named[("pool", ".csv", ".csv.json").index(ending)]
    place.mkdir()
    monkeypatch.setattr(target, "_write_target", lambda *_: pytest.fail("nothing is written"))
    with pytest.raises(UserError, match=rf"{place.name} is no file: move it away"):
        prepared(run(words, tmp_path, "near"))


def test_pairs_that_are_none_are_refused_before_the_run(words: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "x.json"
    wrong.write_text('{"pair_rates": {"event": "both", "pairs": [], "unseen": 0.1, "n": 2}}')
    for path in (wrong, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"--pair-rates .* cannot be used .*: give a costs file of Ctrl-G"):
            train(small_config(words, tmp_path, pair_rates=str(path)))


def test_without_them_the_run_says_who_writes_them(words: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"start the run with equipoise train, or pass .*prepared"):
        train(run(words, tmp_path))
    plain = small_config(words, tmp_path)
    assert prepared(plain) is plain


@pytest.mark.parametrize("name", ["warm_start_pool", "warm_start_target_samples"])
def test_samples_that_give_no_error_of_a_probability_are_refused_before_any_is_written(
    words: Path, tmp_path: Path, name: str
) -> None:
    config = run(words, tmp_path)
    least = 2 * len(PROTOCOL.names)
    small = replace(config.warm_start, **{"warm_start_sentences": 16, name: least - 1})
    with pytest.raises(UserError, match=rf"{name.replace('_', '-')} 39 is less than two .* 20 occupations: .* {least}"):
        prepared(replace(config, warm_start=small), lambda _: pytest.fail("nothing is written"))


@pytest.mark.parametrize(
    ("kind", "change", "others"),
    [
        ("near", {"warm_start_learning_rate": 2e-2}, True),
        ("near", {"warm_start_batch_size": 7}, True),
        ("near", {"warm_start_fluency": 1.0}, True),
        ("even", {"even_power": 0.1}, True),
        ("near", {"even_power": 0.1}, False),  # which is of `even`
        ("even", {"gradient_checkpointing": True}, False),  # which memory decides
        ("even", {"seed": 1}, False),
    ],
)
def test_what_the_rounds_learn_with_makes_other_sentences_and_nothing_else_does(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: dict[str, float], others: bool
) -> None:
    """They would else be taken from a run that learnt otherwise, or be made again for nothing."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(target, "_pool", lambda *_: [])
    monkeypatch.setattr(target, "forced", lambda *_: [])
    monkeypatch.setattr("equipoise.methods.prompted.Prompted.load", lambda *_: None)
    monkeypatch.setattr(target, "_of_target", lambda *_: (PairRates({A: Rate(0.1, 0.0)}, 0.1, 10), []))
    config = run(words, tmp_path, kind)
    files = [prepared(each, lambda _: None).warm_start.warm_start_file for each in (config, changed(config, **change))]
    assert (files[0] != files[1]) == others
    Path(f"{files[0]}.json").unlink()  # and both are there, or written
    assert Path(prepared(config, lambda _: None).evaluation.pair_rates).is_file()


def test_a_nucleus_has_no_target(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    small = CtrlGConfig(hidden_states=8, distil_sentences=200, em_passes=1)
    policy = PolicyConfig(model=str(words), device="cpu", dtype="float32")
    writer = Guided(policy, small, prompt="raw", sampling=SamplingConfig(1.0, 0.9, 16), seed=0, task=PROTOCOL)
    with pytest.raises(UserError, match=r"Ctrl-G samples at .*top-p 0.9.*: use 1 and 1"):
        target.write(writer, 4, lambda _: None)
