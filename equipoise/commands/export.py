"""`equipoise export`: a checkpoint as a finished model folder."""

from pathlib import Path

from equipoise.options import parse
from equipoise.ppo.export_checkpoint import ExportConfig, export_checkpoint
from equipoise.runs.console import quiet


def main(argv: list[str]) -> int:
    """Write the folder. Returns 0; raises UserError."""
    config = parse(
        ExportConfig,
        argv,
        ExportConfig(Path("rlhf_checkpoints")),
        prog="equipoise export",
        description="Write the model of a training's checkpoint, adapters merged, as training writes its final one.",
    )
    quiet()
    export_checkpoint(config)
    return 0
