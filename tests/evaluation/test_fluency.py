"""A judge's numbers are those of one row at a time, however texts are batched or packed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, GPTJConfig, GPTJForCausalLM

from equipoise.errors import UserError
from equipoise.evaluation import fluency
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.fluency import Scorer, acceptable_label, full_name, judge
from equipoise.policy.source import resolve
from tests.families import family_folder
from tests.tiny import WORDS, next_logprobs, tiny_model, tiny_tokenizer, words_folder

TEXTS = [
    "The nurse was bold and caring .",
    "The nurse was bold .",
    "The pilot was a friendly pilot and a loyal pilot and a bold pilot .",
    "The nurse was bold and caring and friendly .",
    "The",
    "",
    "in a",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("judge") / "tiny")


@pytest.fixture(scope="module")
def gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge whose attention is its own, and whose positions end early."""
    folder = words_folder(tmp_path_factory.mktemp("judge") / "gptj")
    torch.manual_seed(1)
    config = GPTJConfig(
        vocab_size=len(WORDS),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=12,
        rotary_dim=8,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.5,
    )
    GPTJForCausalLM(config).save_pretrained(folder)
    return folder


def by_hand(scorer: Scorer, text: str) -> tuple[float, int]:
    ids = scorer.tokenizer(text)["input_ids"][: scorer.longest] if text else []
    if len(ids) < 2:
        return float("nan"), 0
    losses = [-next_logprobs(scorer.model, ids[:i])[ids[i]] for i in range(1, len(ids))]
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [8, 40, 4096])
def test_packed_and_padded_scores_are_those_of_one_row_at_a_time(llama: Path, packed: bool, budget: int) -> None:
    scorer = Scorer(resolve(str(llama)), "cpu", "float32", packed)
    assert scorer.packed is packed
    scorer.budget = budget
    nll, tokens, cut = scorer(TEXTS)
    expected = [by_hand(scorer, text) for text in TEXTS]
    np.testing.assert_allclose(nll, [x for x, _ in expected], rtol=1e-5)
    assert tokens.tolist() == [n for _, n in expected] and cut == 0


@pytest.mark.parametrize("packed", [True, False])
def test_a_judge_whose_rotary_frequencies_change_reads_every_text_as_one_by_itself(
    tmp_path: Path, packed: bool
) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0], "original_max_position_embeddings": 20, "factor": 8.0,
    }  # fmt: skip
    scorer = Scorer(resolve(str(family_folder("llama", tmp_path, rope_parameters=rope))), "cpu", "float32", packed)
    assert scorer.packed is packed
    nll, tokens, _ = scorer(TEXTS)
    assert min(n for n in tokens if n) < 20 < max(tokens)
    for text, found in zip(TEXTS, nll, strict=True):
        ids = scorer.tokenizer(text)["input_ids"] if text else []
        if len(ids) > 1:
            with torch.no_grad():
                logprobs = scorer.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            alone = -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()
            assert found == pytest.approx(float(alone), rel=1e-5), text


def test_a_judge_that_has_no_embedding_for_a_token_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = family_folder("llama", tmp_path, vocab_size=50)
    with pytest.raises(
        UserError, match=r"gives a text the token id \d+, and the model's embedding has 50 rows"
    ) as caught:
        Scorer(resolve(str(folder)), "cpu", "float32")(TEXTS)
    assert "\n" not in str(caught.value)


def test_other_architectures_are_padded_and_long_texts_cut_and_counted(gptj: Path) -> None:
    scorer = Scorer(resolve(str(gptj)), "cpu", "float32")
    assert not scorer.packed and scorer.longest == 12
    nll, tokens, cut = scorer(TEXTS)
    assert cut == 1 and tokens[2] == 11
    np.testing.assert_allclose(nll, [by_hand(scorer, text)[0] for text in TEXTS], rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2-window", "mpt", "bloom", "gpt_neo"])
def test_a_judge_with_distances_or_a_window_scores_as_it_does_one_row_at_a_time(name: str, tmp_path: Path) -> None:
    """qwen2 is packed otherwise, and all texts here reach beyond the window."""
    scorer = Scorer(resolve(str(family_folder(name, tmp_path))), "cpu", "float32")
    texts = ["The nurse was bold and caring .", "The nurse was bold .", "The pilot was a friendly pilot ."]
    np.testing.assert_allclose(scorer(texts)[0], [by_hand(scorer, text)[0] for text in texts], rtol=1e-5)


def test_a_masked_language_model_is_no_judge(tmp_path: Path) -> None:
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"\(bert\) as a causal LM"):
        Scorer(resolve(str(tmp_path)), "cpu", "float32")


def test_bytes_that_are_no_text_and_long_ones_are_scored(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scorer = Scorer(resolve(str(tmp_path)), "cpu", "float32")
    nll, tokens, cut = scorer(["a\ud800b", "\x00\x00\x00", "🙂\u202e<b>", "x" * 10_000])
    assert np.isfinite(nll).all() and cut == 1 and tokens[3] == 127


def test_the_progress_reaches_the_number_of_scored_texts(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    Scorer(resolve(str(llama)), "cpu", "float32")(TEXTS, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)


def test_equal_texts_are_scored_once_and_every_row_gets_its_number(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[str]] = []
    plain = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, texts, *_: scored.append(list(texts)) or plain(self, texts))
    config = EvaluateConfig(judge=(str(llama), str(llama)), dtype="float32", device="cpu")
    judged = judge(config, [TEXTS[0], TEXTS[1], TEXTS[0]], lambda line: None, lambda done, total: None)
    assert scored == [TEXTS[:2]] * 2
    assert [j.name for j in judged.judges] == ["tiny", "tiny (2)"]
    assert judged.scores is not None
    nll = judged.scores["tiny"].nll_N
    assert nll[0] == nll[2] != nll[1] and len(nll) == 3


def test_a_judge_with_broken_weights_is_refused(tmp_path: Path) -> None:
    folder = words_folder(tmp_path / "nan")
    scorer = Scorer(resolve(str(folder)), "cpu", "float32")
    torch.nn.init.constant_(scorer.model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        scorer(TEXTS)


def test_the_acceptable_label_is_asked_for_where_it_is_not_plain() -> None:
    assert acceptable_label({0: "unacceptable", 1: "acceptable"}, None) == 1
    assert acceptable_label({0: "acceptable", 1: "unacceptable"}, None) == 0
    assert acceptable_label({0: "LABEL_0", 1: "LABEL_1"}, "LABEL_0") == 0
    assert acceptable_label({0: "LABEL_0", 1: "LABEL_1"}, "1") == 1
    for given in (None, "2", "good"):
        with pytest.raises(UserError, match="LABEL_0, LABEL_1"):
            acceptable_label({0: "LABEL_0", 1: "LABEL_1"}, given)


def test_a_classifier_says_of_each_row_whether_it_is_acceptable(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=1, id2label={0: "unacceptable", 1: "acceptable"}, initializer_range=0.8,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(tmp_path)
    options = EvaluateConfig(fluency=False, acceptability=str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(UserError, match=r"tokenizer has no padding token.*pad_token"):
        judge(options, TEXTS, lambda line: None, lambda done, total: None)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(tmp_path)
    texts = [*TEXTS[:4], "", TEXTS[0], *(f"The {word} was a" for word in WORDS[12:40])]
    judged = judge(options, texts, lambda line: None, lambda done, total: None)
    assert judged.acceptable is not None
    (flags,) = judged.acceptable.values()
    with torch.no_grad():
        plain = [float(model(**tokenizer(t, return_tensors="pt")).logits.argmax(-1)) if t else 0.0 for t in texts]
    assert flags.tolist() == plain and 0 < sum(plain) < len(plain) - 1
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"classifier .* token id {len(WORDS)}, .* {len(WORDS)} rows"):
        judge(options, ["The zzz"], lambda line: None, lambda done, total: None)


def test_the_bundled_judges_caveat_is_recorded_and_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __init__(self, *_: object) -> None:
            self.longest = 512

        def __call__(self, texts: list[str], *_: object) -> tuple[np.ndarray, np.ndarray, int]:
            return np.ones(len(texts)), np.ones(len(texts), dtype=int), 0

    monkeypatch.setattr(fluency, "Scorer", Silent)
    judged = judge(EvaluateConfig(), ["a b"], lambda line: None, lambda done, total: None)
    assert [j.name for j in judged.judges] == ["bundled"]
    assert "share a family" in judged.judges[0].caveat and "--judge" in judged.notices[0]


def test_gpt2_is_understood_by_its_short_name() -> None:
    source = resolve(full_name("gpt2"))
    assert source.kind == "hub" and fluency._name(source, []) == "gpt2"
    assert full_name("bundled") == "bundled"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"acceptability": "/nowhere"},
            r"--acceptability /nowhere cannot be had \(.*\): give all-mpnet-base-v2, or a cl",
        ),
        ({"acceptability": "all-mpnet-base-v3"}, r"--acceptability all-mpnet-base-v3 cannot be had .*: give all-mpnet"),
        ({"acceptability": "all-mpnet-base-v2", "acceptable_label": "x"}, "--acceptable-label x .* has no labels"),
    ],
)
def test_what_cannot_tell_acceptable_sentences_is_refused_before_any_judge_reads(
    llama: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], says: str
) -> None:
    monkeypatch.setattr(fluency, "_scorer", lambda *_: pytest.fail("a judge was loaded"))
    config = EvaluateConfig(judge=(str(llama),), device="cpu", **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=says):
        judge(config, ["The nurse was kind."], lambda _: None, lambda *_: None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"acceptability": " "}, "--acceptability is empty"),
        ({"acceptable_label": "x"}, "--acceptable-label x .* is none"),
    ],
)
def test_options_of_acceptability_that_mean_nothing_are_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EvaluateConfig(**given)  # type: ignore[arg-type]
