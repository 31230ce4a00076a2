"""What `equipoise.yaml` beside it names: prompts, and what is measured of a completion. lm-eval loads it by path."""

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.plugins.measured import MEANS, Asked, asked, measured
from equipoise.plugins.measured import effective_pairs as effective_pairs
from equipoise.plugins.measured import unique_pairs as unique_pairs


def rows(task: str = "", prompt: str = "", runs: int = 1, prompts: str = "", **_: Any) -> list[dict[str, Any]]:
    """The data set's rows, from lm-eval's `--metadata`; what else is in it is lm-eval's own. Raises UserError."""
    found = asked(task, prompt, runs, prompts)
    if any(each.system for each in found):
        raise UserError(
            "lm-eval takes one system message for all prompts, with --system_instruction: write the prompts without "
            "--system, and give it there; or with --model, as the text that the model reads"
        )
    return [each._asdict() for each in found]


def dataset(**metadata: Any) -> dict[str, Any]:
    """What lm-eval calls for the data."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows(**metadata))}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """lm-eval's numbers of one document and its one completion, in the order and by the names of the YAML file."""
    found = measured(doc["label"], Asked(**doc).prompt, results[0])
    return {**{name: found[name] for name in MEANS}, "unique_pairs": found["pair"], "effective_pairs": found["pair"]}
