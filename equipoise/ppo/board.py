"""A run's curves in TensorBoard: each with what it shows, and a page of its own for those to look at first."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.documents import read_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_DESCRIPTIONS = Path(__file__).with_name("curves.json")
LAYOUT = {
    "The guide's two curves": {
        "mean reward": ["Multiline", ["^reward/mean$"]],
        "KL of the update, which target_kl bounds": ["Multiline", ["^ppo/update_kl$"]],
    },
    "What is written": {
        "share with every class, strictly, in length": ["Multiline", [r"^compliance/(both|strict|in_length)$"]],
        "variety: effective pairs": ["Multiline", ["^watch/effective_pairs$"]],
        "length in words": ["Multiline", ["^text/words$"]],
    },
    "Distance to the reference model": {
        "KL, and the least that compliance needs": ["Multiline", [r"^kl/(ref|bound)$"]],
        "fluency: nats per token": ["Multiline", ["^watch/nll$"]],
    },
}
"""TensorBoard's page "Custom scalars": groups of charts, each of the curves whose names match."""


@cache
def _described() -> dict[str, str]:
    return {str(key): str(text) for key, text in read_json(_DESCRIPTIONS).items()}


def description(key: str) -> str:
    """What the curve of that key shows, with its unit, as `docs/METRICS.md` has it; empty for a key that it lacks.

    Of the keys of a task's classes it has those of the default task's."""
    known = _described()
    return known.get(key) or (known["watch/top_agentic"] if key.startswith("watch/top_") else "")


def draw_scalars(board: "SummaryWriter", values: Mapping[str, float], step: int, described: set[str]) -> None:
    """What `add_scalar` writes for each key, as one event: 0.4 ms where 70 of them took 5.6. A key that is not yet in
    `described`, the first in its file, comes with its description, and is added."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    points = []
    for key, value in values.items():
        about = None if key in described else SummaryMetadata(summary_description=description(key))
        points.append(Summary.Value(tag=key, simple_value=value, metadata=about))
    described.update(values)
    assert board.file_writer is not None
    board.file_writer.add_summary(Summary(value=points), step)
