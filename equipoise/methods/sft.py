"""Supervised fine-tuning on compliant sentences of any method, or on the model's own forced ones: `equipoise sft`.

The model is left in a folder as training with PPO leaves its own: merged, with the prompt it belongs to in `run.json`.
A run takes minutes and is done again from the start if it was stopped; the same data and seed give the same model.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.methods.estimates import beside_the_study
from equipoise.methods.sample import FORCED, FORCED_SENTENCES, SUPERVISED
from equipoise.policy.config import PolicyConfig
from equipoise.protocol.prompts import get_prompt
from equipoise.protocol.reward import Event
from equipoise.protocol.task import PROTOCOL

DRAWS_PER_SENTENCE = 40
"""The default budget. The bundled model draws 7 for each sentence that it finds."""
SENTENCES = "sentences.csv"


@dataclass(frozen=True)
class SftConfig:
    """Which sentences are learnt, by what model, and how."""

    data: str = ""
    """A completions file of any method; rows that fail the filter are left out and counted. Or `forced`: sentences that
    the model itself writes after a term of each class, every pair alike; they are kept in sentences.csv beside the
    trained model. Required."""
    output_dir: str = SUPERVISED
    """Where the trained model goes."""
    prompt: str = "describe"
    """The prompt that the sentences are learnt as answers to: `study`, `describe`, `raw`, or NAME=INSTRUCTION."""
    system: str = ""
    filter: Event = "strict"
    """Learn sentences with terms of `both` classes, or `strict` ones, which also have 8 to 15 words and are one
    complete sentence."""
    sentences: int | None = None
    """Learn at most so many, drawn from the file at random. Default: all of a file; 750 of `forced`, as many as the
    public study's supervised fine-tuning learnt from."""
    candidates: int = 1
    """With `forced`: find so many sentences for each that is learnt, and learn those that the model itself finds the
    likeliest, of each pair of terms alike."""
    budget: int | None = None
    """With `forced`: samples drawn at most in search of them. Default: 40 for each that is to be found."""
    epochs: int = 5
    """Held-out sentences are likeliest after the second. Compliance goes on rising: of 200 sentences of the bundled
    model, trained on 200 forced ones, 62 % after three; of 400, trained on 750, all after five."""
    learning_rate: float | None = None
    """Highest of the run. Default: 5e-4 for adapters, 2e-5 for all weights."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls to 0."""
    held_out: float = 0.1
    """Share of the sentences that is only scored, after each epoch."""
    seed: int = 0
    check: int = 10
    """Sentences per occupation that the trained model writes at the end, for a first look; 0 for none."""
    overwrite: bool = False
    """Train anew, giving up the model in the folder."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        get_prompt(self.prompt)
        for name, low in (("sentences", 1), ("epochs", 1), ("check", 0), ("candidates", 1), ("budget", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name} {value} must be at least {low}")
        if not 0 < self.rate < math.inf:
            raise UserError(f"--learning-rate {self.rate} must be above 0; 5e-4 is usual for adapters")
        if not (0 <= self.warmup < 1 and 0 <= self.held_out < 1):
            raise UserError(f"--warmup {self.warmup} and --held-out {self.held_out} are shares: 0 or more, below 1")

    @property
    def is_forced(self) -> bool:
        return self.data == FORCED

    @property
    def wanted(self) -> int:
        """Sentences to collect."""
        return self.sentences or FORCED_SENTENCES

    @property
    def draws(self) -> int:
        return self.budget or DRAWS_PER_SENTENCE * self.wanted * self.candidates

    @property
    def rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-4 if self.policy.tuning == "lora" else 2e-5


def sft(config: SftConfig, say: Callable[[str], None] = print) -> Path:
    """Train, unless the same training has left its model there, and return the folder. Raises UserError, with the
    folder as it was, and NonFiniteError."""
    if not config.data:
        raise UserError(
            "nothing says what to learn from: name a completions file with --data FILE, or let the model write the "
            "sentences with --data forced"
        )
    # Only here: `--help` and a mistyped option need not wait for torch.
    import torch

    from equipoise.learning.search import BATCH
    from equipoise.learning.supervised import Supervision, examples_of, read_rows, supervise
    from equipoise.methods.forced import Forced, as_completions, forced_sentences
    from equipoise.methods.prompted import model_name
    from equipoise.policy.card import ModelCard
    from equipoise.policy.export import WEIGHTS, export
    from equipoise.policy.load import load_policy
    from equipoise.policy.prompt import prompt_ids
    from equipoise.protocol.lexicon import OCCUPATIONS
    from equipoise.runs.records import provenance

    rows = [] if config.is_forced else read_rows(Path(config.data))
    settings = _settings(config)
    folder = Path(config.output_dir)
    if _is_there(folder, settings, config.overwrite):
        say(f"{folder} holds this very model already; --overwrite trains it anew")
        return folder

    torch.manual_seed(config.seed)  # adapters start at random
    prompt = get_prompt(config.prompt)
    policy = load_policy(config.policy, prompt)
    prompts = {o: prompt_ids(policy.tokenizer, prompt, o, PROTOCOL, config.system) for o in OCCUPATIONS}
    forced: Forced | None = None
    if config.is_forced:
        forced = forced_sentences(
            policy, prompts, sentences=config.wanted, candidates=config.candidates, budget=config.draws,
            seed=config.seed, say=say,
        )  # fmt: skip
        rows = forced.rows
    found = examples_of(rows, policy.tokenizer, PROTOCOL, prompts, policy.stop_ids, config.filter)
    say(f"{config.data}: {found.describe()}")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(found.examples), generator=generator).tolist()
    chosen = [found.examples[i] for i in order[: config.sentences]]
    held = [example for example in chosen if _is_held_out(example.text, config.held_out)]
    learnt = [example for example in chosen if not _is_held_out(example.text, config.held_out)]
    if len(learnt) < BATCH:
        raise UserError(
            f"{config.data} has {len(learnt)} sentences to learn from ({found.describe()}), and at least {BATCH} are "
            "needed: give a file with more, or --filter both"
        )
    say(
        f"learning {len(learnt):,} sentences with {len(held):,} held out, {config.epochs} epochs, learning rate "
        f"{config.rate:g}, {config.policy.tuning}"
    )
    began = time.perf_counter()
    losses = supervise(
        policy, learnt, generator, Supervision(config.epochs, config.rate, warmup=config.warmup, decay=True),
        packed=True, say=say, held_out=held,
    )  # fmt: skip
    policy.forget_recordings()
    assert policy.source is not None
    record = {
        "config": settings,
        "training": {
            "seconds": round(time.perf_counter() - began, 3),
            "rows": found.rows,
            "failing": found.failing,
            "foreign": found.foreign,
            "learnt": len(learnt),
            "held_out": len(held),
            "nats_per_token": [loss._asdict() for loss in losses],
            **({"drawn": forced.drawn, "collecting_seconds": round(forced.seconds, 3)} if forced else {}),
        },
        **provenance(),
    }
    export(
        policy.model,
        policy.tokenizer,
        folder,
        source=policy.source,
        stop_ids=policy.stop_ids,
        card=ModelCard(
            method=f"supervised fine-tuning on {len(learnt)} compliant sentences, {config.epochs} epochs",
            prompt=config.prompt,
        ),
        extra_files={
            "run.json": json.dumps(record, indent=1) + "\n",
            **({SENTENCES: as_completions(rows, model_name(policy.source))} if forced else {}),
        },
    )
    assert (folder / WEIGHTS).exists()
    say(f"the model is in {folder}: equipoise sample --method sft --model {folder} writes sentences with it")
    if config.check:
        for line in _check(policy, prompts, config).splitlines():
            say(line)
    return folder


def _settings(config: SftConfig) -> dict[str, Any]:
    """What decides the model, with `method` and a file's contents in place of its path."""
    document = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    for name in ("data", "output_dir", "overwrite", "check", "candidates", "budget"):
        del document[name]
    document |= {"method": "sft", "learning_rate": config.rate}
    if config.is_forced:
        how = {"sentences": config.wanted, "candidates": config.candidates, "budget": config.draws}
        return {"data": FORCED, **document, **how}
    with Path(config.data).open("rb") as file:
        return {"data_sha256": hashlib.file_digest(file, "sha256").hexdigest(), **document}


def _is_there(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether this very training is done. Raises UserError for a folder that holds anything else."""
    from equipoise.policy.export import WEIGHTS
    from equipoise.runs.records import differences

    record = folder / "run.json"
    recorded = None
    if record.exists():
        try:
            recorded = json.loads(record.read_bytes())["config"]
            ours = recorded.get("method") == "sft"
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"{folder} holds a model that equipoise sft did not make: choose another --output-dir")
    elif folder.exists() and any(path.suffix in {".safetensors", ".json", ".bin"} for path in folder.iterdir()):
        raise UserError(f"{folder} holds files that equipoise did not write: choose another --output-dir")
    if overwrite or recorded is None or not (folder / WEIGHTS).exists():
        return False
    if changed := differences(recorded, settings):
        raise UserError(
            f"{folder} holds a model trained with other settings ({'; '.join(changed)}): choose another --output-dir, "
            "or --overwrite to train anew in its place"
        )
    return True


def _is_held_out(text: str, share: float) -> bool:
    """By a hash of the text, so that a sentence that occurs twice is not on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2.0**64


def _check(policy: Any, prompts: dict[str, list[int]], config: SftConfig) -> str:
    """What a small sample of the trained model holds."""
    from equipoise.methods.completions import all_keys
    from equipoise.methods.prompted import uniforms
    from equipoise.policy.config import SamplingConfig
    from equipoise.policy.prompt import sentences_of
    from equipoise.policy.sample import sample

    sampling = SamplingConfig(top_p=0.95)
    keys = all_keys(config.check)
    texts: list[str] = []
    for first in range(0, len(keys), 200):
        part = keys[first : first + 200]
        uniform_BT = uniforms(f"{config.seed}/check", part, sampling.max_new_tokens)
        rollout = sample(policy, [prompts[key.occupation] for key in part], sampling, uniform_BT=uniform_BT).cpu()
        texts += sentences_of(policy.tokenizer, rollout, [key.occupation for key in part], PROTOCOL)
    return beside_the_study(texts)
