"""Run by `test_peers` with the interpreter that has verl: its advantages for the rewards of a file of tensors.

Arguments: the file, where the result goes. Ray, which verl imports, is a stub: nothing remote is called.
"""

import importlib.machinery
import sys
from types import ModuleType

ray = ModuleType("ray")
ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
ray.remote = lambda *a, **k: a[0] if a and callable(a[0]) else (lambda f: f)
ray.ObjectRef, ray.get = object, lambda x: x
for name in ("ray", "ray.util", "ray.util.state", "ray.experimental", "ray.experimental.state"):
    sys.modules[name] = ray if name == "ray" else ModuleType(name)

import numpy as np  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

given, path = load_file(sys.argv[1]), sys.argv[2]
mask, index = given["mask"].float(), np.array(given["group"].tolist())
found = {}
for gamma in (1.0, 0.9):
    config = AlgoConfig(gamma=gamma)
    found[f"reinforce++ {gamma}"], _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        given["token_rewards"].clone(), mask, config=config
    )
scores = given["scores"].clone()
found["grpo"], _ = core_algos.compute_grpo_outcome_advantage(scores, mask, index, epsilon=1e-4)
found["rloo"], _ = core_algos.compute_rloo_outcome_advantage(scores.clone(), mask, index)
save_file({name: x.contiguous() for name, x in found.items()}, path)
