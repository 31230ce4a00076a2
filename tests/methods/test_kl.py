"""The KL to the base model against its definition, by enumeration of everything that can be written."""

import math
from pathlib import Path

import pytest
import torch

from equipoise.errors import UserError
from equipoise.measures.decomposition import read_outcomes
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.guided import effective_size, mean_weight
from equipoise.methods.kl import ROWS, kl_to_base
from equipoise.methods.prompted import Prompted
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.likelihood import completion_logprobs
from equipoise.protocol.task import PROTOCOL
from tests.tiny import next_logprobs, tiny_folder, words_folder

OCCUPATIONS = PROTOCOL.names


def writer(folder: Path, tokens: int = 2, seed: int = 0, top_p: float = 1.0) -> Prompted:
    return Prompted(
        PolicyConfig(str(folder), device="cpu", dtype="float32"),
        prompt="raw",
        sampling=SamplingConfig(1.0, top_p, tokens),
        seed=seed,
    )


def quiet(_line: str) -> None:
    pass


@torch.no_grad()
def logprobs(one: Prompted, rows: list[list[int]]) -> torch.Tensor:
    """(rows, vocabulary) of the token after each row, all of one length."""
    assert one.policy is not None
    logits = one.policy.model(input_ids=torch.tensor(rows), use_cache=False).logits[:, -1].double()
    return torch.log_softmax(logits, -1)


def within(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probabilities of the likeliest tokens that reach top_p, made to sum to 1; −inf for the others."""
    ordered, places = logp.exp().sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    mass = torch.where(kept, ordered, 0.0).sum(-1, keepdim=True)
    return torch.full_like(logp, -math.inf).scatter(-1, places, torch.where(kept, (ordered / mass).log(), -math.inf))


def mean_difference(own: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Σ q (log q − log p) over the last dimension, 0·log 0 = 0."""
    return torch.where(own.isfinite(), own.exp() * (own - base), 0.0).sum(-1)


def exact_kl(q: Prompted, p: Prompted, occupation: str) -> float:
    """Σ q(x) (log q(x) − log p(x)) over every completion of at most two tokens, q as it is sampled from."""
    top_p = q.sampling.top_p
    assert q.policy is not None
    prompt, vocabulary = q.prompts[occupation], q.policy.model.config.vocab_size
    first_q, first_p = within(logprobs(q, [prompt])[0], top_p), logprobs(p, [prompt])[0]
    rows = [[*prompt, token] for token in range(vocabulary)]
    second_q, second_p = within(logprobs(q, rows), top_p), logprobs(p, rows)
    total = float(mean_difference(first_q, first_p))
    goes_on = [token for token in range(vocabulary) if token not in q.policy.stop_ids]
    inner = mean_difference(second_q, second_p)
    return total + float((first_q.exp() * inner)[goes_on].sum())


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_the_interval_holds_the_kl_of_everything_that_can_be_written(tmp_path: Path, top_p: float) -> None:
    q, p = writer(words_folder(tmp_path / "q", seed=0), top_p=top_p), writer(words_folder(tmp_path / "p", seed=1))
    q.load(), p.load()
    exact = sum(exact_kl(q, p, o) for o in OCCUPATIONS) / len(OCCUPATIONS)
    known = kl_to_base(q, p, 100, quiet)
    found = known["kl"]
    for event in ("both", "strict"):  # of the very same sentences
        seen = read_outcomes(known["outcomes"][event])
        assert sum(each.n for each in seen.values()) == 2000
        assert sum(each.n * each.mean for each in seen.values()) / 2000 == pytest.approx(found["value"])
    assert exact > 0.05 and found["low"] < exact < found["high"]
    assert found["high"] - found["low"] < 0.35 * exact
    assert (
        "2,000 sentences" in found["how"]
        and f"top-p {top_p:g}" in found["how"]
        and "p under the prompt raw" in found["how"]
    )
    assert q.policy is None and p.policy is None
    # Other numbers, another estimate; the same, the same.
    again, other = writer(tmp_path / "q"), writer(tmp_path / "q", seed=1)
    assert kl_to_base(again, writer(tmp_path / "p"), 3, quiet) != kl_to_base(other, writer(tmp_path / "p"), 3, quiet)


def test_a_model_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    folder = words_folder(tmp_path / "q")
    found = kl_to_base(writer(folder), writer(folder), 2, quiet)["kl"]
    assert (found["value"], found["low"], found["high"]) == (0.0, 0.0, 0.0)


def test_log_probabilities_are_sums_over_the_tokens_whatever_their_lengths(tmp_path: Path) -> None:
    one = writer(words_folder(tmp_path / "q"))
    one.load()
    assert one.policy is not None
    prompts = [one.prompts[o] for o in (*OCCUPATIONS, "nurse")]  # more than are scored at a time
    completions = [[5 + i % 7] * (1 + i % 4) + [1] for i in range(len(prompts))]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        steps = [next_logprobs(one.policy.model, [*prompt, *completion[:t]])[c] for t, c in enumerate(completion)]
        expected.append(sum(steps))
    assert completion_logprobs(one.policy, prompts, completions, ROWS) == pytest.approx(expected, abs=1e-4)


def test_models_of_different_vocabularies_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another vocabulary"):
        kl_to_base(writer(words_folder(tmp_path / "q")), writer(tiny_folder(tmp_path / "p")), 1, quiet)


def test_the_mean_weight_and_its_effective_size_are_as_worked_by_hand() -> None:
    # Weights 1 and 3 of every occupation: mean 2, (20·4)² / (20·(1 + 9)) = 32.
    weights = {key: math.log(1 if key.run_id == 1 else 3) for key in all_keys(2, OCCUPATIONS)}
    found = mean_weight(weights)
    assert found["value"] == pytest.approx(2.0)
    # A mean of 40 draws with standard deviation 1, each: 2 ± 1.96/√40, less what the discreteness of two values costs.
    assert (found["low"], found["high"]) == pytest.approx((2 - 0.31, 2 + 0.31), abs=0.03)
    assert effective_size(list(weights.values())) == pytest.approx(32.0)
    assert effective_size([-1000.0, -1000.0, -1000.0]) == pytest.approx(3.0)
    constant = mean_weight(dict.fromkeys(all_keys(3, OCCUPATIONS), math.log(0.01)))
    assert constant == pytest.approx({"value": 0.01, "low": 0.01, "high": 0.01})


def test_every_occupation_weighs_alike_in_the_mean_weight() -> None:
    weights = {Key(o, 1): math.log(20.0 if o == "nurse" else 1e-9) for o in OCCUPATIONS}
    assert mean_weight(weights)["value"] == pytest.approx(1.0)
    assert torch.tensor(list(mean_weight(weights).values())).isfinite().all()
