"""Run by `test_trainers` with the interpreter that has verl: its reward manager calls the plug-in for given responses.

Ray, which verl imports, is a stub: nothing remote is called. Arguments as of `with_openrlhf`, with rows of the data set
in place of prompt and label: [row, response].
"""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType

ray = ModuleType("ray")
ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
ray.remote = lambda *a, **k: a[0] if a and callable(a[0]) else (lambda f: f)
ray.ObjectRef, ray.get = object, lambda x: x
for name in ("ray", "ray.util", "ray.util.state", "ray.experimental", "ray.experimental.state"):
    sys.modules[name] = ray if name == "ray" else ModuleType(name)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.workers.reward_manager.naive import NaiveRewardManager  # noqa: E402

from equipoise.plugins.verl import compute_score  # noqa: E402

PROMPT, RESPONSE = 128, 96
folder, given = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
rows, prompts, responses, masks = [], [], [], []
for line in Path(given).read_text(encoding="utf-8").splitlines():
    row, text = json.loads(line)
    p = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
    r = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows.append(row)
    prompts.append([0] * (PROMPT - len(p)) + p)
    responses.append(r + [0] * (RESPONSE - len(r)))
    masks.append([0] * (PROMPT - len(p)) + [1] * (len(p) + len(r)) + [0] * (RESPONSE - len(r)))
tensors = {"prompts": prompts, "responses": responses, "attention_mask": masks}
batch = TensorDict({name: torch.tensor(x) for name, x in tensors.items()}, batch_size=[len(rows)])
columns = {name: np.array([row[name] for row in rows], dtype=object) for name in ("reward_model", "data_source")}
columns["extra_info"] = np.array([dict(row["extra_info"]) for row in rows], dtype=object)
done = NaiveRewardManager(tokenizer, 0, compute_score)(DataProto(batch, columns), return_dict=True)
assert {"strict", "base", "all_classes"} <= set(done["reward_extra_info"])
print("REWARDS", json.dumps(done["reward_tensor"].sum(-1).tolist()))
