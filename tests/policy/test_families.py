"""Every family of models: what is sampled and scored are the numbers of the plain model, one row by itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.errors import UserError
from equipoise.policy.attention import TRIE_ATTENTION, trie_attention
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.draw import weights
from equipoise.policy.families import window
from equipoise.policy.likelihood import completion_logprobs, kl_to_reference
from equipoise.policy.load import Policy, load_policy, pick_device
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import packs, score
from equipoise.policy.source import load_config, resolve
from equipoise.policy.verify import settle
from equipoise.policy.ways import Ways
from tests.default import PROMPTS
from tests.families import FAMILIES, WINDOW, family_folder
from tests.tiny import TOKENS, bare_policy, perturb, pretend_graphs, tiny_tokenizer

FEW = (
    "mpt",
    "bloom",
    "falcon-alibi",
    "gpt_neo",
    "gpt-oss",
    "mistral",
    "qwen2-window",
    "mixtral",
    "mamba",
    "bamba",
    "llama",
)
EVERY = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in FAMILIES]
NEW = 10
LENGTHS = (20, 27, 27, 24, 5)  # of the prompts: with what is written, some are shorter than a window, most longer


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, len(TOKENS), (n,), generator=generator).tolist() for n in LENGTHS]


def loaded(folder: Path, **options: Any) -> Policy:
    policy = load_policy(
        PolicyConfig(**{"model": str(folder), "dtype": "float32", "device": "cpu", "lora_rank": 4, **options}),
        PROMPTS["raw"],
    )
    policy.stop_ids = tuple(range(2, 60))  # so many that some rows end early
    return policy


@torch.no_grad()
def plain_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """(V,) after `tokens`, from a pass that is given nothing else."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


def plain_logprobs(model: Any, rollout: Rollout) -> torch.Tensor:
    """(N,) a pass for every single token."""
    return torch.stack(
        [
            plain_logits(model, [*prompt, *completion[:t]]).double().log_softmax(-1)[completion[t]]
            for prompt, completion in zip(rollout.prompts, rollout.completions(), strict=True)
            for t in range(len(completion))
        ]
    ).float()


class Notes:
    """A guide that draws as the sampler does and notes the log-probabilities it had."""

    def open(self, rows: int) -> "Notes":
        self.noted = torch.zeros(rows, NEW)
        return self

    def start(self, prompts: Any) -> None:
        self.step = 0

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        cumulative = weights(logits, SamplingConfig()).double().cumsum(-1)
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:]).squeeze(-1)
        self.noted[rows, self.step] = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        self.step += 1
        return token

    def report(self) -> dict[str, torch.Tensor]:
        return {"noted": self.noted}


@pytest.mark.parametrize("name", EVERY)
def test_sampler_and_scorer_have_the_numbers_of_the_plain_model(name: str, tmp_path: Path) -> None:
    policy = loaded(family_folder(name, tmp_path))
    said: list[str] = []
    settle(policy, prompts(), NEW, said.append)
    perturb(policy, 0.05)
    twice = [*prompts(), *prompts()]
    uniform = torch.rand(len(twice), NEW, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rollout = sample(policy, twice, SamplingConfig(max_new_tokens=NEW), uniform_BT=uniform, guide=Notes())
    assert len({int(n) for n in rollout.lengths_B}) > 1, "no row ends early"
    expected = plain_logprobs(policy.model, rollout)
    assert (rollout.report["noted"][rollout.mask_BT] - expected).abs().max() < 1e-4
    for packed in (True, False):
        assert (score(policy, rollout, 1.0, packed=packed).logprobs - expected).abs().max() < 1e-4
    with policy.as_reference() as model:
        reference = plain_logprobs(model, rollout)
    assert (score(policy, rollout, 1.0, packed=True, reference=True).logprobs - reference).abs().max() < 1e-4
    sums = [part.sum() for part in (expected - reference).split(rollout.lengths_B.tolist())]
    torch.testing.assert_close(
        kl_to_reference(policy, [rollout], SamplingConfig(), 4).float(), torch.stack(sums), atol=5e-4, rtol=0
    )
    # Texts longer than any that was compared at load.
    longer = [row + row for row in prompts()]
    found = completion_logprobs(policy, longer, rollout.completions()[: len(longer)], 3)
    whole = Rollout(longer, rollout.tokens_BT[:5], rollout.lengths_B[:5], rollout.finished_B[:5])
    sums = [part.sum() for part in plain_logprobs(policy.model, whole).split(whole.lengths_B.tolist())]
    assert found == pytest.approx([float(x) for x in sums], abs=5e-4)
    assert policy.ways.fast or any("the plain way is taken everywhere" in line for line in said)


@pytest.mark.parametrize("name", ["mpt", "gpt_neo", "mistral", "mamba", "bamba"])
def test_gradients_of_the_plain_way_are_those_of_single_rows(name: str, tmp_path: Path) -> None:
    family_folder(name, tmp_path)
    found = []
    for alone in (True, False):
        torch.manual_seed(0)
        policy = perturb(loaded(tmp_path), 0.05)
        policy.ways = Ways(packed=False, padded=False, shared=False, cached=False)
        rollout = Rollout(prompts(), torch.randint(3, 99, (5, 4)), torch.tensor([4, 2, 4, 1, 3]), torch.ones(5).bool())
        for rows in torch.arange(5).split(1) if alone else [torch.arange(5)]:
            scores = score(policy, rollout.select(rows), 0.8, packed=True)
            (scores.logprobs.square().sum() + scores.entropies.sum() + scores.values.square().sum()).backward()
        found.append({n: p.grad for n, p in policy.trained().items()})
    for key, gradient in found[0].items():
        assert gradient is not None and found[1][key] is not None, key
        assert float((gradient - found[1][key]).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, key


@pytest.mark.parametrize("name", ["mistral", "gpt_neo", "qwen2-window", "gpt-oss"])
def test_a_window_that_holds_every_text_leaves_the_fast_way(name: str, tmp_path: Path) -> None:
    wide = {"gpt_neo": "window_size"}.get(name, "sliding_window")
    policy = loaded(family_folder(name, tmp_path, **{wide: 400}))
    settle(policy, prompts(), NEW, lambda line: None)
    assert policy.ways.packed and policy.ways.shared and policy.ways.tokens <= 400
    narrow = loaded(family_folder(name, tmp_path / "narrow"))
    settle(narrow, prompts(), NEW, lambda line: None)
    ours = narrow.model.config._attn_implementation == TRIE_ATTENTION
    assert narrow.ways.packed is ours and not narrow.ways.shared  # transformers' cache counts padding into the window
    assert max(LENGTHS) > WINDOW


@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3"])
def test_our_attention_and_its_static_cache_keep_to_windows_that_end_within_a_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert min(n for n in LENGTHS if n > 5) > WINDOW
    policy = pretend_graphs(loaded(family_folder(name, tmp_path)), monkeypatch)
    settle(policy, prompts(), NEW, lambda line: None)
    assert policy.ways.packed and policy.ways.shared
    from equipoise.policy import decode

    forgetful = pretend_graphs(loaded(tmp_path), monkeypatch)
    monkeypatch.setattr(decode, "window", lambda config: float("inf"))
    settle(forgetful, prompts(), NEW, lambda line: None)
    assert not forgetful.ways.shared


def test_in_bfloat16_a_difference_of_attention_is_found_and_rounding_is_not_taken_for_one(tmp_path: Path) -> None:
    for name, fast in (("mpt", False), ("gpt-oss", False), ("gpt2", True), ("llama", True)):
        policy = loaded(family_folder(name, tmp_path / name), dtype="bfloat16")
        before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
        settle(policy, prompts(), NEW, lambda line: None)
        assert policy.ways.fast is fast, name
        assert policy.dtype == torch.bfloat16
        for n, p in policy.model.named_parameters():
            assert p.dtype == torch.bfloat16 and torch.equal(p, before[n]), n


def test_what_is_found_takes_no_random_number_and_leaves_no_trace(tmp_path: Path) -> None:
    policy = loaded(family_folder("llama", tmp_path))
    state = torch.get_rng_state()
    settle(policy, prompts(), NEW, lambda line: pytest.fail(line))
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.ways == Ways() and not policy.decoders and all(p.grad is None for p in policy.trained().values())


def test_where_attention_is_ours_the_static_decoder_is_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = pretend_graphs(bare_policy(attention=TRIE_ATTENTION), monkeypatch)
    policy.model.config.sliding_window = 3  # as a model would have it whose layers see less: ours sees everything
    settle(policy, [[1, 2, 3, 4, 1], [2, 3]], 4, lambda line: None)
    assert policy.ways.shared and policy.ways.tokens < 100
    broken = pretend_graphs(bare_policy(attention=TRIE_ATTENTION), monkeypatch)
    from equipoise.policy.decode import StaticDecoder

    run = StaticDecoder._run
    monkeypatch.setattr(StaticDecoder, "_run", lambda self, **inputs: 1.5 * run(self, **inputs))
    settle(broken, [[1, 2, 3, 4, 1], [2, 3]], 4, lambda line: None)
    assert not broken.ways.shared and broken.ways.packed


def test_packs_beyond_the_position_table_are_cut_and_score_the_same(tmp_path: Path) -> None:
    policy = loaded(family_folder("gptj", tmp_path, n_positions=64))
    settle(policy, prompts(), NEW, lambda line: None)
    assert policy.ways.packed
    # Since transformers 5.24 GPT-J looks positions up one by one, and has no such bound.
    policy.ways = policy.ways._replace(nodes=min(policy.ways.nodes, 64))
    rows = 40
    rollout = Rollout(
        [p for _ in range(8) for p in prompts()],
        torch.randint(3, 99, (rows, NEW)),
        torch.full((rows,), NEW),
        torch.ones(rows).bool(),
    )
    groups = packs(policy, rollout)
    assert groups is not None and len(groups) > 1
    expected = plain_logprobs(policy.model, rollout)
    assert (score(policy, rollout, 1.0, packed=True).logprobs - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gemma3", "reads images or sound"),
        ("qwen2_vl", "reads images or sound"),
        ("qwen3_5", "reads images or sound"),
        ("phi4_multimodal", "reads images or sound"),
        ("t5", "encoder and a decoder"),
        ("bert", "causal LM"),
        ("vit", "causal LM"),
    ],
)
def test_what_is_no_language_model_alone_is_refused_before_weights_load(
    kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=says) as refusal:
        loaded(tmp_path)
    assert "\n" not in str(refusal.value) and kind in str(refusal.value)
    with pytest.raises(UserError, match=says):
        load_config(resolve(str(tmp_path)))


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    policy = loaded(family_folder("llama", tmp_path))
    forward = policy.model.get_base_model().model.forward

    def looking_ahead(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.flip(1)
        return out

    policy.model.get_base_model().model.forward = looking_ahead
    with pytest.raises(UserError, match="no causal language model"):
        settle(policy, prompts(), NEW, lambda line: None)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 5.0, 6.0, 7.0], "original_max_position_embeddings": max(LENGTHS) + NEW, "factor": 8.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_where_rotary_frequencies_change_texts_end_and_longer_rows_are_computed_plainly(
    name: str, tmp_path: Path
) -> None:
    wide = {"sliding_window": 400, "original_max_position_embeddings": max(LENGTHS) + NEW} if name == "phi3" else {}
    policy = loaded(family_folder(name, tmp_path, rope_parameters=LONGROPE, **wide))
    with pytest.raises(UserError, match=rf"more than the {max(LENGTHS) + NEW} up to .* {name} .*rotary") as refusal:
        settle(policy, prompts(), NEW + 1)
    assert "\n" not in str(refusal.value)
    settle(policy, prompts(), NEW, lambda line: None)
    assert policy.ways.packed and policy.ways.shared and policy.ways.tokens <= max(LENGTHS) + NEW
    # One row beyond the limit, the others before it: each has the numbers that it has by itself.
    rows = [prompts()[0] * 2, *prompts()[1:]]
    rollout = Rollout(rows, torch.randint(3, 99, (5, NEW)), torch.full((5,), NEW), torch.ones(5).bool())
    assert len(rows[0]) + NEW > max(LENGTHS) + NEW
    expected = plain_logprobs(policy.model, rollout)
    for packed in (True, False):
        assert (score(policy, rollout, 1.0, packed=packed).logprobs - expected).abs().max() < 1e-4


def test_prompts_that_the_model_cannot_read_are_refused_in_one_line(tmp_path: Path) -> None:
    policy = loaded(family_folder("gpt2", tmp_path, n_positions=30))
    with pytest.raises(UserError, match=r"27 tokens and 10 new ones are more than the 30 positions"):
        settle(policy, prompts(), NEW)
    with pytest.raises(UserError, match=rf"token id 999, .* has {len(TOKENS)} rows"):
        settle(policy, [[5, 999]], NEW)
    policy.stop_ids = (5000,)
    with pytest.raises(UserError, match="no token that ends a text"):
        settle(policy, [[5, 9]], NEW)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_devices_other_than_cpu_and_cuda_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not supported.*use cpu or cuda"):
        pick_device(name)


def test_a_device_by_a_number_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'cpu:3' is not there.*use cpu"):
        pick_device("cpu:3")
    assert pick_device("cpu:0").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"'cuda:2' is not there.*cuda:1"):
        pick_device("cuda:2")
    assert pick_device("cuda:1").index == 1


@pytest.mark.parametrize("name", ["mixtral", "mamba", "llama4-text"])
def test_what_gets_no_adapter_is_said(name: str, tmp_path: Path) -> None:
    policy = loaded(family_folder(name, tmp_path))
    (note,) = policy.notices
    assert "LoRA trains" in note and "stay as they are" in note
    assert all("experts" not in n for n in policy.trained())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in note


def test_a_window_is_a_number_of_tokens_and_a_pattern_is_none() -> None:
    config = AutoConfig.for_model("gemma3_text", sliding_window=512)
    assert any("pattern" in name for name in config.to_dict()) and window(config) == 512


@pytest.mark.parametrize(("name", "kept"), [("qwen3-moe", True), ("phi", True), ("gpt_neox", False)])
def test_our_attention_is_kept_where_its_numbers_are_the_models_own(
    name: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loaded(family_folder(name, tmp_path))
    assert policy.unproven and policy.model.config._attn_implementation == TRIE_ATTENTION
    pretend_graphs(policy, monkeypatch)
    settle(policy, prompts(), NEW, lambda line: None)
    assert policy.ways.packed and policy.ways.shared
    assert (policy.model.config._attn_implementation == TRIE_ATTENTION) is kept and policy.graphs.enabled is kept


def test_attention_with_sinks_is_left_to_the_model(tmp_path: Path) -> None:
    policy = loaded(family_folder("gpt-oss", tmp_path))
    assert not policy.unproven and policy.model.config._attn_implementation != TRIE_ATTENTION
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="s_aux"):
        trie_attention(torch.nn.Identity(), x, x, x, None, paths_RL=x, places_M=x, s_aux=x)


def test_a_model_that_looks_at_values_on_the_host_is_computed_without_graphs_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = pretend_graphs(loaded(family_folder("olmoe", tmp_path)), monkeypatch)

    record_really = policy.graphs.record

    def record(*arguments: Any) -> Any:
        if policy.graphs.enabled:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return record_really(*arguments)

    monkeypatch.setattr(policy.graphs, "record", record)
    said: list[str] = []
    settle(policy, prompts(), NEW, said.append)
    assert not policy.graphs.enabled and policy.ways.fast
    (line,) = [line for line in said if "CUDA graphs" in line]
    assert line == (
        "passes of olmoe models cannot be recorded as CUDA graphs (operation not permitted when stream is capturing): "
        "every kernel is launched by itself"
    )
