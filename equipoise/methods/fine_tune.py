"""The steps of supervised fine-tuning that need the model: `sft` puts them together."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.learning.search import BATCH, Search
from equipoise.learning.supervised import Example, Examples, Loss, Sentences, examples_of, read_rows
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.estimates import first_look
from equipoise.methods.own_sentences import LABELS, Found, as_completions, own_sentences
from equipoise.methods.prompted import model_name, uniforms
from equipoise.methods.sft_config import SENTENCES, GivenSentences, OwnSentences, SftConfig
from equipoise.policy.card import ModelCard
from equipoise.policy.config import SamplingConfig
from equipoise.policy.export import export, rehearse
from equipoise.policy.export_adapter import export_adapter
from equipoise.policy.load import Policy
from equipoise.policy.prompt import sentences_of
from equipoise.policy.sample import sample
from equipoise.policy.source import TASK
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import Task
from equipoise.runs.ownership import marked
from equipoise.runs.ranks import Ranks
from equipoise.runs.records import provenance, task_on_record

CHECKED = 200  # sentences of the trained model that are written at a time for a first look


class Data(NamedTuple):
    """What there is to learn from."""

    examples: Examples
    found: Found | None
    """The sentences that the model wrote itself, if it did."""


def check_file(source: GivenSentences, task: Task) -> None:
    """Raises UserError for a file that cannot be read, or whose record says that it is of another task."""
    path = source.path
    _read(source, task)
    record = path.with_name(path.name + ".json")
    try:
        settings = read_json(record)["settings"]
        other = task_on_record(settings, str(record)) if isinstance(settings, dict) else task
    except (OSError, ValueError, KeyError, TypeError):
        return  # no record, or none of ours: the rows themselves will tell
    if changed := other.differences(task):
        raise UserError(
            f"{path} was made for another task ({'; '.join(changed)}): learn from sentences of this one, or give "
            "theirs with --task"
        )


def _read(source: GivenSentences, task: Task) -> Sentences:
    return read_rows(source.path, task, source.columns, source.form, source.encoding)


def collect_rows(
    source: OwnSentences | GivenSentences,
    config: SftConfig,
    task: Task,
    policy: Policy,
    prompts: dict[str, list[int]],
    say: Callable[[str], None],
    ranks: Ranks,
) -> Data:
    """The sentences that pass the filter: a file's, which rank 0 reads, or the model's own. Raises UserError and
    NonFiniteError, on all ranks."""
    found: Found | None = None
    if isinstance(source, OwnSentences):
        if not task.can_force:
            say(f"the task {task.name} has no openings to begin sentences with: learning from the model's free samples")
        wanted = Search(task.can_force, source.sentences, source.candidates, budget=source.budget)
        found = own_sentences(policy, task, prompts, wanted, config.seed, say, ranks)
        rows = found.rows
    else:
        rows, notices = ranks.first_does(lambda: _read(source, task))
        for line in notices:
            say(line)
    examples = examples_of(rows, policy.tokenizer, task, prompts, policy.stop_ids, config.filter)
    say(f"{config.data}: {examples.describe()}")
    return Data(examples, found)


class Split(NamedTuple):
    learnt: list[Example]
    held_out: list[Example]


def split_held_out(examples: Sequence[Example], at_most: int | None, share: float, generator: torch.Generator) -> Split:
    """At most so many of the examples, in random order, a share of which is only scored.

    Which, is decided by a hash of the text, so that a sentence that occurs twice is not on both sides."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    split = Split([], [])
    for i in order[:at_most]:
        held = int.from_bytes(hashlib.sha256(examples[i].text.encode()).digest()[:8]) < share * 2.0**64
        (split.held_out if held else split.learnt).append(examples[i])
    return split


def check_enough(split: Split, data: Data, name: str, event: Event) -> None:
    """Raises UserError where there is too little to learn from. `event`: what the sentences were filtered by."""
    if len(split.learnt) < BATCH:
        remedies = ["give a file with more"]
        if event == "strict" and data.examples.failing:
            remedies.append("--filter both")
        held = len(split.held_out)
        if held and len(split.learnt) + held >= BATCH:
            remedies.append("--held-out 0")
        aside = f" beside the {held:,} held out to be scored" if held else ""
        raise UserError(
            f"{name} has {plural(len(split.learnt), 'sentence')} to learn from{aside} ({data.examples.describe()}), "
            f"and at least {BATCH} are needed: {' or '.join(remedies)}"
        )


def record_of(
    settings: dict[str, Any],
    data: Data,
    split: Split,
    losses: Sequence[Loss],
    seconds: float,
    pieces: int,
    computed: Mapping[str, str],
) -> dict[str, Any]:
    """The content of run.json. `computed`: see `ppo.computed`."""
    training = {
        "seconds": round(seconds, 3),
        "rows": data.examples.rows,
        "failing": data.examples.failing,
        "foreign": data.examples.foreign,
        "learnt": len(split.learnt),
        "held_out": len(split.held_out),
        "pieces": pieces,
        "nats_per_token": [loss._asdict() for loss in losses],
    }
    if data.found is not None:
        training |= {"drawn": data.found.drawn, "collecting_seconds": round(data.found.seconds, 3)}
        if not data.found.forced:
            training["forced"] = False
    return marked({"config": settings, "training": training, "computed": dict(computed), **provenance()})


def export_trained(
    policy: Policy, config: SftConfig, task: Task, prompt: str, record: dict[str, Any], found: Found | None
) -> None:
    """Leave the model in its folder, with its record, its task and the sentences that it wrote itself."""
    assert policy.source is not None
    files = {"run.json": json.dumps(record, indent=1) + "\n", TASK: task.to_yaml()}
    if found is not None:
        files[SENTENCES] = as_completions(found.rows, model_name(policy.source), LABELS[found.forced])
    learnt = plural(record["training"]["learnt"], "compliant sentence")
    method = f"supervised fine-tuning on {learnt}, {plural(config.epochs, 'epoch')}"
    write = export_adapter if config.save == "adapter" else export
    _export(write, policy, config, task, method, prompt, files)


def rehearse_export(policy: Policy, config: SftConfig, task: Task, prompt: str) -> None:
    """Find out before training whether the model can be exported. Raises UserError."""
    write = partial(rehearse, save=config.save)
    _export(write, policy, config, task, "rehearsed", prompt, {TASK: task.to_yaml()})


def _export(
    write: Callable[..., None],
    policy: Policy,
    config: SftConfig,
    task: Task,
    method: str,
    prompt: str,
    files: Mapping[str, str],
) -> None:
    write(
        policy.model,
        policy.tokenizer,
        Path(config.output_dir),
        source=policy.source,
        stop_ids=policy.stop_ids,
        card=ModelCard(method=method, prompt=prompt, task=task, system=config.system),
        extra_files=files,
    )


def look(policy: Policy, task: Task, prompts: dict[str, list[int]], runs: int, seed: int, ranks: Ranks) -> str:
    """What `runs` sentences of each occupation come to, written by the trained model."""
    sampling = SamplingConfig(top_p=0.95)
    keys = all_keys(runs, task.names)

    def written(part: Sequence[Key]) -> list[str]:
        uniform_BT = uniforms(f"{seed}/check", part, sampling.max_new_tokens)
        rollout = sample(policy, [prompts[key.occupation] for key in part], sampling, uniform_BT=uniform_BT).cpu()
        return sentences_of(policy.tokenizer, rollout, [key.occupation for key in part], task)

    parts = [keys[first : first + CHECKED] for first in range(0, len(keys), CHECKED)]
    return first_look([text for part in ranks.deal(parts, written) for text in part], task)
