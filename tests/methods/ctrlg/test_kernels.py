"""A guided token in five kernels against its plain twin: in Triton's interpreter, or compiled where there is a GPU."""

import functools
import importlib.util
import itertools

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from equipoise.methods.ctrlg.guide import CtrlGuide
from equipoise.methods.ctrlg.lift import TokenAutomaton, lift_constraint
from equipoise.policy.config import SamplingConfig
from tests.methods.ctrlg.oracle import constraint
from tests.methods.ctrlg.test_hmm import random_hmm

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from equipoise.methods.ctrlg import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECIAL = ["</s>", "bold", "loyal", ".", "self-reliant", "un"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(40)), *(f"w{i}." for i in range(30)), *(f"loyal{i}" for i in range(5))]
"""Two groups of symbols that are large enough for a product of their own, and tokens that are neither's."""
PROMPTS = {"x": [7], "y": [8, 7]}
LIMIT, HIDDEN = 7, 21


@functools.cache
def automaton() -> TokenAutomaton:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="un"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    demand = constraint(("bold", "self-reliant"), ("loyal",), words=(5, 9))
    prefixes = {name: f"The {name} was" for name in PROMPTS}
    return lift_constraint(tokenizer, (0,), demand, prefixes, max_new_tokens=LIMIT)


def guide(*, guidance: float = 1.0, top_p: float = 1.0, temperature: float = 1.0) -> CtrlGuide:
    sampling = SamplingConfig(temperature, top_p, LIMIT)
    model = random_hmm(3, len(PROMPTS), HIDDEN, len(WORDS))
    return CtrlGuide(automaton(), model, torch.arange(len(WORDS)), PROMPTS, sampling, guidance, DEVICE)


def visited(steering: CtrlGuide, left: int) -> torch.Tensor:
    """Every state to which some tokens lead, ends included; those from which no sentence is left are among them."""
    machine, found = steering.automaton, set(steering.automaton.starts.values())
    for _ in range(LIMIT - 1 - left):
        found |= {machine.step(state, token) for state, token in itertools.product(found, range(len(WORDS)))}
    return torch.tensor(sorted(found), device=DEVICE)


def random_numbers(rows: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    belief_BH = torch.softmax(2 * torch.randn(rows, hidden, generator=generator), -1)
    logits_BV = 2 * torch.randn(rows, len(WORDS), generator=generator)
    uniform_B = torch.rand(rows, generator=generator, dtype=torch.float64)
    return belief_BH.to(DEVICE), logits_BV.to(DEVICE), uniform_B.to(DEVICE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Several tiles, and sizes that fit none; NumPy warns of the infinities that the kernels work with on purpose."""
    for name, size in (("TILE", 16), ("ROWS", 16), ("INNER", 16), ("PLACES", 4), ("WIDTH", 16), ("BLOCK", 32)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr("equipoise.methods.ctrlg.lookahead.TILE", 16)


@pytest.mark.parametrize(("guidance", "left"), [(0.0, 1), (1.0, 0), (1.7, 4)])
def test_the_bonus_is_the_plain_twins(guidance: float, left: int) -> None:
    steering = guide(guidance=guidance)
    assert sum(size > 20 for size in steering.sizes) == 2 and len(steering.tiles[0]) > 4
    state_B = visited(steering, left)
    belief_BH, _, _ = random_numbers(len(state_B), HIDDEN)
    left_1 = torch.tensor([left], device=DEVICE)
    expected = steering.bonus(belief_BH, state_B, left_1)
    found = kernels.bonus(steering, belief_BH, state_B, left_1)
    assert torch.equal(found.isfinite(), expected.isfinite()) and bool(expected.isfinite().any())
    exact = not torch.cuda.is_available()  # TF32 has ten bits
    rtol, atol = (1e-5, 1e-5) if exact else (0, 4e-3 * guidance)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("top_p", "temperature", "guidance"), [(0.7, 1.0, 1.0), (1.0, 0.6, 2.0)])
def test_a_step_is_the_plain_twins(top_p: float, temperature: float, guidance: float) -> None:
    steering = guide(top_p=top_p, temperature=temperature, guidance=guidance)
    state_B = visited(steering, 4)
    live_B = steering.automaton.need_F[state_B.cpu().numpy()] <= 5  # elsewhere there is nothing to draw
    belief_BH, logits_BV, uniform_B = random_numbers(len(state_B), HIDDEN)
    inputs = logits_BV, uniform_B, belief_BH, state_B, torch.tensor([4], device=DEVICE)
    expected, found = steering.step(*inputs), kernels.step(steering, *inputs)
    assert live_B.sum() > 10 and len(set(expected[0].tolist())) > 10
    for own, other, close in zip(found, expected, (0, 1e-4, 1e-5, 0), strict=True):
        assert own.dtype == other.dtype
        own, other = own.cpu()[live_B], other.cpu()[live_B]
        if torch.cuda.is_available():
            same = found[0].cpu()[live_B] == expected[0].cpu()[live_B]
            assert same.float().mean() > 0.97
            own, other, close = own[same], other[same], 1e-2 * bool(close)
        torch.testing.assert_close(own, other, rtol=close, atol=close)
