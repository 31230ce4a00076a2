import math
from typing import Any

import pytest
import torch

from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import draw, weights
from equipoise.policy.kernels import vocabulary


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "BLOCK", 64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [True, False])
def test_log_probabilities_entropies_and_gradients_are_those_of_log_softmax(temperature: float, entropy: bool) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 300)).requires_grad_()
    targets, a, b = torch.randint(300, (6,)), torch.randn(6), torch.randn(6)
    log_p = torch.log_softmax(logits / temperature, -1)
    expected = log_p[torch.arange(6), targets], -(log_p.exp() * log_p).sum(-1)
    ((expected[0] * a).sum() + entropy * (expected[1] * b).sum()).backward()
    assert logits.grad is not None
    own = logits.detach().clone().requires_grad_()
    found = vocabulary.logprobs(own, targets, temperature, entropy)
    ((found[0] * a).sum() + (found[1] * b).sum()).backward()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5)
    assert own.grad is not None
    torch.testing.assert_close(own.grad, logits.grad, rtol=1e-5, atol=1e-6)


def test_a_hand_worked_row() -> None:
    logits = torch.full((1, 8), -math.inf)
    logits[0, 2], logits[0, 5] = 0.0, math.log(3.0)  # probabilities 1/4 and 3/4
    logprob, entropy = vocabulary.logprobs(logits, torch.tensor([5]), 1.0, True)
    assert logprob.item() == pytest.approx(math.log(0.75)) and entropy.item() == pytest.approx(0.5623351)


@pytest.mark.parametrize(("top_p", "few"), [(1.0, 256), (0.9, 1), (0.3, 16), (0.9, 256), (1e-6, 16)])
def test_it_draws_what_the_plain_twin_draws(top_p: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`few` candidates: the interval of a nucleus is cut by reading the row until one number, some or all are left."""
    monkeypatch.setattr(vocabulary, "CANDIDATES", few)
    torch.manual_seed(0)
    spread_B1 = torch.tensor([0.0, 0.1, 2.0, 2.0, 2.0, 30.0, 2.0, 2.0])[:, None]
    logits, uniform = spread_B1 * torch.randn(8, 200), torch.rand(8, dtype=torch.float64)
    logits[3, 50:150] = logits[3, 50]  # many of one probability
    logits[4, 20:] = -math.inf
    logits[6, :64] -= 300  # the first block tells nothing of the others
    logits[7, :64] = -math.inf
    config = SamplingConfig(temperature=0.8, top_p=top_p)
    expected, logprob = draw(logits, uniform, config), torch.empty(8)
    assert torch.equal(vocabulary.draw(logits, uniform, 0.8, top_p, logprob_B=logprob), expected)
    own = weights(logits, config)
    own = (own.double() / own.double().sum(1, keepdim=True)).log().gather(1, expected[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), own, rtol=1e-5, atol=1e-5)


def test_a_nucleus_of_one_token_keeps_it_whatever_last_bit_its_normaliser_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it may be another in each thread."""
    own, calls = vocabulary._normaliser, [0]

    def another_bit(*given: Any) -> Any:
        top, share = own(*given)
        calls[0] += 1
        return top, share * (1.0 - calls[0] * 2.0**-23)

    monkeypatch.setattr(vocabulary, "_normaliser", another_bit)
    logits = torch.zeros(1, 300)
    logits[0, 170] = 12.0  # probability 0.998
    token = vocabulary.draw(logits, torch.tensor([0.5], dtype=torch.float64), 1.0, 0.9)
    assert token.tolist() == [170] and calls[0] > 0


def test_the_ends_of_the_unit_interval_draw_tokens_of_some_probability() -> None:
    logits = torch.full((2, 200), -math.inf)
    logits[:, 7] = logits[:, 130] = 1.0
    last = math.nextafter(1.0, 0.0)
    assert vocabulary.draw(logits, torch.tensor([0.0, last], dtype=torch.float64), 1.0, 1.0).tolist() == [7, 130]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_that_are_not_finite_are_named_and_give_a_valid_token(top_p: float) -> None:
    logits, finite = torch.randn(4, 100), torch.ones(4, dtype=torch.uint8)
    logits[1, 5], logits[2, 99] = math.nan, math.inf
    token = vocabulary.draw(logits, torch.rand(4, dtype=torch.float64), 1.0, top_p, finite)
    own = torch.ones_like(finite)
    vocabulary.note_finite(logits, own)
    assert finite.tolist() == own.tolist() == [1, 0, 0, 1] and int(token.min()) >= 0 and int(token.max()) < 100
