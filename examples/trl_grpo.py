"""TRL's GRPO with the task's reward, two steps. Needs `pip install trl` beside equipoise.

    python examples/trl_grpo.py             # the bundled model
    python examples/trl_grpo.py MODEL       # a folder, or a name on the Hugging Face Hub

docs/PLUGINS.md says what is scored, and how RLOO, verl and OpenRLHF take the same reward.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import equipoise
from equipoise.plugins.dataset import rows
from equipoise.plugins.trl import reward

TASK = equipoise.PROTOCOL
STEPS = 2


def bundled() -> str:
    from equipoise.policy.bundled import folder

    return str(folder())


def main(argv: list[str]) -> int:
    model = argv[0] if argv else bundled()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward(base_one=0.4),  # any weight of `equipoise score --help`
        args=GRPOConfig(
            output_dir="trl-grpo", max_steps=STEPS, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=24, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        ),
        train_dataset=Dataset.from_list(rows("trl", TASK, TASK.name, TASK.default_prompt)),
    )  # fmt: skip
    trainer.train()
    for step in trainer.state.log_history:
        if "reward" in step:
            print(f"step {step['step']}: mean reward {step['reward']:+.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
