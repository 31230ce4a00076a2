"""`equipoise export`: a checkpoint as a finished model folder."""

from pathlib import Path

from equipoise.options import parse
from equipoise.ppo.tool_config import ExportConfig


def main(argv: list[str]) -> int:
    """Write the folder. Returns 0; raises UserError."""
    config = parse(
        ExportConfig,
        argv,
        ExportConfig(Path("rlhf_checkpoints")),
        prog="equipoise export",
        description="Write the model of a training's checkpoint, adapters merged, as training writes its final one.",
    )
    from equipoise.ppo.export_checkpoint import export_checkpoint
    from equipoise.runs.console import quiet

    quiet()
    export_checkpoint(config)
    return 0
