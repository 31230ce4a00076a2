"""What a run is computed in: on record in its checkpoints, so that it goes on so whatever `auto` is by then."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from equipoise.errors import UserError
from equipoise.policy.config import PolicyConfig
from equipoise.policy.load import former_dtype, pick_device, pick_dtype
from equipoise.runs.checkpoint import Checkpoint

DOCUMENT = "computed"
"""In a checkpoint: `computed` of its run."""
DTYPES = ("float32", "bfloat16")
"""That a model may be computed in, by their names in PyTorch."""


def computed(policy: PolicyConfig) -> dict[str, str]:
    """The kind of device that the model is computed on, and the dtype."""
    device = pick_device(policy.device)
    return _named(device, pick_dtype(policy.dtype, device))


def on_record(checkpoint: Checkpoint, device: str) -> Mapping[str, str]:
    """`computed` of the checkpoint's run; one that does not say it is of before that was kept, when `auto` was
    `former_dtype`, as if it had run on this device. Raises UserError for a document that is none."""
    if f"{DOCUMENT}.json" not in checkpoint.files:
        return _formerly(device)
    try:
        kept = checkpoint.document(DOCUMENT)
        if isinstance(kept["device"], str) and kept["dtype"] in DTYPES:
            return {"device": kept["device"], "dtype": kept["dtype"]}
    except (TypeError, KeyError, ValueError):
        pass
    raise UserError(
        f"{checkpoint.path} does not say what it was computed in ({DOCUMENT}.json: expected a device, and the dtype "
        f"{' or '.join(DTYPES)}): go on with the version that wrote it, or move the checkpoint away"
    )


def trained_in(record: Mapping[str, Any], device: str) -> str:
    """The dtype of a finished training that was asked for `auto`, by its `run.json`."""
    found = record.get("computed")
    kept = found.get("dtype") if isinstance(found, Mapping) else None
    return kept if kept in DTYPES else _formerly(device)["dtype"]


def _formerly(device: str) -> dict[str, str]:
    used = pick_device(device)
    return _named(used, former_dtype(used))


def _named(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}


def continued(policy: PolicyConfig, checkpoint: Checkpoint) -> PolicyConfig:
    """How the checkpoint's run goes on: where `auto` leaves the dtype open, in the one on record, on a device of that
    kind. A GPU that has no bfloat16 computes in float32 all the same."""
    if policy.dtype != "auto":
        return policy
    here, before = computed(policy), on_record(checkpoint, policy.device)
    if here["device"] != before["device"] or here == {"device": "cuda", "dtype": "float32"}:
        return policy
    return replace(policy, dtype="bfloat16" if before["dtype"] == "bfloat16" else "float32")


def unlike_a_new_run(asked: PolicyConfig, used: PolicyConfig) -> list[str]:
    """A line where the run that goes on is computed in another dtype than a new one would be."""
    new, now = (computed(each)["dtype"] for each in (asked, used))
    return [] if new == now else [f"the run goes on in {now}, as it began, and not in {new}, as a new one would here"]
