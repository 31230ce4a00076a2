"""`equipoise sweep`: seeds × settings, each a training run in its own folder, and one table of what came of them.

base: {preset: bundled-gpu, steps: 300}
settings:
  plain: {}
  diverse: {diversity-weight: 0.3}
seeds: [0, 1, 2]
evaluate: {n: 250, temperature: 1.0, top_p: 0.95}
"""

import gc
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from equipoise import options
from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.policy.placed import MODELS
from equipoise.ppo import sweep_jobs
from equipoise.ppo.base import BaseRates
from equipoise.ppo.claim import FREE_TO_CHANGE, as_now
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.machine import inspect_machine
from equipoise.ppo.preflight import choose
from equipoise.ppo.presets import for_model, preset
from equipoise.ppo.summary import SUMMARY
from equipoise.ppo.sweep_files import (
    Given,
    check_run,
    check_tables,
    delete_checkpoints,
    read_result,
    write_given,
    write_result,
    write_tables,
)
from equipoise.ppo.sweep_table import as_files, table, values_of
from equipoise.ppo.tool_config import SweepConfig
from equipoise.ppo.train import train
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, Task, read_task
from equipoise.runs.command import TOLD, typed
from equipoise.runs.locks import locked_folder
from equipoise.runs.records import differences
from equipoise.runs.signals import StopSignals


class Plan(NamedTuple):
    """One run of the sweep."""

    setting: str
    seed: int
    folder: Path
    preset: str
    options: dict[str, Any]
    """As a file for `--config` holds them."""
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.seed}"


Prepare = Callable[[TrainConfig], TrainConfig]
"""Writes the sentences that a run begins with, where it has a target of its own; its configuration with them."""


def sweep(config: SweepConfig, prepare: Prepare) -> int:
    """Run what is missing, print and write the table. Returns the exit code of `equipoise sweep`."""
    plans, where = read_plans(config), Path(config.output_dir)
    if config.only is not None:
        return _run_only(config.only, plans, config, prepare)
    check_tables(where)
    for plan in plans:
        check_run(plan.folder, given(plan) if _in_processes(config) else None)
        is_finished(plan)
    if config.commands:
        sweep_jobs.print_commands([p.name for p in plans if not is_finished(p)], config)
        return 0
    with locked_folder(where, f"running the sweep in {where}: wait for it, or choose another --output-dir"):
        return _run(plans, config, prepare)


def _in_processes(config: SweepConfig) -> bool:
    return config.executor != "here" or config.jobs not in (None, 1)


def _run(plans: Sequence[Plan], config: SweepConfig, prepare: Prepare) -> int:
    waiting = [p for p in plans if not is_finished(p)]
    print(
        f"{plural(len(plans), 'run')} in {config.output_dir}, {len(plans) - len(waiting)} of them finished", flush=True
    )
    if config.executor != "here":
        for plan in waiting:
            write_given(plan.folder, given(plan))  # by which the log beside it is known as a sweep's
        code = sweep_jobs.run_jobs({p.name: p.folder for p in waiting}, config)
    else:
        code = _run_beside(waiting, config) if _in_processes(config) else _run_here(waiting, config, prepare)
    results = [r for p in plans if (r := read_result(p.folder))]
    write_tables(Path(config.output_dir), *as_files(results))
    print(table(results, [plan.config.task for plan in plans]))
    return code


def read_plans(config: SweepConfig) -> list[Plan]:
    """Every run that the file asks for, all seeds of a setting before the next. Raises UserError."""
    document = options.read_file(config.file)
    if unknown := set(document) - {"base", "settings", "seeds", "evaluate"}:
        raise UserError(f"{config.file}: there is no {sorted(unknown)[0]!r}; write base, settings, seeds and evaluate")
    base = _settings(document.get("base"), "base", config.file)
    settings = _mapping(document.get("settings"), "settings", config.file) or {"base": {}}
    evaluation = _mapping(document.get("evaluate"), "evaluate", config.file)
    if unknown := set(evaluation) - {"n", "temperature", "top_p"}:
        raise UserError(f"{config.file}: evaluate has no {sorted(unknown)[0]!r}; write n, temperature and top_p")
    seeds = document.get("seeds", [0])
    if not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise UserError(f"{config.file}: seeds is {seeds!r}; write a list of whole numbers, such as [0, 1, 2]")
    task = _task(base, config)
    chosen = str(base.pop("preset", "")) or ("" if config.elsewhere else choose(inspect_machine()).config.preset)
    plans = []
    for name, own in settings.items():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"{config.file}: the setting {name!r} names a folder: use letters, digits, - _ . and +")
        where = f"{config.file}, {name}"
        own = _settings(own, name, config.file)
        mine, of_task = str(own.pop("preset", chosen)), _task(own, replace(config, task=task))
        if not mine:
            raise UserError(
                f"{where}: name a preset, under base for instance: which one is chosen depends on the machine, and the "
                "runs may be started on others than this"
            )
        measured = {
            "final_sentences": _count(evaluation.get("n", 250), config.file) * len(of_task.names),
            "eval_temperature": evaluation.get("temperature", 1.0),
            "eval_top_p": evaluation.get("top_p", 0.95),
        }
        for seed in dict.fromkeys(seeds):
            folder = Path(config.output_dir) / f"{name}-{seed}"
            folders = {
                "output_dir": str(folder),
                "checkpoint_dir": str(folder / "checkpoints"),
                "tensorboard_dir": str(Path(config.output_dir) / "runs"),
            }
            merged = {**base, **own, **measured, "seed": seed, **folders}
            made, _ = for_model(options.apply(preset(mine, of_task), merged, where), merged)
            plans.append(Plan(name, seed, folder, mine, merged, made))
    return plans


_EACH_RUNS_OWN = {
    "seed": "write it under seeds",
    **dict.fromkeys(("output_dir", "checkpoint_dir", "tensorboard_dir"), "each run has its own in --output-dir"),
    "final_sentences": "write n under evaluate",
    "eval_temperature": "write temperature under evaluate",
    "eval_top_p": "write top_p under evaluate",
    "push_to_hub": "every run would take the last one's place; put the best on the Hub with equipoise export",
}
"""What the sweep itself decides for every run, and where the file says it."""


def _settings(value: Any, name: str, file: Path) -> dict[str, Any]:
    """The options under `base` or a setting, without groups. Raises UserError for one that would have no effect."""
    given, where = _mapping(value, name, file), f"{file}, {name}"
    beside = {key: given.pop(key) for key in ("preset", "task") if key in given}
    found = options.flat(TrainConfig(), given, where)
    if overridden := [key for key in found if key in _EACH_RUNS_OWN]:
        raise UserError(f"{where}: {overridden[0]} has no effect here: {_EACH_RUNS_OWN[overridden[0]]}")
    return beside | found


def _task(settings: dict[str, Any], config: SweepConfig) -> Task:
    """The task that settings name, taken out of them, else that of the sweep. Raises UserError where both are given."""
    named = settings.pop("task", None)
    if named is None:
        return config.task
    task = read_task(str(named))
    if config.task not in (PROTOCOL, task):
        raise UserError(f"{config.file} names the task {task.name}, and another is given for the sweep: leave one out")
    return task


def _count(value: Any, file: Path) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{file}: n under evaluate is {value!r:.60}; write a whole number of sentences per occupation")
    return value


def _mapping(value: Any, name: str, file: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{file}: {name} is {value!r}; write `name: value` pairs")
    if name == "settings":
        return {str(k): v for k, v in value.items()}
    return options.underscored(value, f"{file}, {name}")


def is_finished(plan: Plan) -> bool:
    """Whether the run's result is there. Raises UserError where it is that of other options."""
    result = read_result(plan.folder)
    if result is None:
        return False
    wanted = plan.config.document()
    if changed := differences(as_now(result["config"]), wanted, FREE_TO_CHANGE):
        raise UserError(
            f"{plan.folder} holds a finished run with other settings ({'; '.join(changed)}): give the setting another "
            "name, choose another --output-dir, or delete that folder"
        )
    return bool(result["steps"] == plan.config.steps)


# Running


def _run_only(name: str, plans: Sequence[Plan], config: SweepConfig, prepare: Prepare) -> int:
    """The run of that name, unless it is finished. The tables are left to the command without `only`: other runs may be
    at work beside this one."""
    plan = next((p for p in plans if p.name == name), None)
    if plan is None:
        names = ", ".join(p.name for p in plans[:8]) + (", …" if len(plans) > 8 else "")
        raise UserError(f"{config.file} has no run {name!r:.80}: choose one of {names}")
    if is_finished(plan):
        print(f"{name} is finished")
        return 0
    return _run_here([plan], config, prepare)


def _run_here(plans: Sequence[Plan], config: SweepConfig, prepare: Prepare) -> int:
    """One after another in this process, which has torch and the kernels loaded."""
    failed = 0
    begun = [prepare(plan.config) for plan in plans]  # which a signal ends at once; what is written is kept
    known: dict[str, BaseRates | None] = {}
    with StopSignals() as stop:
        for number, (plan, configured) in enumerate(zip(plans, begun, strict=True)):
            print(f"run {number + 1} of {len(plans)}: {plan.name}", flush=True)
            started = time.monotonic()
            outcome = train(configured, base=known.get(_base_key(plan.config)))
            if outcome.status == "done":
                base = close(plan, config.keep, time.monotonic() - started)["summary"]["base"]
                known[_base_key(plan.config)] = BaseRates(**base) if base else None
            if stop.received is not None:  # also where the run, about to finish, finished all the same
                print("the same command continues", flush=True)
                return stop.exit_code
            failed = failed or outcome.exit_code
            # What a loaded model consists of was taken out of the collector's rounds; without this it would stay.
            gc.unfreeze()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return failed


def _base_key(config: TrainConfig) -> str:
    """What the untrained model's rates depend on: runs that share it need measure them only once."""
    return repr(
        (
            config.task.fingerprint(),
            config.policy,
            config.prompt,
            config.system,
            config.sampling,
            config.holdout,
            config.evaluation,
        )
    )


def _run_beside(plans: Sequence[Plan], config: SweepConfig) -> int:
    """`jobs` processes at a time; what they print goes to log.txt in the run's folder."""
    gpus = _visible_gpus()
    waiting, free = list(plans), list(range(config.jobs or 1))
    running: dict[int, tuple[Plan, subprocess.Popen[bytes], float]] = {}
    failed, told = 0, False
    with StopSignals() as stop:
        while running or (waiting and stop.received is None):
            while waiting and free and stop.received is None:
                plan, slot = waiting.pop(0), free.pop(0)
                running[slot] = (plan, _start(plan, gpus[slot % len(gpus)] if gpus else None), time.monotonic())
                print(f"started {plan.name}; {len(waiting)} wait", flush=True)
            time.sleep(0.2)
            if stop.received is not None and not told:
                told = True
                for _, process, _ in running.values():
                    process.terminate()  # each finishes its step and saves; a second signal changes nothing
            for slot, (plan, process, started) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[slot]
                assert process.stdin is not None
                process.stdin.close()
                free.append(slot)
                if code == 0:
                    close(plan, config.keep, time.monotonic() - started)
                failed = failed or code
                print(f"{plan.name} {'is finished' if code == 0 else f'ended with code {code}'}", flush=True)
        if stop.received is not None:
            print("the same command continues", flush=True)
            return stop.exit_code
    return failed


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def given(plan: Plan) -> Given:
    """What the run reads where it is a process of its own."""
    return Given(yaml.safe_dump(plan.options), plan.config.task.to_yaml())


def _start(plan: Plan, gpu: str | None) -> "subprocess.Popen[bytes]":
    settings, task = write_given(plan.folder, given(plan))
    environment = {**os.environ, TOLD: typed()} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    arguments = ["train", "--preset", plan.preset, "--config", str(settings), "--task", str(task)]
    return sweep_jobs.start(arguments, plan.folder, environment)


def close(plan: Plan, keep: str, seconds: float) -> dict[str, Any]:
    """Write the result of a run that is done and return it, then delete what is not to be kept."""
    summary = read_json(plan.folder / SUMMARY)
    result = {
        "setting": plan.setting,
        "seed": plan.seed,
        "steps": plan.config.steps,
        "values": values_of(summary) | {"wall_seconds": seconds},
        "summary": summary,
        "config": plan.config.document(),
    }
    write_result(plan.folder, result)
    if keep != "all":
        delete_checkpoints(plan.folder / "checkpoints")
    if keep == "nothing":
        for name in MODELS:
            (plan.folder / name).unlink(missing_ok=True)
    return result


# The table
