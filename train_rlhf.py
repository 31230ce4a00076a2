"""The guide's entry point: `python train_rlhf.py` trains, and continues when run again. `--help` lists the options."""

import sys
from typing import Any

from equipoise.cli import run_command
from equipoise.commands.train import main
from equipoise.policy.config import PolicyConfig
from equipoise.policy.load import Policy, load_policy
from equipoise.ppo.presets import PRESETS
from equipoise.protocol.task import PROTOCOL


def setup_model_and_tokenizer(
    use_8bit: bool = False, model_name: str = PRESETS["guide"].policy.model
) -> tuple[Any, Any]:
    """The guide's function: the model with its adapters, and its tokenizer. `--use-8bit` does the same for a run."""
    policy: Policy = load_policy(PolicyConfig(model=model_name, use_8bit=use_8bit), PROTOCOL.prompt("study"))
    return policy.model, policy.tokenizer


if __name__ == "__main__":
    sys.exit(run_command(main))
