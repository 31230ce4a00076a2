"""The hidden Markov model against enumeration of every path of states."""

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
import torch

from equipoise.methods.ctrlg.hmm import (
    HMM,
    Sequences,
    expected_counts,
    from_states,
    k_means,
    log_likelihoods,
    maximise,
    nearest,
)

P, H, S, T = 2, 3, 5, 4


def random_hmm(seed: int, prompts: int = P, hidden: int = H, symbols: int = S) -> HMM:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        return torch.softmax(1.5 * torch.randn(*shape, generator=generator), dim=-1)

    return HMM(rows(prompts, hidden), rows(hidden, hidden), rows(hidden, symbols).T.contiguous())


def data(*rows: tuple[list[int], int, float]) -> Sequences:
    width = max(len(symbols) for symbols, _, _ in rows)
    return Sequences(
        torch.tensor([symbols + [S - 1] * (width - len(symbols)) for symbols, _, _ in rows]),
        torch.tensor([len(symbols) for symbols, _, _ in rows]),
        torch.tensor([prompt for _, prompt, _ in rows]),
        torch.tensor([weight for _, _, weight in rows]),
    )


def paths(model: HMM, symbols: list[int], prompt: int) -> dict[tuple[int, ...], float]:
    """The joint probability of the symbols and every path of states."""
    out = {}
    for path in itertools.product(range(len(model.transition_HH)), repeat=len(symbols)):
        p = float(model.initial_PH[prompt, path[0]])
        for before, after in itertools.pairwise(path):
            p *= float(model.transition_HH[before, after])
        for state, symbol in zip(path, symbols, strict=True):
            p *= float(model.emission_SH[symbol, state])
        out[path] = p
    return out


ROWS = [([0, 1, 2, 3], 0, 1.0), ([4, 4], 1, 0.5), ([2], 1, 3.0), ([3, 3, 0], 0, 0.0)]


def test_likelihoods_are_sums_over_all_paths() -> None:
    model = random_hmm(0)
    expected = [math.log(sum(paths(model, symbols, prompt).values())) for symbols, prompt, _ in ROWS]
    assert log_likelihoods(model, data(*ROWS), batch=3).tolist() == pytest.approx(expected, rel=1e-6)


def test_all_strings_of_a_length_have_probability_one() -> None:
    every = data(*((list(symbols), 1, 1.0) for symbols in itertools.product(range(S), repeat=T)))
    assert float(log_likelihoods(random_hmm(1), every).exp().sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 1024])
def test_expected_counts_are_posteriors_over_all_paths(batch: int) -> None:
    model = random_hmm(2)
    initial, transition, emission = torch.zeros(P, H), torch.zeros(H, H), torch.zeros(S, H)
    for symbols, prompt, weight in ROWS:
        joint = paths(model, symbols, prompt)
        total = sum(joint.values())
        for path, p in joint.items():
            share = weight * p / total
            initial[prompt, path[0]] += share
            for before, after in itertools.pairwise(path):
                transition[before, after] += share
            for state, symbol in zip(path, symbols, strict=True):
                emission[symbol, state] += share
    counts = expected_counts(model, data(*ROWS), batch=batch)
    torch.testing.assert_close(counts.initial_PH, initial, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(counts.transition_HH, transition, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(counts.emission_SH, emission, rtol=1e-5, atol=1e-6)


def test_soft_counts_are_posteriors_given_what_came_before_each_place() -> None:
    model = random_hmm(2)
    others = torch.tensor([[[0, 1], [2, 2], [4, 3], [1, 0]], [[4, 2], [3, 4], [0, 0], [0, 0]]])
    rows = [([0, 1, 2, 3], 0, 1.0), ([4, 4], 1, 0.5)]
    sequences = dataclasses.replace(data(*rows), others_BTM=others)
    initial, transition, emission = torch.zeros(P, H), torch.zeros(H, H), torch.zeros(S, H)
    for row, (symbols, prompt, weight) in enumerate(rows):
        for t in range(len(symbols)):
            for other in others[row, t].tolist():
                joint = paths(model, [*symbols[:t], other], prompt)
                for path, p in joint.items():
                    share = weight * p / sum(joint.values()) / 2
                    if t == 0:
                        initial[prompt, path[0]] += share
                    else:
                        transition[path[-2], path[-1]] += share
                    emission[other, path[-1]] += share
    counts = expected_counts(model, sequences, soft=1.0)
    torch.testing.assert_close(counts.initial_PH, initial, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(counts.transition_HH, transition, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(counts.emission_SH, emission, rtol=1e-5, atol=1e-6)
    hard = expected_counts(model, sequences)
    mixed = expected_counts(model, sequences, soft=0.25)
    torch.testing.assert_close(mixed.emission_SH, 0.75 * hard.emission_SH + 0.25 * counts.emission_SH)
    torch.testing.assert_close(mixed.transition_HH, 0.75 * hard.transition_HH + 0.25 * counts.transition_HH)


def test_each_full_step_raises_the_likelihood_and_recovers_the_symbols_frequencies() -> None:
    generator = torch.Generator().manual_seed(3)
    symbols = torch.randint(S, (60, 6), generator=generator)
    symbols[:, 1::2] = (symbols[:, ::2] + 1) % S  # something to find: each second symbol follows from the one before
    lengths = torch.full((60,), 6)
    sequences = Sequences(symbols, lengths, torch.arange(60) % P, torch.ones(60))
    model, base = random_hmm(4), torch.full((S,), 1 / S)
    seen = []
    for _ in range(30):
        counts = expected_counts(model, sequences)
        seen.append(counts.log_likelihood)
        model = maximise(counts, base)
    assert all(later >= earlier - 1e-3 for earlier, later in itertools.pairwise(seen))
    assert seen[-1] > seen[0] + 50
    # At a fixed point of EM the model's expected symbol counts are the data's.
    counts = expected_counts(model, sequences)
    observed = torch.bincount(symbols.flatten(), minlength=S).float()
    torch.testing.assert_close(counts.emission_SH.sum(1), observed, rtol=1e-4, atol=1e-3)


def test_every_distribution_sums_to_one_also_for_states_never_visited() -> None:
    sequences = data(*ROWS)
    states = torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1], [1, -1, -1, -1], [0, 0, 0, -1]])
    counts = from_states(sequences, states, (P, H, S))
    assert counts.emission_SH[:, 2].sum() == 0  # the last state
    base = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    for smoothing in (0.0, 0.5):
        model = maximise(counts, base, smoothing)
        for x, dim in ((model.initial_PH, 1), (model.transition_HH, 1), (model.emission_SH, 0)):
            torch.testing.assert_close(x.sum(dim), torch.ones(x.shape[1 - dim]))
    assert model.emission_SH[:, 2].tolist() == pytest.approx(base.tolist())


def test_soft_counts_warn_of_nothing_and_leave_torchs_switch_as_it_was() -> None:
    """In a process of its own: torch warns but once, and not after anything has set the switch."""
    code = """if True:
        import torch
        from equipoise.methods.ctrlg.hmm import Sequences, expected_counts
        from tests.methods.ctrlg.test_hmm import random_hmm
        checks = torch.sparse.check_sparse_tensor_invariants
        one = torch.tensor([1])
        data = Sequences(torch.tensor([[0, 1]]), 2 * one, 0 * one, one.float(), torch.tensor([[[0, 2], [1, 3]]]))
        expected_counts(random_hmm(0), data, 0.5)
        assert not checks.is_enabled()
        with checks(True):
            expected_counts(random_hmm(0), data, 0.5)
            assert checks.is_enabled()
    """
    command = [sys.executable, "-W", "error:Sparse invariant", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_counts_of_known_states_are_counted_by_hand() -> None:
    sequences = data(([0, 1, 2], 0, 2.0), ([3, 4], 1, 1.0))
    counts = from_states(sequences, torch.tensor([[0, 1, -1], [2, 2, 2]]), (P, H, S))
    assert counts.initial_PH.tolist() == [[2, 0, 0], [0, 0, 1]]
    assert counts.transition_HH.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert counts.emission_SH.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_k_means_ends_where_every_centre_is_the_mean_of_what_is_nearest_to_it() -> None:
    points = torch.randn(300, 2, generator=torch.Generator().manual_seed(5))
    centres = k_means(points, 7, torch.Generator().manual_seed(0), rounds=60)
    distance = (points[:, None] - centres[None]).norm(dim=-1)
    cluster = nearest(points, centres)
    assert torch.equal(cluster, distance.argmin(1))
    for i in range(7):
        torch.testing.assert_close(points[cluster == i].mean(0), centres[i], rtol=1e-4, atol=1e-4)
    assert k_means(points[:2], 5, torch.Generator()).shape == (5, 2)  # fewer points than clusters


def test_a_saved_model_is_the_same_when_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = random_hmm(6)
    model.save(tmp_path / "m.safetensors", {"a": "b"}, extra=torch.arange(3))
    loaded, metadata, more = HMM.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.emission_SH, model.emission_SH) and torch.equal(loaded.initial_PH, model.initial_PH)
    assert (metadata, more["extra"].tolist()) == ({"a": "b"}, [0, 1, 2])
