"""The end of a run: which weights, what they write, the exported model, the closing summary."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.policy.load import Policy
from equipoise.policy.sample import NonFiniteLogits
from equipoise.ppo.choice import settle
from equipoise.ppo.evaluate import evaluate, fluency, groups
from equipoise.ppo.optimizer import MasterAdam
from equipoise.ppo.run import Run, write_json
from equipoise.ppo.state import State
from equipoise.ppo.summary import SUMMARY, alerts, describe, read_rows, training_summary

if TYPE_CHECKING:
    from equipoise.ppo.train import TrainConfig

FINAL = "final_sentences.jsonl"
"""The sentences that the closing summary measures."""


def finish(
    config: "TrainConfig",
    policy: Policy,
    optimizer: MasterAdam,
    state: State,
    prompts: Mapping[str, Sequence[int]],
    run: Run,
) -> None:
    """Measure, export and summarise. `prompts` are those of all occupations, the held-out ones among them."""
    output = Path(config.run.output_dir)
    trained = {o: prompts[o] for o in config.occupations}
    step, because, evaluation = settle(config, policy, optimizer, state, trained, run)
    summary: dict[str, Any] = {
        "steps": state.step,
        "seed": config.seed,
        "exported_step": step,
        "exported_because": because,
        **training_summary(read_rows(output), step),
        "evaluation": evaluation,
        "base": state.base.document() if state.base else None,
        "alerts": alerts(output),
        "alert_rollbacks": state.remedies.rollbacks,
        "skipped": state.skipped,
    }
    with optimizer.averaged():
        summary |= _final(config, policy, prompts, run, output)
        # The weights come last: a folder that has them is complete.
        write_json(output / SUMMARY, summary)
        run.export(
            policy,
            f"PPO, {state.step} steps of {config.ppo.batch_size} sentences, KL coefficient {state.kl_coef:.3g}; "
            f"exported: step {step}, {because}"
            + (", moving average of the weights" if config.ppo.average_weights else ""),
        )
    for line in describe(summary):
        run.log.say(line)
    run.log.say(
        f"done: python generate_rlhf.py writes sentences with it; tensorboard --logdir {config.run.tensorboard_dir}"
    )


def _final(
    config: "TrainConfig", policy: Policy, prompts: Mapping[str, Sequence[int]], run: Run, output: Path
) -> dict[str, Any]:
    """The exported model's own sentences, measured."""
    count = config.evaluation.final_sentences
    if not count:
        return {}
    started = time.monotonic()
    run.log.say(f"sampling {count} sentences for the closing summary")
    sampling = config.evaluation.sampling(config.sampling)
    rows = config.ppo.batch_size if count <= 1000 else 512
    try:
        measured, drawn = evaluate(policy, prompts, sampling, count, "final", rows)
        nll = fluency(policy, drawn)
    except NonFiniteLogits as error:
        run.log.say(f"no sentences for the summary: {error}")
        return {}
    lines = []
    for i, (occupation, text) in enumerate(zip(drawn.occupations, drawn.texts, strict=True)):
        lines.append(json.dumps({"occupation": occupation, "run_id": i // len(prompts) + 1, "text": text}) + "\n")
    (output / FINAL).write_text("".join(lines))
    return {
        "final": {**measured, "nll": nll},
        "groups": groups(drawn.texts, drawn.occupations, config.occupations) if config.holdout else {},
        "generation": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}",
        "final_seconds": time.monotonic() - started,
    }
