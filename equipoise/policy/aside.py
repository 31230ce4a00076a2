"""Streams beside the main one, for what a model that leaves most of a GPU idle can have computed meanwhile.

One is for the gradients of weights: no other layer waits for them, while every layer below waits for those of
activations. Another is for small products that are needed as soon as a large one is done, which reads the same.

Within a CUDA graph streams become branches, which are joined before the graph ends. Where none is recorded, and on a
CPU, work is done where it is given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from equipoise.policy.graphs import recording

Work = Callable[[], object]
Found = TypeVar("Found")
Meanwhile = TypeVar("Meanwhile")
_streams: dict[tuple[str, torch.device], Any] = {}


def _stream(name: str, device: torch.device) -> Any:
    if (name, device) not in _streams:
        _streams[name, device] = torch.cuda.Stream(device)
    return _streams[name, device]


def beside(device: torch.device, small: Callable[[], Found], large: Callable[[], Meanwhile]) -> tuple[Found, Meanwhile]:
    """(small(), large()), both after all that the main stream has been given, neither after the other. Neither may
    change what the other reads."""
    if device.type != "cuda" or not recording():
        return small(), large()
    main, stream = torch.cuda.current_stream(device), _stream("beside", device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        found = small()
    meanwhile = large()
    main.wait_stream(stream)
    return found, meanwhile


class _Given(NamedTuple):
    """The work of one layer. It holds the tensors that it reads: they must not be given out before it is done."""

    work: list[Work]
    done: Any
    """An event."""
    recorded: bool
    """Within a graph that is being recorded."""


class Aside:
    """What is to be done aside in one backward pass, layer by layer; the main stream is never more than a layer ahead,
    so that no more than two layers' tensors are held."""

    def __init__(self) -> None:
        self._work: list[Work] = []
        self._before: _Given | None = None

    def do(self, device: torch.device, work: Work) -> None:
        """`work()` after all that the main stream has been given until now. What it writes may be read, and what it
        reads may be changed, after `end_layer` of the next layer, or of this one where it is the last."""
        if device.type != "cuda" or not recording():
            work()
            return
        stream = _stream("aside", device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            work()
        self._work.append(work)

    def end_layer(self, device: torch.device, last: bool) -> None:
        """The main stream waits for the layer before this one; after the `last` for everything."""
        if device.type != "cuda" or not recording():
            return
        main, recorded = torch.cuda.current_stream(device), torch.cuda.is_current_stream_capturing()
        # What a failed pass has left was of another recording, or is over: before one begins, the device is waited for.
        if self._before is not None and self._before.recorded == recorded:
            main.wait_event(self._before.done)
        self._before = None
        if not self._work:
            return
        given = _Given(self._work, _stream("aside", device).record_event(), recorded)
        self._work = []
        if last:
            main.wait_event(given.done)
        else:
            self._before = given


aside = Aside()
"""Of this process: backward passes follow each other."""
