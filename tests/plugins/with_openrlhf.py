"""Run by `test_trainers` with the interpreter that has OpenRLHF: its executor calls the plug-in for given responses.

Arguments: the tokenizer's folder; a file of JSON lines [prompt, label, response]. Prints a JSON list of rewards.
"""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from openrlhf.utils.agent import SingleTurnAgentExecutor
from transformers import AutoTokenizer

import equipoise.plugins.openrlhf


class Engine:
    """Writes what it was given."""

    def __init__(self, ids):
        self.ids = ids

    async def generate(self, prompt, params, multi_modal_data=None):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)])


folder, given = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
executor = SingleTurnAgentExecutor(equipoise.plugins.openrlhf.__file__)
params = SimpleNamespace(max_tokens=64, logprobs=None)
rewards = []
for line in Path(given).read_text(encoding="utf-8").splitlines():
    prompt, label, response = json.loads(line)
    ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    done = asyncio.run(executor.execute(prompt, label, params, 4096, tokenizer, Engine(ids)))
    assert 0 <= done["scores"] <= 1 and "strict" in done["extra_logs"]
    rewards.append(done["reward"])
print("REWARDS", json.dumps(rewards))
