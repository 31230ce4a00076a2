"""docs/EVALUATION.md defines every metric, and no other; its options exist."""

import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

from equipoise.evaluation.catalogue import catalogue
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.results import Comparison, Estimate
from equipoise.protocol.task import PROTOCOL

TIERS = (
    ("Headline", "headline"),
    ("Diagnostics", "diagnostic"),
    ("Fairness", "fairness"),
    ("Study-compatible", "study"),
)
DOCUMENT = (Path(__file__).parents[2] / "docs/EVALUATION.md").read_text(encoding="utf-8")


def test_every_metric_is_documented_in_its_tier_and_no_other_is() -> None:
    documented = {}
    for title, tier in TIERS:
        section = DOCUMENT.split(f"### {title}\n")[1].split("\n#")[0]
        for row in re.findall(r"^\| (`.*?) \|", section, re.M):
            documented |= dict.fromkeys(re.findall(r"`([^`]+)`", row), tier)
    assert documented == {key: metric.tier for key, metric in catalogue(PROTOCOL).items()}


def test_every_interval_and_every_column_of_a_comparison_is_explained() -> None:
    kinds = get_args(get_type_hints(Estimate)["interval"])
    assert {"clustered-wilson", "two-level", "woodruff", "jackknife", "wilson"} <= set(kinds)
    for kind in kinds:
        if kind not in ("given", "none"):
            assert kind.replace("-", " ") in DOCUMENT.lower() or kind in DOCUMENT.lower(), kind
    for field in dataclasses.fields(Comparison):
        if field.name not in ("metric", "family", "a", "b", "n_occupations", "note"):
            assert f"`{field.name}`" in DOCUMENT, field.name


def test_the_options_it_names_exist() -> None:
    options = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(EvaluateConfig)} | {"--holdout"}
    assert set(re.findall(r"`(--[a-z-]+)", DOCUMENT)) <= options
