"""The policy as it is loaded: what trains, what is frozen, and that recomputing activations changes nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.errors import UserError
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.load import Policy, former_dtype, load_for_generation, load_policy, pick_device, pick_dtype
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import score
from tests.default import PROMPTS
from tests.tiny import perturb, tiny_folder

RAW = PROMPTS["raw"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), tie=False)


def config(folder: Path, **changes: object) -> PolicyConfig:
    return replace(PolicyConfig(model=str(folder), dtype="float32", device="cpu"), **changes)  # type: ignore[arg-type]


def rollout(policy: Policy) -> Rollout:
    prompts = [[5, 6, 7], [9, 10], [5, 6, 7], [8]]
    return sample(policy, prompts, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(0))


def test_lora_trains_adapters_of_every_linear_layer_but_the_output_and_the_value_head(folder: Path) -> None:
    policy = load_policy(config(folder, lora_rank=3), RAW)
    layers = [n for n, m in load_for_generation(config(folder), RAW).model.named_modules() if isinstance(m, nn.Linear)]
    adapters = {
        f"base_model.model.{name}.lora_{half}.default.weight"
        for name in layers
        if name != "lm_head"
        for half in ("A", "B")
    }
    assert len(adapters) == 2 * 7 * 2  # two halves, seven linear layers, two blocks
    assert set(policy.trained()) == adapters | {"value_head.weight", "value_head.bias"}
    assert policy.reference is None


def test_full_tuning_trains_every_weight_beside_a_frozen_copy_of_its_own(folder: Path) -> None:
    policy = load_policy(config(folder, tuning="full"), RAW)
    assert policy.reference is not None
    weights = dict(policy.model.named_parameters())
    assert set(policy.trained()) == set(weights) | {"value_head.weight", "value_head.bias"}
    for name, copy in policy.reference.named_parameters():
        assert not copy.requires_grad
        assert torch.equal(copy, weights[name]) and copy.data_ptr() != weights[name].data_ptr()


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_values_are_zero_and_the_distance_to_the_reference_is_exactly_zero(
    folder: Path, tuning: str, dtype: str
) -> None:
    policy = load_policy(config(folder, tuning=tuning, dtype=dtype), RAW)
    assert {p.dtype for n, p in policy.trained().items() if not n.startswith("value_head.")} == {policy.dtype}
    assert {p.dtype for p in policy.value_head.parameters()} == {torch.float32}
    for packed in (False, True):
        ours = score(policy, rollout(policy), 1.0, packed=packed)
        reference = score(policy, rollout(policy), 1.0, packed=packed, reference=True)
        assert torch.equal(ours.logprobs, reference.logprobs)
        assert not ours.values.any()


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputing_activations_gives_the_same_scores_and_gradients(folder: Path, tuning: str, packed: bool) -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        policy = perturb(load_policy(config(folder, tuning=tuning, gradient_checkpointing=recompute), RAW), 0.05)
        batch = rollout(policy)
        begun: list[nn.Module] = []
        mlp = next(m for m in policy.model.modules() if type(m).__name__ == "LlamaMLP")
        handle = mlp.register_forward_pre_hook(lambda module, _, begun=begun: begun.append(module))
        scores = score(policy, batch, 0.9, packed=packed)
        (scores.logprobs.sum() + scores.values.square().sum()).backward()
        handle.remove()
        assert len(begun) == (2 if recompute else 1)
        assert not policy.model.training  # dropout or not, sampling needs the cache that training mode takes away
        reference = score(policy, batch, 0.9, packed=packed, reference=True).logprobs
        found.append((batch.completions(), scores, reference, {n: p.grad for n, p in policy.trained().items()}))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1:], found[1][1:], atol=1e-6, rtol=1e-5)


def test_the_same_seed_starts_the_same_adapters(folder: Path) -> None:
    first, second, third = (
        torch.manual_seed(seed) and load_policy(config(folder), RAW).trained() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], third[n]) for n in first)


def test_for_generation_nothing_is_trained_and_the_samples_are_those_of_the_untrained_policy(folder: Path) -> None:
    policy = load_for_generation(config(folder), RAW)
    assert not any(p.requires_grad for p in policy.model.parameters())
    assert rollout(policy).completions() == rollout(load_policy(config(folder), RAW)).completions()


def test_the_values_of_hidden_states_do_not_depend_on_their_size(folder: Path) -> None:
    policy = perturb(load_policy(config(folder), RAW))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.value(hidden), policy.value(100 * hidden), atol=1e-5, rtol=1e-4)
    slope = math.sqrt(float((policy.value_head.weight.detach() ** 2).sum()))
    assert float((policy.value(hidden) - policy.value_head.bias).abs().max()) <= slope


def test_a_hidden_layer_of_the_value_head_is_what_its_formula_says(folder: Path) -> None:
    """w₂·silu(W₁f + b₁)/√m + b₂ of features of length 1, term by term in Python; 0 until something is learnt."""
    policy = load_policy(config(folder), RAW, value_hidden=3)
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert policy.value(hidden).tolist() == [0.0, 0.0]
    sizes = {n: tuple(p.shape) for n, p in policy.trained().items() if n.startswith("value_head.")}
    assert sizes == {
        "value_head.0.weight": (3, 32), "value_head.0.bias": (3,),
        "value_head.2.weight": (1, 3), "value_head.2.bias": (1,),
    }  # fmt: skip
    perturb(policy)
    first, bias, last, offset = (p.detach().double() for n, p in policy.trained().items() if n in sizes)
    expected = []
    for row in hidden.double():
        centred = row - row.sum() / 32
        features = centred / math.sqrt(float((centred**2).sum()))
        value = float(offset)
        for unit in range(3):
            x = float(bias[unit]) + sum(float(w) * float(f) for w, f in zip(first[unit], features, strict=True))
            value += float(last[0, unit]) * x / (1 + math.exp(-x)) / math.sqrt(3)
        expected.append(value)
    torch.testing.assert_close(
        policy.value(hidden).detach().double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-4
    )


def test_a_hidden_layer_of_the_value_head_begins_with_units_that_differ_and_learns_after_the_last(folder: Path) -> None:
    policy = load_policy(config(folder), RAW, value_hidden=64)
    first, bias, last, _ = (p for n, p in policy.trained().items() if n.startswith("value_head."))
    assert first.std().item() == pytest.approx(1, abs=0.1) and not bias.any()  # of 64 × 32 numbers
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    policy.value(hidden).sum().backward()
    assert last.grad is not None and bool(last.grad.all()) and first.grad is not None and not first.grad.any()
    with torch.no_grad():
        last -= 0.01 * last.grad
    policy.value(hidden).sum().backward()
    assert bool(first.grad.all()) and bias.grad is not None and bool(bias.grad.all())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_rank": 0}, "lora-rank 0"),
        ({"lora_alpha": 0}, "lora-alpha 0"),
        ({"use_8bit": True, "tuning": "full"}, "--tuning lora"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PolicyConfig(**changes)  # type: ignore[arg-type]


def test_eight_bits_on_a_cpu_and_devices_that_are_not_there_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (load_policy, load_for_generation):
        with pytest.raises(UserError, match="--use-8bit needs a CUDA GPU"):
            load(config(folder, use_8bit=True), RAW)
    with pytest.raises(UserError, match=r"'cuda:1'.*no CUDA GPU"):
        pick_device("cuda:1")
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        pick_device("gpu")
    assert pick_device("auto") == torch.device("cpu")


def test_a_named_dtype_is_taken_on_any_processor() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("vendor", "flags", "expected", "former"),
    [
        ("GenuineIntel", "fpu avx2", torch.float32, torch.float32),
        ("GenuineIntel", "fpu avx512_bf16", torch.float32, torch.bfloat16),
        ("GenuineIntel", "fpu avx512_bf16 amx_tile", torch.float32, torch.bfloat16),
        ("GenuineIntel", "fpu avx512_bf16 amx_bf16 amx_tile", torch.bfloat16, torch.bfloat16),
        ("GenuineIntel", "fpu amx_bf16", torch.bfloat16, torch.bfloat16),
        ("AuthenticAMD", "fpu avx512_bf16", torch.bfloat16, torch.bfloat16),
        ("AuthenticAMD", "fpu avx512f", torch.float32, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_is_fast_in_it(
    monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, expected: torch.dtype, former: torch.dtype
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id : {vendor}\nflags : {flags}\n")
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == expected and former_dtype(cpu) == former


def test_without_a_list_of_processors_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == former_dtype(cpu) == torch.float32
