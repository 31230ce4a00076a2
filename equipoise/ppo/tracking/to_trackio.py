"""trackio: on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says. TRACKIO_PROJECT names the project."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.ppo.tracking.tracker import Opened, Row, Start, cell, columns

PROJECT = "equipoise"


class ToTrackio:
    def __init__(self) -> None:
        self._run: Any = None

    def open(self, start: Start) -> Opened:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # Runs are found again by their name, so that has to be unique.
        self._run = trackio.init(
            project=project,
            name=f"{start.name}-{start.id}",
            config=dict(start.config),
            resume="allow" if start.continues else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        after: Any = getattr(self._run, "_next_step", None)  # one more than the last that is stored
        last = max(0, after - 1) if isinstance(after, int) else None
        return Opened(last if start.continues else 0, f"project {project}, `trackio show`")

    def send(self, row: Row) -> None:
        logged: dict[str, Any] = dict(row.values)
        if row.samples:
            import trackio

            names = columns(row.samples)
            logged["samples"] = trackio.Table(
                columns=names, data=[[cell(sample.get(name)) for name in names] for sample in row.samples]
            )
        self._run.log(logged, step=row.step)

    def files(self, paths: Sequence[Path], kind: str) -> None:
        import trackio

        artifact = trackio.Artifact(f"{kind}-{self._run.name}", type=kind)
        for path in paths:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self._run.finish()
