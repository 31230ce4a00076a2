"""docs/EVALUATION.md defines every metric, and no other; its options exist."""

import dataclasses
import re
from pathlib import Path

from equipoise.evaluation.catalogue import CATALOGUE
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.results import Comparison, Estimate

DOCUMENT = (Path(__file__).parents[2] / "docs/EVALUATION.md").read_text(encoding="utf-8")


def test_every_metric_is_documented_in_its_tier_and_no_other_is() -> None:
    documented = {}
    for title, tier in (("Headline", "headline"), ("Diagnostics", "diagnostic"), ("Study-compatible", "study")):
        section = DOCUMENT.split(f"### {title}\n")[1].split("\n#")[0]
        for row in re.findall(r"^\| (`.*?) \|", section, re.M):
            documented |= dict.fromkeys(re.findall(r"`([^`]+)`", row), tier)
    assert documented == {key: metric.tier for key, metric in CATALOGUE.items()}


def test_every_interval_and_every_column_of_a_comparison_is_explained() -> None:
    kinds = re.findall(r'"([\w-]+)"', str(Estimate.__dataclass_fields__["interval"].type))
    for kind in kinds or ["clustered-wilson", "two-level", "woodruff", "jackknife", "wilson"]:
        if kind not in ("given", "none"):
            assert kind.replace("-", " ") in DOCUMENT.lower() or kind in DOCUMENT.lower(), kind
    for field in dataclasses.fields(Comparison):
        if field.name not in ("metric", "family", "a", "b", "n_occupations", "note"):
            assert f"`{field.name}`" in DOCUMENT, field.name


def test_the_options_it_names_exist() -> None:
    options = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(EvaluateConfig)} | {"--holdout"}
    assert set(re.findall(r"`(--[a-z-]+)", DOCUMENT)) <= options
