"""The writer from end to end on a tiny random model over words: distilled, cached, compliant, with true weights."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.errors import UserError
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.ctrlg import CtrlG, CtrlGConfig, check_feasible, writer
from equipoise.methods.prompted import uniforms
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.load import Policy, load_for_generation
from equipoise.policy.prompt import prompt_ids, sentences_of
from equipoise.policy.sample import sample
from equipoise.protocol.task import PROTOCOL
from tests.tiny import pretend_graphs, words_folder

RAW = PROTOCOL.prompt("raw")
T = 12
SMALL = CtrlGConfig(candidates=1, hidden_states=8, distil_sentences=600, em_passes=3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = words_folder(tmp_path_factory.mktemp("model"))
    return load_for_generation(PolicyConfig(str(folder), dtype="float32"), RAW)


def make(policy: Policy, cache: Path, config: CtrlGConfig = SMALL, **changes: Any) -> CtrlG:
    prompts = {o: prompt_ids(policy.tokenizer, RAW, o, PROTOCOL) for o in PROTOCOL.names}
    sampling = SamplingConfig(1.0, 1.0, changes.pop("max_new_tokens", T))
    return CtrlG(
        policy, prompts, sampling, config, cache, weights="tiny", task=changes.pop("task", PROTOCOL), **changes
    )


def quiet(_: str) -> None:
    pass


def test_every_sentence_complies_and_the_weights_agree_with_free_samples(policy: Policy, tmp_path: Path) -> None:
    write = make(policy, tmp_path)
    facts = write.prepare(quiet)
    assert not facts["cached"] and facts["sentences"] == 600 and facts["generated_tokens"] > 600
    keys = all_keys(100, PROTOCOL.names)
    written = write(keys, uniforms(0, keys, T))
    assert all(map(PROTOCOL.strict, written.texts))
    assert len(set(written.texts)) > 1900
    assert all(text.startswith(f"The {key.occupation} was") for key, text in zip(keys, written.texts, strict=True))
    weights = torch.tensor(written.log_weights, dtype=torch.float64).exp()
    share, error = float(weights.mean()), float(weights.std()) / math.sqrt(len(weights))
    prompts = [write.prompts[key.occupation] for key in keys]
    free = sample(policy, prompts * 8, write.sampling, torch.Generator().manual_seed(1))
    # The event is the protocol's own, sentences that the limit cuts counted. No special token is written within one.
    texts = sentences_of(policy.tokenizer, free, [key.occupation for key in keys * 8], PROTOCOL)
    unknown = policy.tokenizer.unk_token_id
    accepted = [PROTOCOL.strict(t) and unknown not in c for t, c in zip(texts, free.completions(), strict=True)]
    assert accepted == [
        write.automaton.run(c, key.occupation, T) for c, key in zip(free.completions(), keys * 8, strict=True)
    ]
    rate = sum(accepted) / len(accepted)
    assert abs(share - rate) < 4.5 * math.hypot(error, math.sqrt(rate * (1 - rate) / len(accepted)))
    assert rate > 0.005


def test_a_second_writer_finds_the_hmm_and_writes_the_same(policy: Policy, tmp_path: Path) -> None:
    first, second = make(policy, tmp_path), make(policy, tmp_path)
    keys = all_keys(2, PROTOCOL.names)
    first.prepare(quiet)
    whole = first(keys, uniforms(0, keys, T))
    facts = second.prepare(quiet)
    assert facts["cached"] and facts["generated_tokens"] == 0
    parts = [second([key], uniforms(0, [key], T)) for key in keys]
    assert [part.texts[0] for part in parts] == whole.texts
    assert [part.log_weights[0] for part in parts] == pytest.approx(whole.log_weights, abs=1e-4)
    assert sum(part.tokens for part in parts) == whole.tokens


def test_a_file_that_was_cut_short_or_made_otherwise_is_not_used(policy: Policy, tmp_path: Path) -> None:
    make(policy, tmp_path).prepare(quiet)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert not make(policy, tmp_path).prepare(quiet)["cached"]
    other = dataclasses.replace(SMALL, hidden_states=9)
    assert not make(policy, tmp_path, other).prepare(quiet)["cached"]
    assert len(list(tmp_path.iterdir())) == 2
    # The constraint is no part of the HMM, unless it tells tokens apart that were one to it.
    assert make(policy, tmp_path, dataclasses.replace(other, min_words=9)).prepare(quiet)["cached"]


@pytest.mark.parametrize("terms", ["both", "any"])
def test_other_bounds_and_terms_are_kept(policy: Policy, tmp_path: Path, terms: Any) -> None:
    config = dataclasses.replace(SMALL, terms=terms, min_words=6, max_words=7)
    write = make(policy, tmp_path, config)
    write.prepare(quiet)
    keys = all_keys(5, PROTOCOL.names)
    texts = write(keys, uniforms(0, keys, T)).texts
    matches = [PROTOCOL.match(text) for text in texts]
    assert {len(text.split()) for text in texts} == {6, 7}
    assert all(m.complete if terms == "both" else m.counts for m in matches)
    assert terms == "both" or not all(m.complete for m in matches)


def test_both_decoders_write_the_same(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make(policy, tmp_path)
    plain.prepare(quiet)
    keys = [Key(o, n) for n in (1, 2) for o in PROTOCOL.names]
    expected = plain(keys, uniforms(3, keys, T))
    fast_policy = load_for_generation(PolicyConfig(policy.source.path_or_id, dtype="float32"), RAW)  # type: ignore[union-attr]
    fast = make(pretend_graphs(fast_policy, monkeypatch), tmp_path)
    assert fast.prepare(quiet)["cached"]
    got = fast(keys, uniforms(3, keys, T))
    assert got.texts == expected.texts
    assert got.log_weights == pytest.approx(expected.log_weights, abs=1e-3)
    # Distilling through the static decoder gives the same model too.
    anew = make(fast_policy, tmp_path / "other")
    made = anew.prepare(quiet)
    assert made["held_out_nats_per_token"] == pytest.approx(plain.prepare(quiet)["held_out_nats_per_token"], abs=0.02)


def test_what_cannot_be_met_is_refused_before_anything_is_sampled(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "sample_freely", lambda *_: pytest.fail("sampled"))
    for config, sampling, reason in (
        (CtrlGConfig(min_words=1, max_words=2), SamplingConfig(max_new_tokens=T), "max-words 2 is too few"),
        (CtrlGConfig(), SamplingConfig(max_new_tokens=4), "max-new-tokens 4 is too few"),
        (CtrlGConfig(), SamplingConfig(0.0, max_new_tokens=T), "temperature 0"),
    ):
        with pytest.raises(UserError, match=reason):
            check_feasible(policy.tokenizer, RAW, sampling, config, PROTOCOL)
    check_feasible(policy.tokenizer, RAW, SamplingConfig(max_new_tokens=T), CtrlGConfig(), PROTOCOL)
    with pytest.raises(UserError, match="max-new-tokens 4 is too few"):
        make(policy, tmp_path, max_new_tokens=4)
    assert not list(tmp_path.iterdir())


def test_of_several_candidates_one_is_kept_in_proportion_to_its_weight(policy: Policy, tmp_path: Path) -> None:
    weights = torch.tensor([[0.1, 0.2, 0.6, 0.1]], dtype=torch.float64)
    n = 20_000
    uniform = torch.rand(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen, log_mean = writer._choose((weights * 1e-5).log().expand(n, -1), uniform)
    shares = torch.bincount(chosen, minlength=4) / n
    assert shares.tolist() == pytest.approx(weights[0].tolist(), abs=0.015)  # four standard errors
    assert log_mean.exp().tolist() == pytest.approx([0.25e-5] * n)
    keys = all_keys(20, PROTOCOL.names)
    one = make(policy, tmp_path)
    one.prepare(quiet)
    few = make(policy, tmp_path, dataclasses.replace(SMALL, candidates=4))
    assert few.prepare(quiet)["cached"]
    singles, chosen_of_four = one(keys, uniforms(0, keys, T)), few(keys, uniforms(0, keys, T))
    assert all(map(PROTOCOL.strict, chosen_of_four.texts))
    assert chosen_of_four.tokens > 3 * singles.tokens
    # Closer to the model's own compliant sentences: weights vary less.
    spread = [torch.tensor(w.log_weights, dtype=torch.float64).std() for w in (singles, chosen_of_four)]
    assert spread[1] < 0.8 * spread[0]
