"""PPO with a reward of your own: the task's reward, and something more for the second class's term standing first.

    python examples/own_reward.py

trains the bundled model for a few steps, about three minutes on two CPU cores, into the folder `own-reward/`. Run again
it continues. docs/TRAINING.md, "A reward of your own", says what a reward function may do.
"""

from collections.abc import Sequence
from dataclasses import replace

import equipoise

TASK = equipoise.PROTOCOL
STEPS, BATCH = 5, 32
FIRST = 0.5
"""What a sentence gains where a communal term stands before any agentic one."""


def communal_first(sentences: Sequence[str], occupations: Sequence[str]) -> list[float]:
    """One number for each sentence; it takes the place of the task's reward in what PPO maximises."""
    return [TASK.score(sentence).reward + FIRST * begins_communal(sentence) for sentence in sentences]


def begins_communal(sentence: str) -> bool:
    """The kinds of the terms in the order of the text: 0 for the first class, 1 for the second, none for the rest."""
    kinds = [piece.kind for piece in TASK.lexicon.pieces(sentence) if piece.kind in (0, 1)]
    return bool(kinds) and kinds[0] == 1


def main() -> int:
    config = equipoise.preset("bundled-cpu", TASK)
    config = replace(
        config,
        steps=STEPS,
        ppo=replace(config.ppo, batch_size=BATCH),
        warm_start=replace(config.warm_start, warm_start_sentences=64),
        evaluation=replace(config.evaluation, eval_sentences=40, final_sentences=100),
        run=replace(config.run, output_dir="own-reward/model", checkpoint_dir="own-reward/checkpoints",
                    tensorboard_dir="own-reward/runs", save_every=STEPS),
    )  # fmt: skip
    return equipoise.train(config, reward_fn=communal_first).exit_code


if __name__ == "__main__":
    raise SystemExit(main())
