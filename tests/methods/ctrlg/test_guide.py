"""Look-ahead and guidance against enumeration of every string, and, through the real sampler, against a model that is
the HMM itself."""

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from equipoise.methods.ctrlg.guide import CtrlGuide
from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import NEVER, TokenAutomaton, lift_constraint
from equipoise.policy.config import SamplingConfig
from equipoise.policy.graphs import Graphs
from equipoise.policy.load import Policy
from equipoise.policy.sample import sample
from tests.methods.ctrlg.oracle import accepts, constraint
from tests.methods.ctrlg.test_hmm import random_hmm
from tests.tiny import bare_policy, next_logprobs

WORDS = ("</s>", "bold", "loyal", "x", ".", "é")  # one token each; joined with spaces
END, V, T, H = 0, len(WORDS), 5, 3
PROMPTS = [[3], [4, 3]]
OCCUPATIONS = {"x": PROMPTS[0], "y": PROMPTS[1]}


def automaton(max_new_tokens: int = T, terms: str = "both") -> TokenAutomaton:
    """Two or three words more than the prefix, the full stop being one of its own: 'bold loyal .' and the like."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    classes = [("bold",), ("loyal",)] if terms == "both" else [("bold", "loyal")]
    prefixes = {name: f"The {name} was" for name in OCCUPATIONS}
    demand = constraint(*classes, words=(5, 7))
    return lift_constraint(tokenizer, (END,), demand, prefixes, max_new_tokens=max_new_tokens)


def valid(tokens: tuple[int, ...], limit: int = T) -> bool:
    """The constraint, in words: both terms, at least two and at most four words, a full stop the last of them, then the
    end, which the limit of tokens may cut off."""
    words = [WORDS[t] for t in tokens]
    if words[-1] == "</s>":
        words = words[:-1]
    elif len(words) < limit:
        return False
    if "</s>" in words or not 2 <= len(words) <= 4 or words[-1] != ".":
        return False
    return "bold" in words and "loyal" in words


def strings(steps: int = T) -> list[tuple[int, ...]]:
    """Every valid string of at most so many tokens."""
    return [s for n in range(1, steps + 1) for s in itertools.product(range(V), repeat=n) if valid(s, steps)]


def guide(model: HMM, *, guidance: float = 1.0, sampling: SamplingConfig | None = None) -> CtrlGuide:
    sampling = sampling or SamplingConfig(max_new_tokens=T)
    return CtrlGuide(
        automaton(), model, torch.arange(V), OCCUPATIONS, sampling, guidance, torch.device("cpu")
    )  # fmt: skip


def filtered(model: HMM, prompt: int, tokens: tuple[int, ...]) -> tuple[float, list[float]]:
    """Likelihood of the tokens, and the next state's distribution after them, by plain loops."""
    likelihood, belief = 1.0, model.initial_PH[prompt].tolist()
    for token in tokens:
        joint = [b * float(e) for b, e in zip(belief, model.emission_SH[token], strict=True)]
        likelihood *= sum(joint)
        after = [j / sum(joint) for j in joint]
        belief = [sum(a * float(model.transition_HH[i, j]) for i, a in enumerate(after)) for j in range(len(after))]
    return likelihood, belief


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("steps", [4, 5])  # the words' limit binds in five tokens, the tokens' in four
def test_the_bonus_is_the_probability_that_a_valid_sentence_follows(prompt: int, steps: int) -> None:
    model = random_hmm(0, 2, H, V)
    steering, machine = guide(model, sampling=SamplingConfig(max_new_tokens=steps)), automaton()
    everything = [s for n in range(1, steps + 1) for s in itertools.product(range(V), repeat=n)]
    assert strings(steps) == [s for s in everything if machine.run(s, "xy"[prompt], steps)]
    assert (steps == 4) == any(END not in s for s in strings(steps)), "cut off, where the words fill the limit"
    probability = {s: filtered(model, prompt, s)[0] for s in strings(steps)}
    compared = 0
    for done in [(), *(s for s in everything if len(s) < steps)]:
        state = machine.starts["xy"[prompt]]
        for token in done:
            state = machine.step(state, token)
        left = steps - 1 - len(done)
        if machine.is_done(state) or machine.need_F[state] >= NEVER:
            continue
        likelihood, belief = filtered(model, prompt, done)
        bonus = steering.bonus(torch.tensor([belief]), torch.tensor([state]), torch.tensor([left]))[0]
        for token in range(V):
            follows = sum(p for s, p in probability.items() if s[: len(done) + 1] == (*done, token))
            here = likelihood * sum(b * float(e) for b, e in zip(belief, model.emission_SH[token], strict=True))
            got = float(bonus[steering.place_V[token]].exp())
            assert got == pytest.approx(follows / here, rel=1e-4), (done, token)
            assert (got > 0) == (follows > 0), (done, token)
            compared += 1
    assert compared > 200


def test_in_the_free_shape_every_sentence_with_the_terms_can_be_written_cut_off_or_not() -> None:
    """The event `both`, as it is counted among the model's own sentences: most of them have not ended by the limit."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    demand = constraint(("bold",), ("loyal",), strict=False)
    machine = lift_constraint(tokenizer, (END,), demand, {"x": "The x was"}, max_new_tokens=T)
    sampled = [
        s
        for n in range(1, T + 1)
        for s in itertools.product(range(V), repeat=n)
        if END not in s[:-1] and (s[-1] == END or n == T)
    ]
    written = {s for s in sampled if machine.run(s, "x", T)}
    assert written == {s for s in sampled if {1, 2} <= set(s)}
    assert sum(s[-1] != END for s in written) > len(written) / 2
    policy, sampling = bare_policy(vocabulary=V, stops=(END,), seed=1), SamplingConfig(2.0, 1.0, T)
    after = cache(lambda begun: next_logprobs(policy.model, [*PROMPTS[0], *begun], 2.0))
    exact = sum(math.exp(sum(after(string[:n])[t] for n, t in enumerate(string))) for string in written)
    steering = CtrlGuide(
        machine, random_hmm(9, 1, H, V), torch.arange(V), {"x": PROMPTS[0]}, sampling, 1.0, torch.device("cpu")
    )
    rollout = sample(policy, [PROMPTS[0]] * 2000, sampling, torch.Generator().manual_seed(0), guide=steering)
    assert {tuple(c) for c in rollout.completions()} <= written and bool(rollout.report["valid"].all())
    weights = rollout.report["log_weight"].exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - exact) < 4.5 * error and error < 0.05 * exact


class HmmAsModel(torch.nn.Module):
    """A causal model whose next-token distribution is an HMM's. What it believes goes into the cache, as keys."""

    def __init__(self, model: HMM, prompts: list[list[int]]) -> None:
        super().__init__()
        self.hmm, self.prompts = model, [tuple(p) for p in prompts]
        self.config = LlamaConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        self.config._attn_implementation = "eager"
        self.nothing = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, input_ids, attention_mask, past_key_values, **_):  # type: ignore[no-untyped-def]
        if past_key_values.get_seq_length() == 0:
            lengths = attention_mask.sum(1).tolist()
            prompts = [tuple(row[:n]) for row, n in zip(input_ids.tolist(), lengths, strict=True)]
            belief = self.hmm.initial_PH[[self.prompts.index(p) for p in prompts]]
        else:
            before = past_key_values.layers[0].keys[:, 0, -1]
            joint = before * self.hmm.emission_SH[input_ids[:, 0]]
            belief = joint / joint.sum(-1, keepdim=True) @ self.hmm.transition_HH
        width = input_ids.shape[1]
        past_key_values.update(
            belief[:, None, None].expand(-1, 1, width, -1), belief[:, None, None].expand(-1, 1, width, -1), 0
        )
        logits = (belief @ self.hmm.emission_SH.T).log()
        return SimpleNamespace(logits=logits[:, None].expand(-1, width, -1))


def hmm_policy(model: HMM) -> Policy:
    policy = Policy.__new__(Policy)
    policy.model, policy.stop_ids, policy.device = HmmAsModel(model, PROMPTS), (END,), torch.device("cpu")
    policy.graphs = Graphs(policy.device, enabled=False)
    return policy


def test_where_the_model_is_the_hmm_every_sentence_has_the_same_weight_the_probability_of_the_constraint() -> None:
    model = random_hmm(7, 2, H, V)
    rollout = sample(
        hmm_policy(model),
        [PROMPTS[i % 2] for i in range(400)],
        SamplingConfig(max_new_tokens=T),
        torch.Generator().manual_seed(0),
        guide=guide(model),
    )
    completions = [tuple(c) for c in rollout.completions()]
    assert all(map(valid, completions)) and bool(rollout.report["valid"].all())
    for prompt in (0, 1):
        accepted = {s: filtered(model, prompt, s)[0] for s in strings()}
        p0 = sum(accepted.values())
        weights = rollout.report["log_weight"][prompt::2].exp()
        assert weights.tolist() == pytest.approx([p0] * 200, rel=1e-4)
        # And what is drawn is the model given the constraint.
        for string, p in accepted.items():
            share = completions[prompt::2].count(string) / 200
            assert abs(share - p / p0) < 4.5 * math.sqrt(p / p0 / 200) + 0.005


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_weights_estimate_the_share_of_valid_sentences_whatever_the_hmm_and_the_guidance(
    guidance: float, temperature: float
) -> None:
    policy = bare_policy(vocabulary=V, stops=(END,), seed=1)
    sampling = SamplingConfig(temperature, 1.0, T)
    exact = 0.0
    for string in strings():
        logprob = 0.0
        for n, token in enumerate(string):
            logprob += next_logprobs(policy.model, [*PROMPTS[1], *string[:n]], temperature)[token]
        exact += math.exp(logprob)
    steering = guide(random_hmm(9, 2, H, V), guidance=guidance, sampling=sampling)
    rollout = sample(policy, [PROMPTS[1]] * 3000, sampling, torch.Generator().manual_seed(0), guide=steering)
    assert all(valid(tuple(c)) for c in rollout.completions())
    weights = rollout.report["log_weight"].exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - exact) < 4.5 * error
    assert error < 0.2 * exact


def test_a_completion_depends_on_its_own_numbers_alone() -> None:
    policy, steering = bare_policy(vocabulary=V, stops=(END,), seed=2), guide(random_hmm(10, 2, H, V))
    sampling = SamplingConfig(max_new_tokens=T)
    prompts = [PROMPTS[i % 2] for i in range(12)]
    uniform = torch.rand(12, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = sample(policy, prompts, sampling, uniform_BT=uniform, guide=steering)
    for i in range(12):
        one = sample(policy, [prompts[i]], sampling, uniform_BT=uniform[i : i + 1], guide=steering)
        assert one.completions()[0] == whole.completions()[i]
        assert float(one.report["log_weight"][0]) == pytest.approx(float(whole.report["log_weight"][i]), abs=1e-5)
    again = sample(policy, prompts, sampling, uniform_BT=uniform, guide=steering)
    assert torch.equal(again.tokens_BT, whole.tokens_BT)


def test_numbers_of_the_hmm_that_vanish_forbid_nothing_and_allow_nothing() -> None:
    # An HMM that cannot emit "loyal" thinks every valid sentence impossible.
    model = random_hmm(11, 2, H, V)
    emission = model.emission_SH.clone()
    emission[WORDS.index("loyal")] = 0
    model = HMM(model.initial_PH, model.transition_HH, emission / emission.sum(0))
    rollout = sample(
        bare_policy(vocabulary=V, stops=(END,), seed=3),
        PROMPTS * 100,
        SamplingConfig(max_new_tokens=T),
        torch.Generator().manual_seed(0),
        guide=guide(model),
    )
    assert all(valid(tuple(c)) for c in rollout.completions())
    assert bool(rollout.report["log_weight"].isfinite().all())


def test_the_nucleus_is_taken_of_the_guided_distribution_and_keeps_every_sentence_valid() -> None:
    sampling = SamplingConfig(1.0, 0.5, T)
    steering = guide(random_hmm(12, 2, H, V), sampling=sampling)
    policy = bare_policy(vocabulary=V, stops=(END,), seed=4)
    rollout = sample(policy, PROMPTS * 200, sampling, torch.Generator().manual_seed(0), guide=steering)
    completions = {tuple(c) for c in rollout.completions()}
    assert all(map(valid, completions))
    assert len(completions) < len(strings()) / 2


def test_a_limit_of_exactly_the_tokens_needed_is_met() -> None:
    need = automaton().fewest_tokens("x")
    sampling = SamplingConfig(max_new_tokens=need)
    steering = guide(random_hmm(13, 2, H, V), sampling=sampling)
    policy = bare_policy(vocabulary=V, stops=(END,), seed=5)
    rollout = sample(policy, PROMPTS * 50, sampling, torch.Generator().manual_seed(0), guide=steering)
    assert all(valid(tuple(c), need) and len(c) == need for c in rollout.completions())


PARTS = ("</s>", "▁", "<0xC3>", "<0xA9>", "<0xC2>", "<0xAD>", ".", "é")


def in_parts() -> TokenAutomaton:
    """A vocabulary that cuts "é" and the soft hyphen; the second prefix has two words more, and the term in it."""
    core = Tokenizer(BPE({t: i for i, t in enumerate(PARTS)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    return lift_constraint(tokenizer, (END,), DEMAND, PREFIXES, max_new_tokens=T)


DEMAND = constraint(("é",), words=(3, 4))
PREFIXES = {"x": "It is", "y": "É is an x"}


def written(tokens: tuple[int, ...]) -> str | None:
    """The text of a completion that has ended, or was cut at the limit; None for any other, and for one that is no
    UTF-8."""
    body = [PARTS[t] for t in tokens]
    if body[-1] == "</s>":
        body = body[:-1]
    elif len(body) < T:
        return None
    if "</s>" in body:
        return None
    spelt = [bytes([int(p[3:5], 16)]) if p.startswith("<") else p.replace("▁", " ").encode() for p in body]
    try:
        return b"".join(spelt).decode()
    except UnicodeDecodeError:
        return None


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("occupation", ["x", "y"])
def test_every_occupation_starts_from_its_prefix_and_characters_in_parts_keep_the_weights_true(
    occupation: str, guidance: float
) -> None:
    machine, count = in_parts(), len(PARTS)
    policy = bare_policy(vocabulary=count, stops=(END,), seed=3)
    sampling = SamplingConfig(3.0, 1.0, T)
    prompt = OCCUPATIONS[occupation]
    exact = 0.0
    everything = [s for n in range(1, T + 1) for s in itertools.product(range(count), repeat=n)]
    accepted = set()
    for string in everything:
        text = written(string)
        if text is not None and accepts(DEMAND, PREFIXES[occupation] + text):
            accepted.add(string)
            logprob = 0.0
            for n, token in enumerate(string):
                logprob += next_logprobs(policy.model, [*prompt, *string[:n]], 3.0)[token]
            exact += math.exp(logprob)
    assert accepted == {s for s in everything if machine.run(s, occupation, T)}
    assert any(PARTS.index("<0xC3>") in s or PARTS.index("<0xAD>") in s for s in accepted)
    model = random_hmm(9, 2, H, count)
    steering = CtrlGuide(machine, model, torch.arange(count), OCCUPATIONS, sampling, guidance, torch.device("cpu"))
    rollout = sample(policy, [prompt] * 3000, sampling, torch.Generator().manual_seed(0), guide=steering)
    assert {tuple(c) for c in rollout.completions()} <= accepted and bool(rollout.report["valid"].all())
    weights = rollout.report["log_weight"].exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - exact) < 4.5 * error
    assert error < 0.3 * exact


def test_a_prompt_of_no_occupation_is_not_guided() -> None:
    with pytest.raises(KeyError):
        guide(random_hmm(0, 2, H, V)).initial([[3, 3]])
