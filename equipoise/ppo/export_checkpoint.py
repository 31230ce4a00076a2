"""A training's checkpoint as a finished model folder, as the end of the run would have left it: `equipoise export`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.policy.card import ModelCard
from equipoise.policy.export import export
from equipoise.policy.export_adapter import export_adapter
from equipoise.policy.load import pick_device, pick_dtype
from equipoise.policy.placed import EXPORTED, refuse_foreign
from equipoise.policy.prompt import stop_ids
from equipoise.policy.push import check_push, push
from equipoise.policy.saved import Saved, is_checkpoint, put_weights, read_saved
from equipoise.policy.source import TASK, checkpoint_base, load_tokenizer
from equipoise.policy.weights import load_model
from equipoise.ppo.computed import on_record
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.facts import facts
from equipoise.ppo.summary import left_out_warm_start
from equipoise.ppo.tool_config import ExportConfig
from equipoise.runs.checkpoint import open_checkpoint
from equipoise.runs.locks import locked_folder
from equipoise.runs.ownership import marked, read_run_record, refuse_checkpoints_own
from equipoise.runs.records import provenance


def export_checkpoint(config: ExportConfig, say: Callable[[str], None] = print) -> Path:
    """Write the checkpoint's model, adapters merged, with its card, task and record. Raises UserError."""
    if not is_checkpoint(config.checkpoint):
        raise UserError(
            f"{config.checkpoint} is no checkpoint of a training: name a folder such as rlhf_checkpoints/checkpoint-200"
        )
    saved, folder = read_saved(config.checkpoint), config.output_dir
    check_push(config, checkpoint_base(saved.folder))
    _check(folder, config.overwrite)
    open_checkpoint(saved.folder)
    with locked_folder(folder, f"writing to {folder}: wait for it, or choose another --output-dir"):
        _check(folder, config.overwrite)
        _export(config, saved, say)
    say(f"{folder}: the model of {saved.folder}; equipoise generate --model {folder} writes sentences with it")
    push(folder, config, say)
    return folder


def _check(folder: Path, overwrite: bool) -> None:
    """Raises UserError where anything but an earlier export lies where this one would be written."""
    refuse_checkpoints_own(folder, "--output-dir")
    record = read_run_record(folder)
    ours = record.state == "ours" and "exported_from" in record.document
    if record.state != "absent" and not ours:
        raise UserError(f"{folder} holds a run or somebody else's files (run.json): choose another --output-dir")
    refuse_foreign(folder, (*EXPORTED, "run.json"))
    if ours and not overwrite:
        raise UserError(
            f"{folder} holds the model of {record.document['exported_from']} already: choose another --output-dir, or "
            "--overwrite to replace it"
        )


def _export(config: ExportConfig, saved: Saved, say: Callable[[str], None]) -> None:
    policy, source = saved.policy, checkpoint_base(saved.folder)
    checkpoint = open_checkpoint(saved.folder)
    named = (config.dtype, policy.dtype, on_record(checkpoint, config.device)["dtype"])
    dtype = pick_dtype(next(name for name in named if name != "auto"), pick_device(config.device))
    config.check_out(policy.tuning)
    whole = config.save == "merged" and policy.tuning == "lora"
    say(f"merging {saved.folder} into {policy.model}" if whole else f"reading {saved.folder}")
    run = _config_of(saved)
    model = put_weights(load_model(source, dtype=dtype, device="cpu"), saved)
    tokenizer = load_tokenizer(source)
    prompts = checkpoint.document("prompts") if "prompts.json" in checkpoint.files else {}
    record = {
        "config": dict(saved.config),
        "exported_from": saved.folder.name,
        "prompts": prompts,
        **provenance(),
    }
    averaged = "moving average of the weights at " if saved.averaged else ""
    told = facts(run, checkpoint.step, float(checkpoint.document("state")["kl_coef"]), warmed=_warmed(saved))
    write = export_adapter if config.save == "adapter" else export
    write(
        model,
        tokenizer,
        config.output_dir,
        source=source,
        stop_ids=stop_ids(tokenizer, model.generation_config, run.task.prompt(run.prompt)),
        card=ModelCard(
            f"{told}; exported: {averaged}step {checkpoint.step}, a checkpoint on the way",
            run.prompt,
            run.task,
            run.occupations,
            system=run.system,
            sampled=run.sampling.describe(),
        ),
        extra_files={"run.json": json.dumps(marked(record), indent=1) + "\n", TASK: run.task.to_yaml()},
    )


def _config_of(saved: Saved) -> TrainConfig:
    """The run's configuration as this version knows it: what it lacks has its default. Raises UserError."""
    plain = TrainConfig(task=saved.task)
    changes: dict[str, Any] = {"task": saved.task}
    try:
        for field in dataclasses.fields(plain):
            if field.name == "task" or field.name not in saved.config:
                continue
            value, default = saved.config[field.name], getattr(plain, field.name)
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                known = {each.name for each in dataclasses.fields(default)}
                value = dataclasses.replace(default, **{n: v for n, v in value.items() if n in known})
            changes[field.name] = value
        return dataclasses.replace(plain, **changes)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{saved.folder}/config.json is not as this version writes it ({error})") from None


def _warmed(saved: Saved) -> bool:
    """Whether a warm start that was wanted was made, so far as the run's folder, where it still is, tells."""
    run = saved.config.get("run")
    output = run.get("output_dir") if isinstance(run, Mapping) else None
    return not (isinstance(output, str) and left_out_warm_start(Path(output)))
