"""Learning from a file of sentences: what is read, how it is spelt, and what is minimised."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.errors import UserError
from equipoise.learning import supervised
from equipoise.learning.optimizer import MasterAdam
from equipoise.learning.supervised import (
    Example,
    Supervision,
    as_rollout,
    cross_entropy,
    examples_of,
    read_rows,
    supervise,
)
from equipoise.policy.config import PolicyConfig
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import prompt_ids, sentences_of
from equipoise.policy.source import Source, load_tokenizer
from equipoise.ppo.state import State
from equipoise.ppo.train import train
from equipoise.ppo.training import Training, new_optimizer
from equipoise.ppo.warm_start import read
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.ranks import ALONE
from tests.default import OCCUPATIONS, PROMPTS
from tests.ppo.small import small_config
from tests.tiny import next_logprobs, tiny_folder

GOOD = "The nurse was confident and caring and loyal in a pilot ."  # eleven words of the tiny vocabulary
ROWS = [
    ("nurse", GOOD),
    ("nurse", GOOD),
    ("chef", "The chef was bold in a caring and helpful pilot ."),
    ("chef", "The chef was bold ."),  # one class
    ("chef", "The chef was bold and caring ."),  # six words
    ("chef", "A chef was bold in a caring and helpful pilot ."),  # not how a sentence begins
    ("cook", "The cook was bold in a caring and helpful pilot ."),  # no such occupation
    ("nurse", "The nurse was bold . in a caring and helpful pilot ."),  # goes on after a stop
]


def write(path: Path, rows: list[tuple[str, str]], header: str = "Model,Occupation,RunID,Text") -> Path:
    lines = [header, *(f'm,{o},{i},"{t}"' for i, (o, t) in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(model: Path) -> Policy:
    torch.manual_seed(0)
    return load_policy(PolicyConfig(str(model), dtype="float32", device="cpu"), PROMPTS["raw"])


def prompts_of(policy: Policy) -> dict[str, list[int]]:
    return {o: prompt_ids(policy.tokenizer, PROMPTS["raw"], o, PROTOCOL) for o in OCCUPATIONS}


def test_rows_that_cannot_be_learnt_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    policy = load(model)
    rows = read_rows(write(tmp_path / "data.csv", ROWS), PROTOCOL).rows
    found = examples_of(rows, policy.tokenizer, PROTOCOL, prompts_of(policy), policy.stop_ids, "strict")
    assert [e.text for e in found.examples] == [GOOD, GOOD, ROWS[2][1]]  # as often as they occur
    assert (found.rows, found.failing, found.foreign) == (8, 2, 3)
    assert "3 of 8 rows (2 different sentences); 2 do not comply; 3 are not" in found.describe()
    both = examples_of(rows, policy.tokenizer, PROTOCOL, prompts_of(policy), policy.stop_ids, "both")
    assert len(both.examples) == 4 and both.failing == 1
    few = examples_of(rows, policy.tokenizer, PROTOCOL, {"chef": prompts_of(policy)["chef"]}, policy.stop_ids, "strict")
    assert {e.occupation for e in few.examples} == {"chef"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'Occupation,Text\nnurse,"said ""so"", and\nleft"', [("nurse", 'The nurse was said "so", and\nleft')]),
        (b"\xef\xbb\xbfText,Other,Occupation\r\nkind,1,nurse\r\n\r\n", [("nurse", "The nurse was kind")]),
        (
            b"Occupation,Text\nnurse,5'3\" tall\nchef,x\n",
            [("nurse", "The nurse was 5'3\" tall"), ("chef", "The chef was x")],
        ),
        (b"Occupation,Text\nnurse,a\nchef\n", "line 3 ends before its text"),
        (b'Text,Occupation\n"a\nb,chef\n', "row that begins on line 2 cannot be read .*never closed"),
        (b"Occupation,Text\nnurse,\xff\n", "is not UTF-8 at byte 22, on line 2"),
        (b"", "is empty"),
    ],
)
def test_rows_are_read_by_their_columns(tmp_path: Path, content: bytes, expected: list[tuple[str, str]] | str) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read_rows(path, PROTOCOL)
    else:
        assert read_rows(path, PROTOCOL).rows == expected


def test_an_example_is_what_the_policy_would_have_drawn(model: Path, tmp_path: Path) -> None:
    policy = load(model)
    (example,) = examples_of(
        read_rows(write(tmp_path / "d.csv", ROWS[2:3]), PROTOCOL).rows,
        policy.tokenizer,
        PROTOCOL,
        prompts_of(policy),
        policy.stop_ids,
        "strict",
    ).examples
    assert sentences_of(policy.tokenizer, as_rollout([example]), ["chef"], PROTOCOL) == [example.text]
    full_stop = policy.tokenizer.convert_tokens_to_ids(".")
    assert example.completion[-1] == full_stop and full_stop in policy.stop_ids  # after `raw` it ends the sentence
    # After an instruction the turn's end does, and byte-level tokens join over words as in the prompt's own text.
    tokenizer = load_tokenizer(Source("", "folder", str(tiny_folder(tmp_path / "chat"))))
    prompts = {"chef": prompt_ids(tokenizer, PROMPTS["describe"], "chef", PROTOCOL)}
    text = "The chef was bold, and the most caring of them all."
    (chat,) = examples_of(
        read_rows(write(tmp_path / "e.csv", [("chef", text)]), PROTOCOL).rows,
        tokenizer,
        PROTOCOL,
        prompts,
        [0, 2],
        "strict",
    ).examples
    assert chat.completion[-1] == 2 == tokenizer.eos_token_id
    assert tokenizer.decode(chat.completion[:-1]) == " bold, and the most caring of them all."
    whole = tokenizer(tokenizer.decode(prompts["chef"]) + " bold, and the most caring of them all.")["input_ids"]
    assert whole == [*chat.prompt, *chat.completion[:-1]]


def test_the_loss_is_the_mean_cross_entropy_of_completion_tokens_the_stop_among_them(model: Path) -> None:
    policy = load(model)
    prompt = prompts_of(policy)["nurse"]
    examples = [Example("nurse", prompt, [*[20 + i % 9, 4, 7][: 1 + i % 3], 1], "") for i in range(20)]
    logs = [
        next_logprobs(policy.model, [*prompt, *e.completion[:t]])[token]
        for e in examples
        for t, token in enumerate(e.completion)
    ]
    expected = -sum(logs) / len(logs)
    for packed in (True, False):
        assert cross_entropy(policy, examples, packed=packed) == pytest.approx(expected, abs=1e-5)
    said: list[str] = []
    generator = torch.Generator().manual_seed(0)
    losses = supervise(
        policy, examples, generator, Supervision(2, 1e-12), packed=True, say=said.append, held_out=examples[:3]
    )
    # Without a step to speak of, both epochs report the same.
    assert [loss.training for loss in losses] == pytest.approx([expected, expected], abs=1e-5)
    held = cross_entropy(policy, examples[:3], packed=True)
    assert [loss.held_out for loss in losses] == pytest.approx([held, held], abs=1e-6)
    assert said[0] == f"epoch 1 of 2, {expected:.3f} nats per token, {held:.3f} held out"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("unread", [False, True])
def test_a_batch_whose_gradient_is_not_finite_is_left_out_and_told(
    model: Path, bad: float, unread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of three batches of the first epoch: all others move the weights, as they do without it."""
    plain, call = supervised._gradients, itertools.count()

    def poisoned(policy: Policy, optimizer: MasterAdam, *rest: Any) -> torch.Tensor:
        found = plain(policy, optimizer, *rest)
        if next(call) == 2:
            optimizer.groups["policy"].grads[5] = bad
        return found

    ends = []
    for gradients, device in ((plain, False), (poisoned, unread)):
        monkeypatch.setattr(supervised, "_gradients", gradients)
        monkeypatch.setattr(supervised, "_unread", lambda *_, device=device: device)
        policy, said = load(model), list[str]()
        examples = [Example("nurse", prompts_of(policy)["nurse"], [4 + i % 5, 1], "") for i in range(48)]
        generator = torch.Generator().manual_seed(0)
        supervise(policy, examples, generator, Supervision(2, 1e-3), packed=True, say=said.append)
        ends.append((said, torch.cat([p.detach().flatten() for p in policy.trained().values()])))
    (clean, expected), (said, found) = ends
    assert said[0] == f"{clean[0]}; 1 batch left out, their gradients are not finite" and "left out" not in said[1]
    before = torch.cat([p.detach().flatten() for p in load(model).trained().values()])
    moved, usual = (found - before).norm(), (expected - before).norm()
    assert 0.5 * usual < moved < usual  # five steps of six


def test_the_learning_rate_rises_in_equal_steps_and_falls_to_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(MasterAdam, "set_learning_rates", lambda self, policy, value: rates.append(policy))
    policy = load(model)
    examples = [Example("nurse", prompts_of(policy)["nurse"], [4, 1], "")] * 80  # five steps an epoch
    arguments = {"packed": True, "say": lambda _: None}
    generator = torch.Generator().manual_seed(0)
    supervise(policy, examples, generator, Supervision(2, 1.0, warmup=0.4, decay=True), **arguments)  # type: ignore[arg-type]
    # Four of ten steps rise to the top, which the fifth has; six fall.
    assert rates == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    rates.clear()
    supervise(policy, examples, generator, Supervision(1, 1.0), **arguments)  # type: ignore[arg-type]
    assert rates == [1.0] * 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Model,Text\r\nm,Someone was bold.\r\n", r"which occupation .* by calling the column Occupation"),
        (b"a,b\n1,2\n", r"no column of texts among 'a', 'b': name it by calling the column Text"),
        (b"", r"is empty"),
        (b"Occupation,Text\nnurse\n", r"line 2 ends before its text"),
        (b'Occupation,Text,N\nnurse,"The nur', r"begins on line 2 cannot be read"),
        (b"Occupation,Text\nnurse,\xff\n", r"is not UTF-8"),
        (None, r"cannot read .*No such file"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_rows(path, PROTOCOL)


def test_ppo_starts_from_the_sentences_of_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        (o, f"The {o} was {a} and {c} in a {b} .")
        for o in ("nurse", "chef")
        for a, c in (("bold", "loyal"), ("loyal", "bold"))
        for b in OCCUPATIONS[:6]
    ]
    data = write(tmp_path / "data.csv", [*texts, ("nurse", "The nurse was bold .")])
    learn = {"warm_start_file": str(data), "warm_start_epochs": 3, "warm_start_learning_rate": 0.01}
    train(small_config(model, tmp_path / "plain", steps=1))
    train(small_config(model, tmp_path / "started", steps=1, **learn))
    assert "warm start: epoch 3 of 3" in capsys.readouterr().out

    def likelihood(folder: Path) -> float:
        policy = load(folder)
        rows = read_rows(data, PROTOCOL).rows
        found = examples_of(rows, policy.tokenizer, PROTOCOL, prompts_of(policy), policy.stop_ids, "strict")
        assert len(found.examples) == 24
        return -cross_entropy(policy, found.examples, packed=True)

    assert likelihood(tmp_path / "started" / "out") > likelihood(tmp_path / "plain" / "out") + 0.1


def test_a_sentence_of_the_file_comes_as_often_as_it_stands_there_but_no_more_often_than_asked(
    model: Path, tmp_path: Path
) -> None:
    texts = [("nurse", f"The nurse was bold and loyal in a {word} .") for word in OCCUPATIONS[:16]]
    data = write(tmp_path / "data.csv", [*texts, *texts[:2], *texts[:1] * 5])
    for copies, expected in ((1, [1] * 16), (3, [3, 2, *[1] * 14])):
        config = small_config(model, tmp_path, warm_start_file=str(data), warm_start_copies=copies)
        policy = load(model)
        state = State.begin(config, RowLimit(16))
        training = Training(config, policy, new_optimizer(config, policy, ALONE), state, prompts_of(policy))
        counts = Counter(example.text for example in read(data, training, prompts_of(policy)))
        assert [counts[text] for _, text in texts] == expected


def test_a_warm_start_file_with_too_little_in_it_says_what_is_wrong(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.csv", ROWS)
    with pytest.raises(UserError, match=r"can learn from 2 sentences of .*needs at least 16 \(3 of 8 rows"):
        train(small_config(model, tmp_path / "a", warm_start_file=str(data)))
    with pytest.raises(UserError, match="can learn from 2 sentences"):  # the file, not forced ones
        train(small_config(model, tmp_path / "b", warm_start="forced", warm_start_file=str(data)))
