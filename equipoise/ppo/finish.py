"""The end of a run: which weights, what they write, the exported model, the closing summary."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.measures.decomposition import outcomes_document
from equipoise.policy.sample import NonFiniteLogits
from equipoise.ppo.choice import Evaluation, because, better, words
from equipoise.ppo.closing import show
from equipoise.ppo.evaluate import evaluate, fluency, groups, read_pair_rates, spent, strict_outcomes
from equipoise.ppo.facts import facts
from equipoise.ppo.shared import SharedRun
from equipoise.ppo.summary import FINAL, SUMMARY, alerts, left_out_warm_start, read_rows, training_summary
from equipoise.ppo.training import Training
from equipoise.ppo.untrained import sentence_lines
from equipoise.protocol.plural import plural
from equipoise.runs.files import write_file, write_json
from equipoise.runs.stage import Stage


def finish(training: Training, run: SharedRun) -> None:
    """Measure, export and summarise."""
    config, state = training.config, training.state
    output = Path(config.run.output_dir)
    step, why, evaluation = select_export(training, run)
    with training.optimizer.averaged():
        closing = _final(training, run)

        def write() -> dict[str, Any]:
            summary: dict[str, Any] = {
                "steps": state.step,
                "seed": config.seed,
                "algorithm": config.ppo.method.title,
                "exported_step": step,
                "exported_because": why,
                **training_summary(read_rows(output), step),
                "evaluation": evaluation,
                "base": state.base.document() if state.base else None,
                "alerts": alerts(output),
                "alert_rollbacks": state.remedies.rollbacks,
                "skipped": state.skipped,
                **training.functions.document(),
                **closing,
            }
            # The weights come last: a folder that has them is complete.
            write_json(output / SUMMARY, summary)
            return summary

        summary = training.ranks.first_does(write)
        averaged = "moving average of the weights at " if config.ppo.average_weights else ""
        warmed = training.ranks.first_does(lambda: not left_out_warm_start(output))
        how = facts(config, state.step, state.kl_coef, warmed=warmed)
        with run.log.stage("writing the model"):
            run.export(training.policy, f"{how}; exported: {averaged}step {step}, {why}")
    run.log.finished()
    run.log.screen(lambda console: show(console, config.task, summary, config.run))


def _final(training: Training, run: SharedRun) -> dict[str, Any]:
    """The exported model's own sentences, measured and written down."""
    config, policy, prompts, ranks = training.config, training.policy, training.prompts, training.ranks
    count = config.evaluation.final_sentences
    if not count:
        return {}
    started = time.monotonic()
    run.log.say(f"sampling {plural(count, 'sentence')} for the closing summary")
    sampling = config.evaluation.sampling(config.sampling)
    rows = config.ppo.batch_size if count <= 1000 else 512
    stage = _stages(run, "the closing summary")
    try:
        measured, drawn = evaluate(policy, config.task, prompts, sampling, count, "final", rows, stage, ranks)
        with stage("fluency"):
            nll = fluency(policy, drawn, config.task, ranks)
    except NonFiniteLogits as error:
        run.log.say(f"no sentences for the summary: {error}")
        return {}
    lines = sentence_lines(zip(drawn.occupations, drawn.texts, strict=True))
    ranks.first_does(lambda: write_file(Path(config.run.output_dir) / FINAL, lines))
    rates = ranks.first_does(lambda: read_pair_rates(config.evaluation.pair_rates, config.task))
    return {
        "final": {**measured, "nll": nll, **spent(drawn, config.task, rates)},
        "outcomes": outcomes_document(strict_outcomes(drawn, config.task)),
        "groups": groups(drawn, config.occupations, config.task) if config.holdout else {},
        "generation": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}",
        "final_seconds": time.monotonic() - started,
    }


def _stages(run: SharedRun, what: str) -> Callable[[str], AbstractContextManager[Stage]]:
    """A stage of the log for each part of `what`."""
    return lambda part: run.log.stage(f"{what}: {part}")


def evaluate_checkpoint(training: Training, run: SharedRun) -> Evaluation | None:
    """Sample and measure the weights as they would be exported. None where their logits are not finite."""
    config, state = training.config, training.state
    count, rows = config.evaluation.eval_sentences, config.ppo.batch_size
    sampling = config.evaluation.sampling(config.sampling)
    stage = _stages(run, f"evaluating step {state.step}")
    try:
        with training.optimizer.averaged():
            prompts, name = training.trained_prompts, "evaluation"
            measured, drawn = evaluate(
                training.policy, config.task, prompts, sampling, count, name, rows, stage, training.ranks
            )
    except NonFiniteLogits as error:
        run.log.event(state.step, "nonfinite", what=f"{error}, in an evaluation")
        return None
    if not math.isfinite(measured["kl"]):
        run.log.event(state.step, "nonfinite", what="the KL to the reference is not finite, in an evaluation")
        return None
    rank = training.ranks.first_does(lambda: training.functions.rank_of(drawn.texts, drawn.occupations))
    rates = training.ranks.first_does(lambda: read_pair_rates(config.evaluation.pair_rates, config.task))
    return {"step": state.step, **measured, **spent(drawn, config.task, rates)} | (
        {} if rank is None else {"rank": rank}
    )


def mark_checkpoint(training: Training, run: SharedRun) -> None:
    """Before a checkpoint that is kept: note whether it is the best so far, and whether nothing was amiss."""
    state = training.state
    if state.watch.at_ease:
        state.watch.healthy_step = state.step
    if training.config.evaluation.eval_sentences:
        found = evaluate_checkpoint(training, run)
        if found is not None:
            run.log.evaluation(state.step, found)
            state.choice.consider(found)


class Exported(NamedTuple):
    """Whose weights are exported, why, and what their evaluation measured, where there was one."""

    step: int
    because: str
    evaluation: Evaluation | None


def select_export(training: Training, run: SharedRun) -> Exported:
    """At the end: put the weights that are to be exported in place.

    The last weights take part without being remembered, so that a run which goes on is not changed by having ended.
    """
    config, state = training.config, training.state
    evaluation, choice = config.evaluation, state.choice
    if not evaluation.eval_sentences:
        return Exported(state.step, "the last step", None)
    last = choice.best if choice.step == state.step else None
    if last is None and state.step % config.run.save_every != 0:
        last = evaluate_checkpoint(training, run)
    if evaluation.export == "last":
        return Exported(state.step, "the last step, as asked", last)
    pairs, top = config.task.pair_noun, choice.top
    if last is not None and (top is None or last["strict"] > top["strict"]):
        top = last
    if last is not None and (
        choice.best is None or last is choice.best or better(last, choice.best, max(choice.highest, last["strict"]))
    ):
        told = because(last, top or last, pairs)
        return Exported(state.step, f"the best evaluation ({words(last, pairs)}): {told}", last)
    checkpoint = run.checkpoint_at(choice.step) if choice.step is not None else None
    if checkpoint is None or choice.best is None:
        return Exported(state.step, "the last step: the checkpoint of the best evaluation is gone", last)
    run.load_weights(checkpoint, training.optimizer)
    told = because(choice.best, top or choice.best, pairs)
    why = f"the best evaluation ({words(choice.best, pairs)}), not the last step {state.step}: {told}"
    return Exported(checkpoint.step, why, choice.best)
