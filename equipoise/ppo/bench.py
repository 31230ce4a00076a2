"""`equipoise bench`: where the time of a PPO step goes, for any model or for a named shape with random weights."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from equipoise import __version__
from equipoise.policy.alike import check_alike
from equipoise.policy.eightbit import NAMES, EightBitLinear, in_eight_bits
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import render_prompts
from equipoise.policy.slices import SlicedLinear
from equipoise.policy.verify import settle
from equipoise.ppo.claim import in_pieces
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.state import State
from equipoise.ppo.step import ppo_step
from equipoise.ppo.tool_config import BenchConfig
from equipoise.ppo.training import Training, new_optimizer
from equipoise.runs.ranks import ALONE, Ranks


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of a large square matrix product, 10¹² FLOP/s: the ceiling that a step is compared with."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)
    for _ in range(3):
        a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    _wait(device)
    return 10 * 2 * n**3 / (time.perf_counter() - start) / 1e12


def multiplied_weights(model: Any) -> int:
    """Weights that a token is multiplied with, whatever they are kept in: all matrices, adapters and output head (also
    where it shares the embedding's weights) included, but no table that rows are only read from."""
    head, found = model.get_output_embeddings(), dict[int, int]()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight):
            continue
        if isinstance(module, SlicedLinear):  # of which this process has a part
            found[id(module)] = module.in_features * module.out_features
        matrices = [module.q] if isinstance(module, EightBitLinear) else module.parameters(recurse=False)
        found |= {id(m): m.numel() for m in matrices if m.dim() > 1}
    return sum(found.values())


def step_flop(config: TrainConfig, policy: Policy, prompts: dict[str, list[int]], tokens: float) -> float:
    """FLOP a step needs when nothing is shared: 2 per weight and token forward; backward twice that, or as much again
    where the weights themselves are frozen."""
    weights = multiplied_weights(policy.model)
    prompt = sum(map(len, prompts.values())) / len(prompts)
    rows, full = config.ppo.batch_size, config.policy.tuning == "full"
    sampling = 2 * weights * (rows * tokens + len(prompts) * prompt)
    scoring = 2 * 2 * weights * rows * (prompt + tokens)
    training = (6 if full else 4) * weights * rows * (prompt + tokens) * config.ppo.ppo_epochs
    return sampling + scoring + training


def bench(config: BenchConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Run the steps and return medians: seconds by phase (of the slowest rank), tokens, achieved TFLOP/s, peak
    memory."""
    train = config.train
    if config.per_gpu:
        more = {name: ranks.size * getattr(train.ppo, name) for name in ("batch_size", "mini_batch_size")}
        train = replace(train, ppo=replace(train.ppo, **more))
    ranks = ranks.sharing_layers(train.policy.tensor_parallel)
    train, _ = in_pieces(train, None, ranks.dealers)
    ranks = ranks.cut_into(train.ppo.pieces)
    made: list[tuple[Policy, dict[str, list[int]], dict[str, float]]] = []
    ranks.each(lambda: made.append(_loaded(config, train, ranks)))
    policy, prompts, seconds = made[0]
    check_alike(policy, list(prompts.values()), ranks)
    state = State.begin(train, RowLimit(train.ppo.micro_batch_size))
    policy.ways = ranks.first_does(lambda: policy.ways)
    training = Training(train, policy, new_optimizer(train, policy, ranks), state, prompts, ranks=ranks)
    every: list[dict[str, float]] = []
    for number in range(config.bench_warmup + config.bench_steps):
        step = ppo_step(training)
        # Random weights have nothing to say of the reward: a failed step is a failed benchmark.
        assert step.problem is None, step.problem
        every.append({**step.timings, "updates": step.metrics["ppo/updates"], "tokens": step.metrics["text/tokens"]})
        print(f"step {number + 1}: {step.timings['time/step']:.3f} s", flush=True)
    seen = every[config.bench_warmup :]
    median = {key: statistics.median(s[key] for s in seen) for key in seen[0]}
    flop = step_flop(train, policy, prompts, median["tokens"])
    return {
        "equipoise": __version__,
        "model": train.policy.model,
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "base_weights": NAMES[kept] if (kept := in_eight_bits(policy.model)) else None,
        **seconds,
        **{f"first_{phase}_s": round(every[0][f"time/{phase}"], 3) for phase in ("step", "sample", "score", "update")},
        "slowest_later_s": round(max((s["time/step"] for s in every[1:]), default=0.0), 4),
        "processes": ranks.size,
        "pieces": ranks.pieces,
        "batch": train.ppo.batch_size,
        "sentences_per_s": train.ppo.batch_size / median["time/step"],
        "wait_s": median.get("time/wait", 0.0),
        "step_s": median["time/step"],
        "steps_s": [round(s["time/step"], 4) for s in seen],
        **{f"{phase}_s": median[f"time/{phase}"] for phase in ("sample", "reward", "score", "update")},
        "rest_s": median["time/step"] - sum(median[f"time/{p}"] for p in ("sample", "score", "update")),
        "updates": median["updates"],
        "tokens_per_completion": median["tokens"],
        "tflops": flop / median["time/step"] / 1e12,
        "matmul_tflops": matmul_tflops(policy.device, policy.dtype),
        "peak_gb": median["memory/peak_gb"],
    }


def _loaded(
    config: BenchConfig, train: TrainConfig, ranks: Ranks
) -> tuple[Policy, dict[str, list[int]], dict[str, float]]:
    """The policy, its prompts by occupation, and the seconds that loading and comparing its ways took. Raises
    UserError."""
    torch.manual_seed(train.seed)
    prompt, started = train.task.prompt(train.prompt), time.perf_counter()
    if config.memory_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(config.memory_gb * 1e9 / total)
    head, hidden = train.ppo.method.value_head, train.ppo.value_hidden
    policy = load_policy(train.policy, prompt, ranks, value_head=head, value_hidden=hidden)
    loaded = time.perf_counter() - started
    if config.full_length:
        policy.stop_ids = (-1,)
    rendered = render_prompts(policy.tokenizer, prompt, train.task, train.system).ids
    prompts = {o: rendered[o] for o in train.occupations}
    if config.prompt_tokens:
        # In front, where all prompts share it, as a longer chat header would be.
        prompts = {o: [p[0]] * (config.prompt_tokens - len(p)) + p for o, p in prompts.items()}
    started = time.perf_counter()
    settle(policy, list(prompts.values()), train.sampling.max_new_tokens)
    _wait(policy.device)
    return policy, prompts, {"load_s": round(loaded, 2), "settle_s": round(time.perf_counter() - started, 2)}


def scaling(results: Sequence[dict[str, Any]]) -> list[str]:
    """A table of benchmarks with different numbers of processes: seconds by phase, sentences a second, and the
    efficiency: how much of the first one's speed is left to each process."""
    phases = ("step", "sample", "score", "update", "rest", "wait")
    lines = ["| processes | batch | " + " | ".join(f"{p}, s" for p in phases) + " | sentences/s | efficiency |"]
    lines.append("|" + "---|" * (len(phases) + 4))
    first = results[0]["sentences_per_s"] / results[0]["processes"]
    for result in results:
        speed = result["sentences_per_s"]
        seconds = " | ".join(f"{result[f'{phase}_s']:.3f}" for phase in phases)
        share = speed / result["processes"] / first
        lines.append(f"| {result['processes']} | {result['batch']} | {seconds} | {speed:.1f} | {share:.0%} |")
    return lines


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
