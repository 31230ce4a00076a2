"""How long generation takes, whole and by phase, at any model or shape: `python benchmarks/generation.py`.

Prints one JSON object. `first_s` is from the loaded model to the last sentence's text, recording of CUDA graphs and
compiling of kernels included, `again_s` the same once more. The phases are those of a token of a full batch on a GPU,
in milliseconds: `token_ms` all of it, `draw_ms` drawing from the logits, `head_ms` the product with the output
embeddings, `layers_ms` the rest. `host_s` is what the second run took beyond its tokens: prompts, random numbers and
texts.
A shape has random weights, whose distributions are nearly flat and end no sentence: each has all of its tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from equipoise.methods.completions import all_keys
from equipoise.methods.prompted import Prompted
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.draw import draw
from equipoise.policy.load import Policy
from equipoise.protocol.task import PROTOCOL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shape:llama-3.1-8b")
    parser.add_argument("--prompt", default="study")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--use-8bit", action="store_true")
    parser.add_argument("--n", type=int, default=250, help="sentences for each of the 20 occupations")
    parser.add_argument("--batch", type=int, nargs="*", help="sentences at a time; default: what generation takes")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    writer = Prompted(
        PolicyConfig(args.model, device=args.device, use_8bit=args.use_8bit),
        prompt=args.prompt,
        sampling=SamplingConfig(top_p=args.top_p, max_new_tokens=args.max_new_tokens),
        seed=0,
        task=PROTOCOL,
    )
    started = time.perf_counter()
    writer.load()
    result: dict[str, Any] = {
        "model": args.model,
        "device": torch.cuda.get_device_name() if writer.device.type == "cuda" else str(writer.device),
        "torch": torch.__version__,
        "sentences": 20 * args.n,
        "load_s": round(time.perf_counter() - started, 2),
    }
    result["batches"] = [timed(writer, args.n, size) for size in args.batch or [writer.batch_size]]
    print(json.dumps(result))


def timed(writer: Prompted, n: int, size: int) -> dict[str, float]:
    """Seconds for n sentences of each occupation, so many at a time, and the phases of a token."""
    policy = writer.policy
    assert policy is not None
    policy.decoders.clear()
    policy.graphs.clear()
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = {"batch": size, **{name: round(write(writer, n, size), 3) for name in ("first_s", "again_s")}}
    if policy.decoders:
        found |= by_phase(policy)
        tokens = -(-20 * n // size) * writer.sampling.max_new_tokens
        found["host_s"] = round(found["again_s"] - tokens * found["token_ms"] / 1e3, 3)
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def write(writer: Prompted, n: int, size: int) -> float:
    keys = all_keys(n, PROTOCOL.names)
    started = time.perf_counter()
    writer.limit.rows = size
    for begin in range(0, len(keys), size):
        writer(keys[begin : begin + size])
    return time.perf_counter() - started


def by_phase(policy: Policy) -> dict[str, float]:
    """Milliseconds of a token of the largest batch that was written."""
    decoder = max(policy.decoders.values(), key=lambda d: len(d.logits_BV))

    def token() -> None:
        decoder.step.zero_()
        policy.graphs((id(decoder), "token"), decoder._token)

    head = policy.model.get_output_embeddings().weight
    hidden = torch.randn(len(decoder.logits_BV), head.shape[1], device=head.device, dtype=head.dtype)
    whole = milliseconds(token)
    drawing = milliseconds(lambda: draw(decoder.logits_BV, decoder.uniform_BT[:, 0], decoder.config))
    product = milliseconds(lambda: linear(hidden, head))
    return {
        "rows": len(decoder.logits_BV),
        "token_ms": round(whole, 3),
        "layers_ms": round(whole - drawing - product, 3),
        "head_ms": round(product, 3),
        "draw_ms": round(drawing, 3),
    }


@torch.no_grad()
def milliseconds(work: Callable[[], Any]) -> float:
    """The GPU's median over some calls."""
    work()
    found = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


if __name__ == "__main__":
    main()
