"""The durations of one step."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds per phase of one step. On a GPU it waits for the device, so that each phase pays for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.started = self._now()

    def _now(self, wait: bool = True) -> float:
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase: str, wait: bool = True) -> Iterator[None]:
        """`wait=False` for what happens on the host while the device works on another phase."""
        start = self._now(wait)
        yield
        self.seconds[phase] = self._now(wait) - start

    def timings(self, tokens: int) -> dict[str, float]:
        whole = self._now() - self.started
        out = {"time/step": whole, **{f"time/{phase}": s for phase, s in self.seconds.items()}}
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _peak_resident_bytes()
        return out | {"speed/tokens_per_second": tokens / whole, "memory/peak_gb": peak / 1e9}


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
