"""The fused layer against transformers' own, packed and decoding; attention against a slow definition."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy import llama, load
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.decode import StaticDecoder
from equipoise.policy.eightbit import ROTATED, to_eight_bits
from equipoise.policy.joined import joined
from equipoise.policy.kernels import rotated
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import Pack, pack, score, score_pack
from equipoise.policy.verify import settle
from equipoise.policy.ways import Ways
from tests.families import family_model
from tests.tiny import pretend_graphs

PROMPTS = [[5, 6, 7, 8 + i % 2, *[9] * (i % 3)] for i in range(4)]


def make(tuning: str, *, fused: bool, eight_bits: torch.dtype | None = None, optimizer: bool = True) -> Policy:
    torch.manual_seed(0)
    # Wide enough to be rotated, where it is.
    hidden, inner = (256, 272) if eight_bits == ROTATED else (64, 96)
    config = LlamaConfig(
        vocab_size=90, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, pad_token_id=2, eos_token_id=2, bos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = TRIE_ATTENTION
    model = LlamaForCausalLM(config).eval()
    reference = copy.deepcopy(model).requires_grad_(False) if tuning == "full" else None
    if tuning == "lora":
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3)
    if eight_bits:
        to_eight_bits(model, eight_bits)
    assert llama.not_covered(model) is None
    for part in (model, reference) if fused else ():
        if part is not None:
            llama.fuse_layers(part)
    policy = Policy(model, None, reference=reference, stop_ids=(2,))  # type: ignore[arg-type]
    if optimizer:
        MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5)
    return policy


def rollout() -> Rollout:
    generator = random.Random(1)
    lengths = [generator.randrange(1, 7) for _ in PROMPTS]
    tokens = torch.zeros(4, 7, dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens[row, :n] = torch.tensor([generator.randrange(3, 90) for _ in range(n)])
    return Rollout(PROMPTS, tokens, torch.tensor(lengths), torch.ones(4, dtype=torch.bool))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


# tuning, 8 bits, gradients beside each other as an optimizer has them, padded as for CUDA graphs
CASES = [
    ("full", None, True, True),
    ("full", None, False, False),
    ("lora", None, True, True),
    pytest.param("lora", None, False, False, marks=pytest.mark.slow),
    ("lora", ROTATED, True, False),
]


@pytest.mark.parametrize(("tuning", "eight_bits", "optimizer", "padded"), CASES)
def test_scores_and_gradients_are_those_of_the_plain_layer(
    tuning: str, eight_bits: torch.dtype | None, optimizer: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[Tensor, Tensor | None]] = []
    transposed = rotated.transposed
    monkeypatch.setattr(rotated, "transposed", lambda *turn: turns.append(turn) or transposed(*turn))
    weights = torch.randn(int(rollout().lengths_B.sum()), generator=torch.Generator().manual_seed(2))
    found: list[dict[str, Tensor]] = []
    for fused in (True, False):
        policy = make(tuning, fused=fused, eight_bits=eight_bits, optimizer=optimizer)
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            for reference in (False, True):
                scores = score(policy, rollout(), 1.0, packed=True, reference=reference)
                out |= {f"{name} {reference}": x for name, x in zip(scores._fields, scores, strict=True)}
        batch = pack(policy, rollout(), padded=padded)
        logprobs = score_pack(policy, Pack(*batch), 1.0, False, False).logprobs[: len(weights)]
        (logprobs * weights).sum().backward()
        gradients = {name: p.grad for name, p in policy.trained().items() if not name.startswith("value_head")}
        assert all(g is not None for g in gradients.values())
        found.append(out | gradients)  # type: ignore[arg-type]
    assert found[0].keys() == found[1].keys()
    # Whose turn was told to be next was next: down, gate and up, output, then query, key and value of each layer.
    assert len(turns) == (8 if eight_bits == ROTATED else 0)
    assert all(told is q for (_, told), (q, _) in pairwise(turns)) and (not turns or turns[-1][1] is None)
    for name, expected in found[1].items():
        if eight_bits and name in gradients:  # a value between two of the format's falls to either side by the last bit
            assert (found[0][name] - expected).norm() < 0.04 * expected.norm()
        else:
            close(found[0][name], expected)


def test_of_rounded_weights_no_norm_and_no_activation_is_kept_for_the_way_back() -> None:
    sizes = []
    for eight_bits in (None, torch.int8):
        kept: list[Tensor] = []
        policy = make("lora", fused=True, eight_bits=eight_bits)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            batch = pack(policy, rollout(), padded=False)
            score_pack(policy, batch, 1.0, False, False)
        sizes.append(sum(t.nbytes for t in kept))
    rows, hidden, inner, layers = len(batch.tokens_M), 64, 96, 2
    assert sizes[0] - sizes[1] == layers * rows * (2 * hidden + inner) * 4


def test_what_one_product_uses_lies_side_by_side_once_there_is_an_optimizer() -> None:
    for tuning in ("full", "lora"):
        policy = make(tuning, fused=True)
        layers = [m.forward.__self__ for m in policy.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        assert len(layers) == 2
        for layer in layers:
            for projection in (layer.qkv, layer.gate_up):
                for parameters in (projection.weights, projection.a, projection.b):
                    if parameters:
                        assert joined(parameters).data_ptr() == parameters[0].data_ptr()
                        grads = [p.grad for p in parameters if p.grad is not None]
                        if grads:
                            assert joined(grads).data_ptr() == grads[0].data_ptr()


@pytest.mark.parametrize("eight_bits", [None, pytest.param(ROTATED, marks=pytest.mark.slow)])
def test_decoding_draws_the_tokens_of_the_plain_sampler(eight_bits: torch.dtype | None) -> None:
    config = SamplingConfig(max_new_tokens=3)
    uniform = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = sample(make("lora", fused=False, eight_bits=eight_bits), PROMPTS, config, uniform_BT=uniform)
    decoder = StaticDecoder(make("lora", fused=True, eight_bits=eight_bits), 4, 16, config)
    for cache in decoder.caches:
        cache.fill_(torch.nan)  # what a pass that trains may leave there: no place is read before it is written
    fast, finite = decoder(PROMPTS, uniform)
    assert finite and torch.equal(fast.tokens_BT, plain.tokens_BT) and torch.equal(fast.lengths_B, plain.lengths_B)


def test_a_pass_that_trains_keeps_its_numbers_in_the_cache_of_decoding_and_two_passes_at_once_do_not_share_it() -> None:
    policy = make("lora", fused=True, eight_bits=torch.int8)

    def gradients(losses: list[Tensor]) -> list[Tensor]:
        sum(losses).backward()  # type: ignore[attr-defined]
        found = [p.grad.clone() for p in policy.trained().values() if p.grad is not None]
        for p in policy.trained().values():
            p.grad = None if p.grad is None else p.grad.zero_()
        return found

    def loss(kept: list[Tensor], lengths: list[int]) -> Tensor:
        rows = replace(rollout(), lengths_B=torch.tensor(lengths))
        batch = pack(policy, rows, padded=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return score_pack(policy, batch, 1.0, False, False).logprobs.sum()

    sizes = [rollout().lengths_B.tolist(), [1, 2, 1, 3]]
    expected = [gradients([loss([], lengths)]) for lengths in sizes]
    decoder = StaticDecoder(policy, 4, 40, SamplingConfig(max_new_tokens=2))
    for module, cache in zip(decoder.attention, decoder.caches, strict=True):
        module.kv_cache = cache
    caches = {c.untyped_storage().data_ptr() for c in decoder.caches}

    def lent(kept: list[Tensor]) -> int:
        return sum(t.untyped_storage().data_ptr() in caches for t in kept)

    kept: list[Tensor] = []
    found = gradients([loss(kept, sizes[0])])
    # What was attended to and the sum after attention of each of two layers.
    assert lent(kept) == 4 and all(map(torch.equal, found, expected[0]))
    first: list[Tensor] = []
    second: list[Tensor] = []
    found = gradients([loss(first, sizes[0]), loss(second, sizes[1])])
    assert lent(first) == 4 and lent(second) == 0
    for own, one, other in zip(found, *expected, strict=True):
        close(own, one + other)


def small(**changes: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "no list of decoder layers"),
        (lambda: small(num_attention_heads=1, head_dim=512), "heads of 512"),
        (lambda: small(intermediate_size=40), "projections to 40, 40"),
        (lambda: small(hidden_act="relu"), "its activation"),
        (lambda: family_model("qwen3-moe"), "a mixture of experts"),
        (lambda: family_model("bamba"), "a state beside or in place of attention"),
        (lambda: family_model("cohere"), "layers of the kind CohereDecoderLayer"),
    ],
)
def test_what_is_not_covered_is_named(model: Callable[[], torch.nn.Module], reason: str) -> None:
    assert llama.not_covered(model()) == reason


def test_a_norm_of_another_kind_is_not_taken_for_one_that_is_known() -> None:
    model = small()
    norm = model.model.layers[0].post_attention_layernorm
    assert llama.not_covered(model) is None
    norm.forward = lambda x: LlamaRMSNorm.forward(norm, x) * 1.01
    assert llama.not_covered(model) == "its norm (LlamaRMSNorm)"


@pytest.mark.slow
def test_the_fused_model_is_found_to_have_the_numbers_of_one_row_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = pretend_graphs(make("lora", fused=True, optimizer=False), monkeypatch)
    settle(policy, PROMPTS, 3, lambda line: pytest.fail(line))
    assert policy.ways == Ways() and not policy.decoders


@pytest.mark.parametrize(
    ("name", "attention", "line"),
    [
        ("qwen3-moe", TRIE_ATTENTION, "a mixture of experts"),
        ("bloom", None, "layers of the kind BloomBlock"),
        ("qwen3", TRIE_ATTENTION, None),
    ],
)
def test_one_line_says_what_the_slow_path_is_taken_for(
    name: str, attention: str | None, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(name, **({"intermediate_size": 64, "head_dim": 8} if name == "qwen3" else {}))
    ids = torch.arange(3, 30)[None]
    before = model(ids).logits
    assert load._fuse(model, PolicyConfig(), attention) is None  # on a CPU there is nothing to say
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    said = load._fuse(model, PolicyConfig(), attention)
    kind = model.config.model_type
    assert said == (line and f"{kind} models take the slow path on a GPU: the fast layer does not cover {line}")
    assert load._fuse(model, PolicyConfig(fused=False), attention) is None
    monkeypatch.undo()
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=0)
