"""Measure Ctrl-G: speed, compliance by the protocol's own matcher, variety, importance weights. Prints one JSON line.

    python benchmarks/ctrlg.py                                      the bundled model, 10,000 sentences
    python benchmarks/ctrlg.py --n 10 --batch 100                   for two CPU cores
    python benchmarks/ctrlg.py --model shape:llama-3.1-8b           the time of a token beside the plain sampler's

With a shape (random weights) there is nothing to distil: an HMM with random numbers takes the real one's place, so only
the times mean anything. "Overhead" is the time of a token of a full batch, guided over plain.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.methods.completions import all_keys
from equipoise.methods.ctrlg import CtrlG, CtrlGConfig
from equipoise.methods.ctrlg.guide import CtrlGuide
from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import lift
from equipoise.methods.prompted import fingerprint, uniforms
from equipoise.policy.bundled import cache_folder
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.draw import Guide
from equipoise.policy.load import Policy, load_for_generation
from equipoise.policy.prompt import prompt_ids, sentences_of
from equipoise.policy.sample import sample
from equipoise.policy.source import resolve
from equipoise.protocol.prompts import word_count
from equipoise.protocol.task import PROTOCOL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--prompt", default="describe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--n", type=int, default=500, help="sentences for each of the 20 occupations")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--hidden-states", type=int)
    parser.add_argument("--distil-sentences", type=int)
    parser.add_argument("--em-passes", type=int, default=CtrlGConfig.em_passes)
    parser.add_argument("--candidates", type=int, default=CtrlGConfig.candidates)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--terms", choices=["both", "any"], default="both", help="a term of each class, or any term")
    parser.add_argument("--shape", choices=["strict", "free"], default="strict", help="free: terms only, of any length")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--free", type=int, default=0, help="free sentences to compare the estimated p0 with")
    parser.add_argument("--symbols", type=int, default=20_000, help="symbols of the random HMM of a shape")
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 512], help="batch sizes at which a token is timed")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--show", type=int, default=0, help="sentences to print to standard error")
    args = parser.parse_args()
    config = CtrlGConfig(
        terms=args.terms,
        shape=args.shape,
        guidance=args.guidance,
        candidates=args.candidates,
        hidden_states=args.hidden_states,
        distil_sentences=args.distil_sentences,
        em_passes=args.em_passes,
    )
    sampling = SamplingConfig(max_new_tokens=args.max_new_tokens)
    prompt = PROTOCOL.prompt(args.prompt)
    policy = load_for_generation(PolicyConfig(args.model, device=args.device), prompt)
    prompts = {o: prompt_ids(policy.tokenizer, prompt, o, PROTOCOL) for o in PROTOCOL.names}
    on_gpu = policy.device.type == "cuda"
    result: dict[str, Any] = {
        "model": args.model,
        "prompt": args.prompt,
        "candidates": args.candidates,
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if args.model.startswith("shape:"):
        guide = random_guide(policy, prompts, sampling, config, args.hidden_states or 1024, args.symbols)
        result |= {"hidden_states": args.hidden_states or 1024, "symbols": len(guide.emission_S1H) - 1}
    else:
        writer = CtrlG(
            policy, prompts, sampling, config, args.cache, weights=fingerprint(resolve(args.model)), task=PROTOCOL
        )
        result |= writer.prepare(lambda line: print(line, file=sys.stderr, flush=True))
        assert writer.guide is not None
        guide = writer.guide
        result |= write(writer, args.n, args.batch, args.show)
        if args.free:
            result |= free_rate(policy, prompts, sampling, args.free, args.batch, writer)
    for rows in args.rows:
        plain, guided = (token_time(policy, prompts, sampling, rows, steer) for steer in (None, guide))
        result[f"token_s_{rows}"] = {"plain": plain, "guided": guided, "overhead": round(guided / plain - 1, 4)}
    if on_gpu:
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(result))


def write(writer: CtrlG, n: int, batch: int, show: int) -> dict[str, Any]:
    keys = all_keys(n, PROTOCOL.names)
    if writer.policy.device.type == "cuda":  # record the graphs
        writer(keys[:batch], uniforms(1, keys[:batch], writer.sampling.max_new_tokens))
    texts: list[str] = []
    log_weights: list[float] = []
    tokens, started = 0, time.perf_counter()
    for begin in range(0, len(keys), batch):
        part = keys[begin : begin + batch]
        written = writer(part, uniforms(0, part, writer.sampling.max_new_tokens))
        texts += written.texts
        log_weights += written.log_weights
        tokens += written.tokens
    seconds = time.perf_counter() - started
    for text, weight in list(zip(texts, log_weights, strict=True))[:show]:
        print(f"{weight:7.2f}  {text}", file=sys.stderr)
    matches = [PROTOCOL.match(text) for text in texts]
    weights = np.exp(np.array(log_weights))
    p0, error = float(weights.mean()), float(weights.std(ddof=1)) / math.sqrt(len(weights))
    five = matches[:5000]
    return {
        "written": len(texts),
        "seconds": round(seconds, 2),
        "sentences_per_s": round(len(texts) / seconds, 2),
        "tokens_per_sentence": round(tokens / len(texts), 2),
        "strict": sum(map(PROTOCOL.strict, texts)) / len(texts),
        "both_classes": sum(m.complete for m in matches) / len(texts),
        "unique_texts": len(set(texts)),
        "any_term": sum(m.some for m in matches) / len(texts),
        "unique_pairs": len({m.first for m in matches if m.complete}),
        "unique_pairs_in_5000": len({m.first for m in five if m.complete}),
        "top_pairs": top_pairs(matches),
        "ess": round(float(weights.sum() ** 2 / (weights**2).sum()), 1),
        "p0": p0,
        "p0_interval_95": [p0 - 1.96 * error, p0 + 1.96 * error],
        "kl_q_conditional_nats": round(math.log(p0) - statistics.fmean(log_weights), 3),
        "kl_q_model_nats": round(-statistics.fmean(log_weights), 3),
    }


def top_pairs(matches: list[Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for m in matches:
        if m.first is None:
            continue
        name = "/".join(m.first)
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:5])


def free_rate(
    policy: Policy, prompts: dict[str, list[int]], sampling: SamplingConfig, count: int, batch: int, writer: CtrlG
) -> dict[str, Any]:
    """How many of the model's own sentences comply, by the automaton and by the protocol, with Wilson intervals."""
    generator = torch.Generator().manual_seed(12345)
    by_automaton = by_protocol = 0
    names = [PROTOCOL.names[i % len(PROTOCOL.names)] for i in range(count)]
    for begin in range(0, count, batch):
        part = names[begin : begin + batch]
        rollout = sample(policy, [prompts[o] for o in part], sampling, generator)
        texts = sentences_of(policy.tokenizer, rollout, part, PROTOCOL)
        by_automaton += sum(map(writer.automaton.run, rollout.completions(), part))
        finished = rollout.finished_B.tolist()
        by_protocol += sum(done and satisfies(t, writer.config) for t, done in zip(texts, finished, strict=True))
    return {
        "free_sentences": count,
        "free_rate_automaton": by_automaton / count,
        "free_rate_automaton_interval_95": wilson(by_automaton, count),
        "free_rate_protocol": by_protocol / count,
    }


def satisfies(text: str, config: CtrlGConfig) -> bool:
    """What the automaton demands, said with the protocol's matcher, for the default bounds."""
    found = PROTOCOL.match(text)
    terms = found.complete if config.terms == "both" else found.some
    shaped = PROTOCOL.in_length(word_count(text)) and PROTOCOL.is_complete_sentence(text)
    return terms and (config.shape == "free" or shaped)


def wilson(k: int, n: int, z: float = 1.96) -> list[float]:
    centre, half = k / n + z**2 / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    return [max(0.0, (centre - half) / (1 + z**2 / n)), (centre + half) / (1 + z**2 / n)]


def random_guide(
    policy: Policy,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    config: CtrlGConfig,
    hidden: int,
    symbols: int,
) -> CtrlGuide:
    vocabulary = policy.model.config.get_text_config().vocab_size
    automaton = lift(
        policy.tokenizer,
        policy.stop_ids,
        config,
        PROTOCOL,
        max_new_tokens=sampling.max_new_tokens,
        vocabulary=vocabulary,
    )
    chance = np.random.default_rng(0)
    key_V = automaton.class_V.astype(np.int64)
    allowed = np.flatnonzero(automaton.class_V)
    own = chance.choice(allowed, min(symbols, len(allowed)), replace=False)
    key_V[own] = int(key_V.max()) + 1 + np.arange(len(own))
    symbol_V = np.unique(key_V, return_inverse=True)[1]
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.softmax(torch.randn(*shape, generator=generator), dim=-1)

    emission = rows(hidden, int(symbol_V.max()) + 1).T.contiguous()
    model = HMM(rows(len(prompts), hidden), rows(hidden, hidden), emission)
    return CtrlGuide(automaton, model, torch.from_numpy(symbol_V), prompts, sampling, config.guidance, policy.device)


def token_time(
    policy: Policy, prompts: dict[str, list[int]], sampling: SamplingConfig, rows: int, guide: Guide | None
) -> float:
    """Median seconds from token to token, over a batch of `rows`. Stop tokens are ignored, so that none ends early."""
    names = [PROTOCOL.names[i % len(PROTOCOL.names)] for i in range(rows)]
    ids = [prompts[o] for o in names]
    stops, policy.stop_ids = policy.stop_ids, (-1,)
    policy.decoders.clear()
    policy.graphs.clear()
    short = SamplingConfig(max_new_tokens=1)

    def timed(config: SamplingConfig, steer: Guide | None) -> float:
        generator = torch.Generator().manual_seed(0)
        once: Callable[[], Any] = lambda: sample(policy, ids, config, generator, guide=steer)  # noqa: E731
        once()
        seconds = []
        for _ in range(3):
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            once()
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    try:
        # Less the time of the prompts, which both samplers share.
        return (timed(sampling, guide) - timed(short, None)) / (sampling.max_new_tokens - 1)
    finally:
        policy.stop_ids = stops
        policy.decoders.clear()
        policy.graphs.clear()


if __name__ == "__main__":
    main()
