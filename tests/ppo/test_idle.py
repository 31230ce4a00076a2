"""Options that do nothing are told, and refused where something else would be done."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.commands.train import configure
from equipoise.errors import UserError
from equipoise.methods.target import prepared
from equipoise.ppo.evaluate import read_pair_rates
from equipoise.ppo.facts import facts
from equipoise.ppo.idle import idle
from equipoise.ppo.presets import PRESETS, preset
from equipoise.ppo.train import train
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.targets import target_file
from tests.ppo.small import changed, small_config
from tests.tasks import foreign_task, one_class_task

ASKED = f"--even-power {preset('even').diversity.even_power:g}"
FROZEN = "--steps 3 leaves the policy as it is: in the first 3 only the value head learns (--value-warmup-steps)"
POWER = f"{ASKED} does nothing without --diversity-on even or --warm-start-target even"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (f"--preset near {ASKED}", [POWER]),
        (f"--preset bundled-cpu {ASKED}", [POWER]),
        ("--preset even --diversity-on pairs", []),  # the target has the power
        ("--preset near --steps 3", [FROZEN]),
        ("--preset near --steps 4", []),
        ("--preset even --diversity-on pairs --warm-start-target near", [POWER]),
        ("--preset even --warm-start-target near", []),
        ("--preset bundled-gpu --diversity-on pairs", ["--diversity-on pairs does nothing with --diversity-weight 0"]),
        ("--preset bundled-gpu --diversity-on pairs --on-alert rollback", []),
        (
            "--preset bundled-gpu --warm-start-fluency 1",
            ["--warm-start-fluency 1 does nothing without --warm-start-target"],
        ),
        (
            "--preset even --warm-start-target-rounds 0",
            ["--warm-start-fluency 1.2 does nothing without --warm-start-target-rounds"],
        ),
    ],
)
def test_an_option_that_others_leave_nothing_to_do_is_told(words: str, told: list[str]) -> None:
    assert idle(configure(words.split())[0]) == told


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_has_one(name: str) -> None:
    assert idle(preset(name)) == []


def test_a_power_of_shares_that_nobody_knows_is_refused_and_not_taken_for_all_alike(tmp_path: Path) -> None:
    config = preset("even")
    warm = replace(config.warm_start, warm_start_target="off")
    for each in (
        replace(config, warm_start=warm),
        small_config(Path("x"), tmp_path, diversity_on="even", even_power=1),
    ):
        with pytest.raises(
            UserError, match=r"even-power .* nothing says what they are: give --pair-rates, or .* alike"
        ):
            idle(each)
        with pytest.raises(UserError, match="even-power"):
            train(each)
        assert not idle(changed(each, even_power=0.0, diversity_weight=0.1, warm_start_fluency=0.0))
        assert not idle(changed(each, pair_rates="x.json", diversity_weight=0.1, warm_start_fluency=0.0))


def test_a_file_of_ones_own_takes_the_place_of_a_target_and_that_is_told() -> None:
    own = f"cache/{target_file('near', '00ff')}"
    assert WarmStartConfig(warm_start_target="near", warm_start_file=own).target == "near"
    for file in ("mine.csv", "even-00ff.csv", "near-mine.csv"):
        config = changed(preset("near"), warm_start_file=file)
        assert config.warm_start.target == "off" and config.warm_start.given
        assert idle(config) == ["--warm-start-target near does nothing beside --warm-start-file"]
        assert prepared(config) is config
        assert "sentences of a file" in facts(config, 1, 0.1, warmed=True)


@pytest.mark.parametrize(
    ("task", "pair", "sound"),
    [
        (PROTOCOL, ["bold", "caring"], True),
        (PROTOCOL, ["caring", "bold"], False),
        (PROTOCOL, ["careful"], False),
        (foreign_task(), ["klug*", "fürsorg*", "ehrlich"], True),
        (foreign_task(), ["klug", "fürsorg*", "ehrlich"], False),
        (one_class_task(), ["careful"], True),
        (one_class_task(), ["careful", "thorough"], False),
    ],
)
def test_rates_of_another_tasks_pairs_are_refused(task: Task, pair: list[str], sound: bool, tmp_path: Path) -> None:
    """Every pair of the task would else be one that the untrained model was never seen to write."""
    document: dict[str, Any] = {"pairs": [{"pair": pair, "value": 0.1, "variance": 0.0}], "unseen": 0.1, "n": 9}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(document))
    if sound:
        found = read_pair_rates(str(path), task)
        assert found is not None and list(found.rates) == [tuple(pair)]
    else:
        with pytest.raises(UserError, match=rf"it knows .*, which are no terms of the task {task.name}\): give"):
            read_pair_rates(str(path), task)
