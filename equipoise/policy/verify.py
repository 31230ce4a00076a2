"""At load: does the model give the same numbers packed, padded and from a cache as one row by itself?

What attention sees is the model's own affair (distances, windows, a running state), and not every model takes a mask or
positions as they are meant. Nothing in a configuration tells all of them apart, so the real prompts are tried, with a
continuation that the model writes itself: every way against `model(input_ids)` of a single row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from equipoise.errors import UserError
from equipoise.policy import trie
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import invert, weights
from equipoise.policy.eightbit import ROTATED, activations_as_they_are, in_eight_bits
from equipoise.policy.families import position_limit, rotary_limit, window
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout, rollout_of
from equipoise.policy.sample import NonFiniteLogits, sample, sample_static
from equipoise.policy.score import score, token_logprobs
from equipoise.policy.ways import Ways

FEW_TOKENS = 8
"""Tokens that are written where attention is known to see everything before it."""
ROOM = 16
"""Tokens beyond the longest text to be written, so that a slightly longer one need not be computed plainly."""
TOLERATED = 0.25
"""Nats a token, in the mean, that two computations in bfloat16 may differ by where attention is known to be plain."""
REFUSED = 10
"""So many times the tolerance, a model does not even agree with itself."""


@torch.no_grad()
def settle(
    policy: Policy, prompts: Sequence[Sequence[int]], new_tokens: int, say: Callable[[str], None] = print
) -> None:
    """Set `policy.ways` for texts of up to `new_tokens` after these prompts, and say so where they are not the fast
    ones.

    Takes about as long as sampling and scoring ten sentences. Draws nothing from the run's generators. Raises UserError
    for prompts that the model cannot read, and for a model that is no causal language model.
    """
    check_prompts(policy, prompts, new_tokens)
    for notice in policy.notices:
        say(notice)
    _settle_ways(policy, prompts, new_tokens)
    if policy.unproven and not policy.ways.fast:
        policy.give_back_attention()
        policy.ways = Ways()
        _settle_ways(policy, prompts, new_tokens)
    if policy.unproven and policy.graphs.enabled and (line := _settle_graphs(policy, prompts)):
        say(line)
    if not policy.ways.fast:
        say(policy.ways.describe(policy.model.config.model_type))


def _settle_ways(policy: Policy, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    config = policy.model.config
    sees, longest = window(config), max(map(len, prompts))
    ours = config._attn_implementation == TRIE_ATTENTION and not policy.unproven
    known = ours and longest + new_tokens <= sees
    steps = min(new_tokens, FEW_TOKENS) if known else new_tokens + ROOM
    limit = min(position_limit(config) or math.inf, rotary_limit(config))
    steps = int(min(steps, limit - longest))
    chosen = _rows(prompts, 4 if known else 8)
    try:
        done = not known and policy.dtype != torch.float32 and _settle_in_float32(policy, chosen, steps)
        if not done:
            _settle(policy, chosen, steps, known)
    finally:
        policy.forget_recordings()


def _settle_graphs(policy: Policy, prompts: Sequence[Sequence[int]]) -> str | None:
    """Whether a pass can be recorded, of a model that may look at values on the host; else nothing is recorded, and the
    line that says so."""
    few = _rows(prompts, 2)
    try:
        score(policy, rollout_of(few, [[row[-1]] for row in few]), 1.0, packed=True, entropy=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        policy.graphs.enabled = False
        kind, why = policy.model.config.model_type, str(error).splitlines()[0]
        return f"passes of {kind} models cannot be recorded as CUDA graphs ({why}): every kernel is launched by itself"
    finally:
        policy.forget_recordings()
    return None


def _settle(policy: Policy, prompts: list[list[int]], steps: int, known: bool) -> None:
    try:
        with activations_as_they_are():
            rollout = _settle_sampling(policy, prompts, steps, known)
            _settle_scoring(policy, rollout, known)
        if in_eight_bits(policy.model) == ROTATED and policy.ways.fast:
            _settle_rounding(policy, prompts, steps)
    except NonFiniteLogits:  # told, with where it comes from, by the first step that meets it
        policy.ways = Ways()


def _settle_in_float32(policy: Policy, prompts: list[list[int]], steps: int) -> bool:
    """The same with the weights as float32 meanwhile, where memory has room for them: what a model attends to does not
    depend on the dtype, and rounding cannot hide it then. Whether that could be done."""
    tensors = [t for t in (*policy.model.parameters(), *policy.model.buffers()) if t.is_floating_point()]
    # Rounded weights stay so, and the rounding of their activations differs between two ways in any dtype.
    whole = all(t.is_floating_point() for t in policy.model.parameters()) and not in_eight_bits(policy.model)
    # Fused layers hold on to their weights.
    fused = policy.device.type == "cuda" and policy.model.config._attn_implementation == TRIE_ATTENTION
    fused = fused and not policy.unproven
    if not whole or fused or not _room_for(tensors, policy.device):
        return False
    originals, dtype = [t.data for t in tensors], policy.dtype
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        policy.dtype = torch.float32
        _settle(policy, prompts, steps, known=False)
        return True
    except (torch.OutOfMemoryError, UserError):  # the model's own dtype has the last word
        return False
    finally:
        policy.dtype = dtype
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original


def _room_for(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether float32 copies would fill no more than half of the memory that is free."""
    needed = 4 * sum(t.numel() for t in tensors)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return needed < free / 2


def check_prompts(policy: Policy, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raises UserError unless the model has an embedding for every token and a position for every place. Stop tokens
    that it cannot write are forgotten."""
    rows, highest = policy.model.get_input_embeddings().weight.shape[0], max(map(max, prompts))
    if highest >= rows:
        raise UserError(
            f"the tokenizer gives a prompt the token id {highest}, and the model's embedding has {rows} rows: the "
            "tokenizer belongs to another model, or has tokens that were added to it alone"
        )
    stops = tuple(i for i in policy.stop_ids if i < rows)
    if not stops:
        raise UserError(f"no token that ends a text is among the {rows} of the model's embedding: set its eos_token")
    policy.stop_ids = stops
    check_length(policy.model.config, prompts, new_tokens)


def check_length(config: PreTrainedConfig, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raises UserError unless the model has a position for every place; needs its configuration alone."""
    limit, longest = position_limit(config), max(map(len, prompts))
    if limit is not None and longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the {limit} positions of the model: "
            "shorten the prompt, or lower --max-new-tokens"
        )
    turn = rotary_limit(config)
    if longest + new_tokens > turn:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the {turn} up to which this "
            f"{config.model_type} model's rotary embedding stays the same; beyond them every token before "
            "would change its meaning: shorten the prompt, or lower --max-new-tokens"
        )


def _rows(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` prompts: the longest, twice, and others spread down to the shortest."""
    ordered = sorted({tuple(p) for p in prompts}, key=lambda p: (-len(p), p))
    others = [ordered[i * (len(ordered) - 1) // max(1, count - 2)] for i in range(count - 1)]
    return [list(p) for p in (ordered[0], *others)]


def _settle_sampling(policy: Policy, prompts: list[list[int]], steps: int, known: bool) -> Rollout:
    """Find the first of the sampler's ways whose log-probabilities are those of single rows, and what it wrote."""
    ways = (Ways(), Ways(shared=False), Ways(shared=False, cached=False))
    for way in ways:
        policy.ways = way
        last = way == ways[-1]
        try:
            rollout, sampled_N = _sample(policy, prompts, steps)
        except NonFiniteLogits:
            raise
        except Exception as error:  # a way that the model's own code does not provide for
            if last or isinstance(error, torch.OutOfMemoryError):
                raise _unusable(policy, error) from error
            continue
        alone_N = one_by_one(policy, rollout)
        if not bool(alone_N.isfinite().all()):
            raise NonFiniteLogits("non-finite logits of a prompt")
        if _apart(policy, sampled_N, alone_N, known) <= 1:
            return rollout
    if _apart(policy, sampled_N, alone_N, known) > REFUSED:
        raise UserError(
            f"this {policy.model.config.model_type} model is no causal language model: what it expects of a token "
            "depends on more than the tokens before it"
        )
    return rollout


def _unusable(policy: Policy, error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{policy.model.config.model_type} models cannot be sampled here ({first}): choose another model")


def _settle_scoring(policy: Policy, rollout: Rollout, known: bool) -> None:
    """Complete `policy.ways`: which of the scorer's ways agree on this rollout with single rows."""
    alone_N = one_by_one(policy, rollout)

    def agrees(packed: bool) -> bool:
        policy.ways = policy.ways._replace(packed=packed, padded=True)
        try:
            scored_N = score(policy, rollout, 1.0, packed=packed, entropy=False, recorded=False).logprobs
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model takes no such mask or positions
            return False
        return _apart(policy, scored_N, alone_N, known) <= 1

    config = policy.model.config
    packed, padded = agrees(True), agrees(False)
    policy.ways = policy.ways._replace(packed=packed, padded=padded)
    if known and packed and padded and policy.ways.shared:
        policy.ways = policy.ways._replace(tokens=min(window(config), rotary_limit(config)))
        return
    tokens = max(len(p) + n for p, n in zip(rollout.prompts, rollout.lengths_B.tolist(), strict=True))
    policy.ways = policy.ways._replace(tokens=tokens)
    if config._attn_implementation != TRIE_ATTENTION:
        # Where a whole pack is one row for the model, its length may decide what a token sees.
        nodes = len(trie.build(rollout.prompts, rollout.completions()).tokens_M)
        policy.ways = policy.ways._replace(nodes=nodes)


def _settle_rounding(policy: Policy, prompts: list[list[int]], steps: int) -> None:
    """Whether kernels that round activations make no larger mistakes than the rounding itself; else no fast way.

    How large those are depends on the weights, so they are measured: from single rows without the rounding to single
    rows with it. Two computations that both round, each in its own way, are no further from the first; twice that is
    allowed, since a mean over some dozens of tokens scatters.
    """
    rollout, sampled_N = _sample(policy, prompts, steps)
    rounded_N = one_by_one(policy, rollout)
    scored_N = score(policy, rollout, 1.0, packed=True, entropy=False, recorded=False).logprobs
    with activations_as_they_are():
        exact_N = one_by_one(policy, rollout)

    def away(logprobs_N: Tensor) -> float:
        return float((logprobs_N.float().cpu() - exact_N.cpu()).abs().mean())

    allowed = max(2 * away(rounded_N), TOLERATED)
    if not (away(sampled_N) <= allowed and away(scored_N) <= allowed):  # nor where one is not finite
        policy.ways = Ways(packed=False, shared=False)


def one_by_one(policy: Policy, rollout: Rollout) -> Tensor:
    """(N,) log-probability of each completion token: a plain pass for each row by itself. The measure of all ways."""
    found = []
    for prompt, completion in zip(rollout.prompts, rollout.completions(), strict=True):
        ids = torch.tensor([[*prompt, *completion[:-1]]], device=policy.device)
        logits_LV = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        found.append(token_logprobs(logits_LV, torch.tensor(completion, device=policy.device), 1.0))
    return torch.cat(found)


def _apart(policy: Policy, a_N: Tensor, b_N: Tensor, known: bool) -> float:
    """How far two computations are apart, as a multiple of what rounding may do; infinite where one is not finite.

    In float32 the largest difference counts; kernels of our own may round to fewer digits. In bfloat16 single tokens
    differ by tenths of a nat between two correct computations, and by 0.06 in the mean (measured on SmolLM2-135M): the
    mean counts, and little is made of it where attention is known to be plain.
    """
    difference_N = (a_N.float().cpu() - b_N.float().cpu()).abs()
    if not bool(difference_N.isfinite().all()):
        return float("inf")
    if policy.dtype == torch.float32:
        return float(difference_N.max()) / (0.02 if known else 1e-3)
    return float(difference_N.mean()) / (TOLERATED if known else 0.05)


def _sample(policy: Policy, prompts: list[list[int]], steps: int) -> tuple[Rollout, Tensor]:
    """A rollout, and (N,) the log-probabilities that the sampler had for its tokens. Not recorded as graphs."""
    sampling = SamplingConfig(max_new_tokens=steps)
    uniform_BT = torch.rand(len(prompts), steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = _Probe(policy.stop_ids, steps)
    static = policy.graphs.enabled and policy.model.config._attn_implementation == TRIE_ATTENTION
    if static and policy.ways.shared:
        policy.graphs.enabled = False
        try:
            rollout = sample_static(policy, prompts, sampling, uniform_BT.to(policy.device), probe)
        finally:
            policy.graphs.enabled = True
    else:
        rollout = sample(policy, prompts, sampling, uniform_BT=uniform_BT, guide=probe)
    rollout = rollout.cpu()
    return rollout, rollout.report["logprobs"][rollout.mask_BT]


class _Probe:
    """A guide that draws as the sampler does, keeps what the model thought, and decides when rows end: most go on to
    the limit, every third ends half way, so that it is tried how the others go on without them."""

    def __init__(self, stop_ids: Sequence[int], steps: int) -> None:
        self.stop_ids, self.steps = [i for i in stop_ids if i >= 0], steps
        self.logprobs_TB: list[Tensor] = []
        self.rows = 0

    def open(self, rows: int) -> "_Probe":
        self.rows = rows
        return self

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self.logprobs_TB = []

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, rows: Tensor | None = None) -> Tensor:
        rows = torch.arange(self.rows, device=logits_BV.device) if rows is None else rows
        open_BV = logits_BV.float()
        stops = torch.tensor(self.stop_ids, dtype=torch.long, device=logits_BV.device)
        if len(self.stop_ids) < open_BV.shape[1]:  # else there is nothing but stops
            open_BV = open_BV.index_fill(1, stops, -torch.inf)
        token_B = invert(weights(open_BV, SamplingConfig()), uniform_B.to(logits_BV.device))
        if len(self.logprobs_TB) == self.steps // 2 and self.stop_ids:
            token_B = torch.where(rows % 3 == 1, stops[0], token_B)
        logprobs_B = token_logprobs(logits_BV, token_B, 1.0)
        self.logprobs_TB.append(logits_BV.new_zeros(self.rows, dtype=torch.float32).index_copy(0, rows, logprobs_B))
        return token_B

    def report(self) -> Mapping[str, Tensor]:
        logprobs_BT = torch.stack(self.logprobs_TB, dim=1)
        missing = self.steps - logprobs_BT.shape[1]
        padded: Any = torch.nn.functional.pad(logprobs_BT, (0, missing))
        return {"logprobs": padded}
