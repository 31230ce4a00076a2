"""Warm start: a short supervised stage on sentences the model wrote itself under the constraint, before PPO.

Where compliance is rare PPO has next to nothing to learn from in its first steps. These sentences show the policy what
is paid for without leaving the model's own language: samples that happen to comply, or continuations of forced terms.
They may also come from a file, such as the sentences of another method.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from equipoise.errors import UserError
from equipoise.learning.collect import CPU_ROWS, Progress, TooFewError, collect, said
from equipoise.learning.search import BATCH
from equipoise.learning.supervised import Example, Supervision, examples_of, read_rows, supervise
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.training import Training, new_optimizer
from equipoise.protocol.plural import plural
from equipoise.runs.stage import Stage, unseen


def check_file(config: TrainConfig) -> None:
    """Raises UserError where the file of `warm_start_file` cannot be read as one of sentences."""
    if config.warm_start.warm_start_file:
        read_rows(Path(config.warm_start.warm_start_file), config.task)


def found_in(
    path: Path, training: Training, prompts: dict[str, list[int]], say: Callable[[str], None] = lambda line: None
) -> list[Example]:
    """Strictly successful sentences of a file in any layout, each as often as it may come. `say` gets what is odd in
    the file.

    Raises UserError for a file that is none, and for fewer than `BATCH` sentences.
    """
    policy, task = training.policy, training.config.task
    rows, notices = training.ranks.first_does(lambda: read_rows(path, task))
    for line in notices:
        say(line)
    found = examples_of(rows, policy.tokenizer, task, prompts, policy.stop_ids, "strict")
    config, times = training.config.warm_start, Counter[str]()
    examples = []
    for example in found.examples:
        times[example.text] += 1
        if times[example.text] <= config.warm_start_copies:
            examples.append(example)
    if len(times) < BATCH:
        remedy = "give another --warm-start-file"
        if config.target != "off":
            remedy = "raise --warm-start-target-samples and --warm-start-pool, so that the target has more"
        raise UserError(
            f"the warm start can learn from {plural(len(times), 'sentence')} of {path} and needs at least {BATCH} "
            f"({found.describe()}): {remedy}"
        )
    return examples


def read(
    path: Path, training: Training, prompts: dict[str, list[int]], say: Callable[[str], None] = lambda line: None
) -> list[Example]:
    """Those of `found_in`, at most as many as are wanted, in random order. Raises UserError as that does."""
    examples = found_in(path, training, prompts, say)
    wanted = training.config.warm_start.warm_start_sentences
    chosen = torch.randperm(len(examples), generator=training.state.generator)[:wanted]
    return [examples[i] for i in chosen.tolist()]


def warm_start(
    training: Training,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
    skipped: Callable[[int, int], None] = lambda found, drawn: None,
    stage: Callable[[str], AbstractContextManager[Stage]] = unseen,
) -> None:
    """The whole stage: find the sentences, learn from them, as often as asked; then a fresh optimizer.

    `check` is called now and then, and may raise to end it; `stage` shows how far each part is. With
    `samples-if-found` the stage ends where the first round finds too few sentences, and `skipped` gets how many it
    found in how many samples.
    Raises UserError; NonFiniteError.
    """
    config, policy, generator = training.config.warm_start, training.policy, training.state.generator
    task, ranks = training.config.task, training.ranks
    prompts, sampling, batch_size = training.trained_prompts, training.config.sampling, training.config.ppo.batch_size
    how = Supervision(
        config.warm_start_epochs, config.warm_start_learning_rate, config.warm_start_batch_size, warmup=0.1, decay=True
    )
    if config.warm_start == "samples-if-found":  # `samples` keeps the PPO batch, so that its runs are repeatable
        batch_size = max(batch_size, CPU_ROWS)
    for number in range(config.warm_start_rounds):
        rounds = f" {number + 1} of {config.warm_start_rounds}" if config.warm_start_rounds > 1 else ""
        label = f"warm start{rounds}"
        if config.given and number == 0:
            if not config.warm_start_file:
                raise UserError(
                    f"the sentences of --warm-start-target {config.warm_start_target} have not been written: start the "
                    "run with equipoise train, or pass equipoise.methods.target.prepared(config)"
                )
            examples = read(Path(config.warm_start_file), training, prompts, partial(_labelled, say, label))
        else:
            wanted = config.search if number == 0 else replace(config.search, forced=False)
            try:
                with stage(f"{label}: finding sentences") as shown:
                    shown(0, wanted.sentences * wanted.candidates)
                    told = both(said(say, f"{label}: ", check), shown)
                    examples = collect(policy, wanted, task, prompts, sampling, generator, batch_size, told, ranks)
            except TooFewError as error:
                if number > 0:
                    raise TooFewError(error.found, error.drawn, wanted, number) from None
                if config.warm_start != "samples-if-found":
                    raise
                skipped(error.found, error.drawn)
                break
        say(f"{label}: learning from {plural(len(examples), 'sentence')}, such as {examples[0].text!r}")
        packed, line = training.config.scoring == "packed", partial(_labelled, say, label)
        with stage(f"{label}: learning") as shown:
            training.optimizer.release()
            counted = count_calls(check, shown, how.epochs * -(-len(examples) // how.batch_size))
            supervise(policy, examples, generator, how, packed=packed, say=line, check=counted, ranks=ranks)
        policy.forget_recordings()
    training.optimizer = new_optimizer(training.config, policy, ranks)


def both(first: Progress, stage: Stage) -> Progress:
    """`first`, and `stage` with how many are found of those wanted."""

    def progress(found: int, wanted: int, drawn: int) -> None:
        first(found, wanted, drawn)
        stage(found, wanted)

    return progress


def count_calls(check: Callable[[], None], stage: Stage, total: int) -> Callable[[], None]:
    """`check`, and `stage` with how often it was called."""
    calls = itertools.count(1)

    def counted() -> None:
        check()
        stage(next(calls), total)

    return counted


def _labelled(say: Callable[[str], None], label: str, line: str) -> None:
    say(f"{label}: {line}")
