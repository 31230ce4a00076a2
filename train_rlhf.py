"""PPO fine-tuning: `python train_rlhf.py` trains, and goes on when it is run again. `--help` lists the options.

The numbers below are the guide's. One that you change counts as an option given, whatever the preset; options on the
command line win over it.
"""

import sys

from equipoise.cli import run_command
from equipoise.commands.guide import GuideRun

BATCH_SIZE = 64
MINI_BATCH_SIZE = 16
PPO_EPOCHS = 4
LEARNING_RATE = 1e-5
TARGET_KL = 0.03
TRAINING_STEPS = 2000

run = GuideRun(
    {
        "BATCH_SIZE": BATCH_SIZE,
        "MINI_BATCH_SIZE": MINI_BATCH_SIZE,
        "PPO_EPOCHS": PPO_EPOCHS,
        "LEARNING_RATE": LEARNING_RATE,
        "TARGET_KL": TARGET_KL,
        "TRAINING_STEPS": TRAINING_STEPS,
    }
)
setup_model_and_tokenizer = run.setup_model_and_tokenizer


def main(argv: list[str]) -> int:
    """Read the options, set up the model, train it. Returns the exit code."""
    run.read(argv)
    # On a GPU with 24 GB: use_8bit=True.
    model, ref_model, tokenizer = setup_model_and_tokenizer(use_8bit=False)
    return run.train(model, ref_model, tokenizer)


if __name__ == "__main__":
    sys.exit(run_command(main))
