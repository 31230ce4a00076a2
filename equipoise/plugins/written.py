"""From what another trainer hands over to the sentence that the task scores.

A trainer may have begun the sentence in the prompt, in which case the model wrote what follows, or not, in which case
the model was to write all of it. Which of the two it was is read from the prompt, never guessed from the reply.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.protocol.prompts import clean
from equipoise.protocol.reward import PROTOCOL_WEIGHTS, Reward, RewardWeights
from equipoise.protocol.task import PROTOCOL, Task, read_task

Messages = Sequence[Mapping[str, Any]]
Turn = str | Messages
"""A prompt or a completion: a text, or a conversation's messages, the last of which counts."""

# Turn ends and the like, which a trainer may leave in a decoded text: <|im_end|>, </s>, <turn|>, [PAD] …
_TOKEN = (
    r"<[|\uff5c][^<>|\uff5c]{1,60}[|\uff5c]>|<\|\w{1,40}>|<\w{1,40}\|>|</?s>"
    r"|<(?:bos|eos|eod|pad|unk|mask|end_of_turn|start_of_turn|end_of_utterance)>"
    r"|\[(?:PAD|EOS|BOS|SEP|CLS|MASK|UNK|/?INST|UNUSED_TOKEN_\d+)\]"
)
_SPECIAL = re.compile(_TOKEN, re.I)
# What opens a model's turn, the role in plain letters: it stands in the text where a prompt did not end with it.
_OPENING = re.compile(
    rf"\A(?:\s*(?:{_TOKEN}))*?\s*(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>)"
    r"\s*(?:assistant|model)\b\s*(?:<\|end_header_id\|>)?",
    re.I,
)
# What a model thought before its answer. Where that has no end there is no answer.
_THOUGHT = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)|\A.*<\|channel\|>final<\|message\|>", re.S)

COMMAND = "`equipoise prompts`"


@lru_cache(maxsize=32)
def task_named(name: str) -> Task:
    """The packaged task of that name, or the task in that file; the default one for an empty name. Raises UserError."""
    return read_task(name) if name else PROTOCOL


def without_special(text: str) -> str:
    """What the model answered: `text` without the opening of its turn and what it thought before, up to the first
    special token that follows something written, and without those before it."""
    answer = _THOUGHT.sub("", _OPENING.sub("", text))
    pieces = [piece for piece in _SPECIAL.split(answer) if piece.strip()]
    return pieces[0] if pieces else ""


def text_of(turn: Turn) -> str:
    """A turn's text: of messages the last one's, whose content may itself be a list of parts. Raises UserError."""
    if isinstance(turn, str):
        return turn
    try:
        content: Any = turn[-1]["content"] if len(turn) else ""
        return content if isinstance(content, str) else "".join(map(_part, content or ()))
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"a turn is a text or a list of messages, each with its `content`; given {turn!r:.120}"
        ) from None


def _part(part: Any) -> str:
    return part if isinstance(part, str) else part.get("text") or ""  # parts that are no text, such as a thought


def begun(prompt: Turn, task: Task, occupation: str) -> bool:
    """Whether the prompt ends with the beginning of the sentence, so that a completion goes on from there.

    Of messages only a last one of the role `assistant` can.
    """
    if not isinstance(prompt, str):
        turns: Messages = prompt
        if not turns or turns[-1].get("role") != "assistant":
            return False
    return text_of(prompt).rstrip().endswith(task.prefix(occupation))


def sentence(task: Task, occupation: str, prompt: Turn, completion: Turn) -> str:
    """The sentence that was written. A completion that repeats the beginning, as where a trainer hands it back with
    the begun turn in front, is the sentence by itself; so is one after a prompt that begins no sentence."""
    written = without_special(text_of(completion))
    whole = clean(written)
    if not begun(prompt, task, occupation) or _begins(whole, task.prefix(occupation)):
        return whole
    return task.sentence(occupation, written.rstrip())


def _begins(text: str, prefix: str) -> bool:
    """Whether the text begins with the prefix, however that is written: in other cases, with other white space."""
    if text.startswith(prefix):
        return True
    pattern = r"\s+".join(map(re.escape, prefix.split()))
    return re.match(rf"{pattern}(?!\w)", text, re.I) is not None


def score(
    task: Task, occupation: str, prompt: Turn, completion: Turn, weights: RewardWeights = PROTOCOL_WEIGHTS
) -> Reward:
    """The task's reward of the sentence that was written."""
    return task.score(sentence(task, occupation, prompt, completion), weights)


def numbers(task: Task, reward: Reward) -> dict[str, float]:
    """What a trainer may log of a reward: its parts, and whether every class was there, also strictly."""
    every = all(reward.terms)
    return {
        "base": reward.base,
        "bonus": reward.bonus,
        "length_penalty": reward.length_penalty,
        "repetition_penalty": reward.repetition_penalty,
        "all_classes": float(every),
        "strict": float(task.strict(reward.text)),
        "words": float(reward.words),
    }


def label(task: str, occupation: str) -> str:
    """What a data set's row says of its sentence, as one text that every format has room for; see `read_label`."""
    return json.dumps({"task": task, "occupation": occupation}, ensure_ascii=False)


def read_label(text: Any) -> tuple[Task, str]:
    """The task and the occupation of a `label`, of such a mapping, or of an occupation's bare name (default task).

    Raises UserError for what is none of these, and for an occupation that the task does not have.
    """
    given = text
    if isinstance(text, str) and text.lstrip().startswith("{"):
        try:
            given = parse_json(text)
        except ValueError:
            raise UserError(f"the label {text!r:.120} is no JSON: write the data set with {COMMAND}") from None
    if isinstance(given, str):
        given = {"occupation": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("occupation"), str):
        raise UserError(f"the label {text!r:.120} names no occupation: write the data set with {COMMAND}")
    task = task_named(str(given.get("task") or ""))
    occupation = given["occupation"]
    if occupation not in task.names:
        raise UserError(f"the task {task.name} has no occupation {occupation!r:.80}: write the data set for this task")
    return task, occupation


def weights_from(options: Mapping[str, Any]) -> RewardWeights:
    """Weights from keyword arguments of a trainer's configuration. Raises UserError for names it does not know."""
    unknown = set(options) - set(asdict(PROTOCOL_WEIGHTS))
    if unknown:
        known = ", ".join(asdict(PROTOCOL_WEIGHTS))
        raise UserError(f"the reward has no {sorted(unknown)[0]!r}; it has {known}")
    return RewardWeights(**options)
