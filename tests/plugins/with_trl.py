"""Run by `test_trainers` with the interpreter that has TRL: two steps of GRPO and of RLOO with the plug-in.

Arguments: the model's folder, the data sets. Prints a JSON line for each completion: trainer, data set, prompt,
completion, label, reward.
"""

import json
import sys
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from equipoise.plugins.trl import reward


def noting(trainer: str, data: str):
    """The plug-in's reward function, which also prints what it is given and what it gives."""
    plain = reward()

    def noted(prompts, completions, label, **given):
        rewards = plain(prompts, completions, label, **given)
        for row in zip(prompts, completions, label, rewards, strict=True):
            print("ROW", json.dumps([trainer, data, *row]), flush=True)
        return rewards

    return noted


folder, *data_sets = sys.argv[1:]
for data in data_sets:
    for config, trainer in ((GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)):
        with tempfile.TemporaryDirectory() as output:
            arguments = config(
                output_dir=output, max_steps=2, per_device_train_batch_size=4, num_generations=4,
                max_completion_length=16, report_to=[], use_cpu=True, save_strategy="no", bf16=False, seed=0,
            )  # fmt: skip
            trainer(
                model=AutoModelForCausalLM.from_pretrained(folder),
                processing_class=AutoTokenizer.from_pretrained(folder),
                reward_funcs=noting(trainer.__name__, data),
                args=arguments,
                train_dataset=load_dataset("json", data_files=data)["train"],
            ).train()
