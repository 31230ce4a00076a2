"""Fluency under judges: the negative log-likelihood of whole sentences, and a classifier's opinion of them.

A sentence is scored as it is, frame included, without a chat template and with the special tokens that the judge's own
tokenizer puts there. The first token is scored only where one of those stands before it. Equal texts are scored once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.evaluation.acceptability import Acceptability, is_probe
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.counted import Fluency
from equipoise.evaluation.inputs import Judged
from equipoise.evaluation.results import Judge
from equipoise.policy import trie
from equipoise.policy.alike import compare, facts_of
from equipoise.policy.attention import PLAIN_ATTENTION, TRIE_ATTENTION
from equipoise.policy.families import position_limit, rotary_limit, window
from equipoise.policy.hub import explain, hub_access, quiet_progress
from equipoise.policy.load import own_device, pick_device, pick_dtype
from equipoise.policy.packaged import GEMMA, MPNET, SMOLLM2
from equipoise.policy.score import token_logprobs
from equipoise.policy.source import Source, load_config, load_tokenizer, resolve
from equipoise.policy.weights import load_model
from equipoise.runs.ranks import ALONE, Ranks

LONGEST = 512
"""Tokens of a text that are scored; what follows is left out, and counted."""


def family_caveat(source: Source) -> str:
    """What is to be known of a judge that policies are trained from; empty for any other."""
    if source.packaged is None:
        return ""
    other = GEMMA if source.packaged == SMOLLM2 else SMOLLM2
    what = "the bundled SmolLM2" if source.packaged == SMOLLM2 else source.packaged.name
    return (
        f"judge and policy share a family where the policy was trained from {what}: such a judge favours it; give a "
        f"model of another family with --judge, such as --judge {other.alias}"
    )


_GPT2 = "openai-community/"
_SHORT = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

Progress = Callable[[int, int], None]
Made = TypeVar("Made")


def judge(
    config: EvaluateConfig,
    texts: Sequence[str],
    say: Callable[[str], None],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Judged:
    """Every judge's view of every text, batches dealt out to the ranks. Raises UserError, on all, for a judge that
    cannot be had, is not the same for all, or gives non-finite numbers."""
    judges: list[Judge] = []
    scores: dict[str, Fluency] = {}
    notices: list[str] = []
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    order = np.array([place[text] for text in texts])
    sources = _on_all(lambda: [resolve(full_name(name)) for name in config.judges], ranks)
    # Before the judges, which take long: what cannot be had is told at once.
    classifier = _on_all(partial(_classifier_of, config), ranks)
    for source in sources:
        name = _name(source, [j.name for j in judges])
        caveat = family_caveat(source)
        notices += [*source.notices, *([f"judge {name}: {caveat}"] if caveat else [])]
        say(f"judge {name}: {len(distinct):,} different texts")
        scorer = _on_all(partial(_scorer, source, config, ranks), ranks)
        nll, tokens, cut = scorer(distinct, progress, ranks)
        if cut:
            notices.append(f"judge {name}: {cut} different texts were scored on their first {scorer.longest} tokens")
        judges.append(Judge(name, source.given, caveat))
        scores[name] = Fluency(nll[order], tokens[order])
        del scorer
    acceptable: dict[str, Any] = {}
    probed: dict[str, Any] = {}
    if classifier is not None:
        acceptable[_name(classifier, [])] = _accept(classifier, config, distinct, progress, ranks)[order]
    elif config.acceptability is not None:
        guessed, threshold = _probed(config, distinct, progress, ranks)
        acceptable[MPNET.alias] = (guessed >= threshold).astype(float)[order]
        probed[MPNET.alias] = guessed[order]
    return Judged(tuple(judges), scores, acceptable, tuple(notices), probed)


def _classifier_of(config: EvaluateConfig) -> Source | None:
    """None where none is asked for, or the probe is. Raises UserError, which names the option."""
    if config.acceptability is None:
        return None
    if is_probe(config.acceptability):
        if config.acceptable_label is not None:
            raise UserError(
                f"--acceptable-label {config.acceptable_label} is of a classifier, and {MPNET.alias} has no labels: "
                "leave it out"
            )
        return None
    try:
        return resolve(config.acceptability)
    except UserError as error:
        raise UserError(
            f"--acceptability {config.acceptability} cannot be had ({str(error).partition(': ')[0]}): give "
            f"{MPNET.alias}, or a classifier of sentences by its folder or Hub id"
        ) from None


def _scorer(source: Source, config: EvaluateConfig, ranks: Ranks) -> "Scorer":
    return Scorer(source, own_device(config.device, ranks), config.dtype)


def _on_all(make: Callable[[], Made], ranks: Ranks) -> Made:
    """What each rank makes for itself. Raises what it raises on any of them, on all."""
    made: list[Made] = []
    ranks.each(lambda: made.append(make()))
    return made[0]


def full_name(name: str) -> str:
    """The study's judge and its larger siblings are known by their short names, which the Hub keeps in a folder."""
    return f"{_GPT2}{name}" if name in _SHORT and not Path(name).is_dir() else name


def _name(source: Source, taken: Sequence[str]) -> str:
    name = Path(source.path_or_id).name if source.kind in ("folder", "adapter", "checkpoint") else source.path_or_id
    name = source.packaged.alias if source.packaged is not None else name.removeprefix(_GPT2)
    return name if name not in taken else f"{name} ({len(taken) + 1})"


class Scorer:
    """A judge in memory. Called with texts it gives nats per token, scored tokens, and how many texts were cut.

    A text of which no token is scored has nan and 0.
    """

    def __init__(self, source: Source, device: str, dtype: str, packed: bool = True) -> None:
        """`packed`: share common beginnings where the model's attention allows; off, the plain twin."""
        self.source = source
        self.device = pick_device(device)
        config = load_config(source)
        self.longest = min(LONGEST, position_limit(config) or LONGEST)
        self.turn = rotary_limit(config)
        plain = config.model_type in PLAIN_ATTENTION and window(config) >= self.longest
        self.packed = packed and plain
        self.tokenizer = load_tokenizer(source)
        self.model: Any = load_model(
            source,
            dtype=pick_dtype(dtype, self.device),
            device=self.device,
            attn_implementation=TRIE_ATTENTION if self.packed else None,
        )
        self.model.eval().requires_grad_(False)
        # Logits are nodes × vocabulary: bounded, so that a large vocabulary does not fill the memory.
        self.budget = 8192 if self.device.type == "cuda" else 1024

    def __call__(
        self, texts: Sequence[str], progress: Progress = lambda done, total: None, ranks: Ranks = ALONE
    ) -> tuple[Any, Any, int]:
        """(N,) float64 and (N,) int64 arrays, the same on all ranks, which score a part each."""
        nll, tokens = np.full(len(texts), np.nan), np.zeros(len(texts), dtype=np.int64)
        rows, cut = _on_all(lambda: self._tokenise(texts), ranks)
        compare(lambda: facts_of(self.device, self.model.dtype, rows, self.model.parameters()), ranks)
        # In the order of their tokens, neighbours share the most; without packing, in order of length, the least is
        # padded. Either way longer texts than the rest do not widen the others' batches.
        scored = [i for i, row in enumerate(rows) if len(row) > 1]
        scored.sort(
            key=lambda i: (
                *(len(rows[i]) > self.turn, len(rows[i]) > 64 or not self.packed),
                rows[i] if self.packed else [len(rows[i])],
            )
        )
        score = self._packed if self.packed else self._padded
        more = _of_all(progress, len(scored), ranks)

        @torch.inference_mode()
        def summed(batch: Sequence[int]) -> Any:
            sums = score([rows[i] for i in batch]).double().cpu().numpy()
            more(len(batch))
            return sums

        batches = list(self._batches(rows, scored))
        for batch, sums in zip(batches, ranks.deal(batches, summed), strict=True):
            counts = np.array([len(rows[i]) - 1 for i in batch])
            nll[batch], tokens[batch] = sums / counts, counts
        if not np.isfinite(nll[scored]).all():
            raise UserError(
                f"the judge {self.source.given!r} gives numbers that are not finite: try --dtype float32 or another one"
            )
        return nll, tokens, cut

    def _tokenise(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        # A lone surrogate is no Unicode text, and tokenizers refuse it.
        clean = [text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for text in texts]
        rows = [list(ids) for ids in self.tokenizer(clean)["input_ids"]] if clean else []
        rows = [row if text else [] for row, text in zip(rows, clean, strict=True)]
        _check_ids(max((max(row) for row in rows if row), default=0), self.model, f"judge {self.source.given!r}")
        cut = sum(len(row) > self.longest for row in rows)
        return [row[: self.longest] for row in rows], cut

    def _batches(self, rows: Sequence[Sequence[int]], order: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        previous: Sequence[int] = ()
        size = width = 0
        for i in order:
            width = max(width, len(rows[i]))
            if self.packed:
                shared = next((k for k, (a, b) in enumerate(zip(rows[i], previous, strict=False)) if a != b), 0)
                size += len(rows[i]) - (shared if batch else 0)
            else:
                size = width * (len(batch) + 1)
            # Attention gathers a path for each row, however much of it is shared.
            gathered = width * (len(batch) + 1)
            # The longest row of a pass chooses the rotary frequencies of all.
            turned = width > self.turn >= len(previous)
            if batch and (size > self.budget or gathered > 16 * self.budget or turned):
                yield batch
                batch, size, width = [], len(rows[i]), len(rows[i])
            batch.append(i)
            previous = rows[i]
        if batch:
            yield batch

    def _padded(self, rows: list[list[int]]) -> Tensor:
        """(R,) summed NLL. Padding stands behind the text, where nothing that is scored can see it."""
        width = max(map(len, rows))
        ids_RL = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        lengths_R = torch.tensor([len(row) for row in rows], device=self.device)
        mask_RL = torch.arange(width, device=self.device)[None] < lengths_R[:, None]
        logits_RLV = self.model(input_ids=ids_RL, attention_mask=mask_RL.long(), use_cache=False).logits
        real = mask_RL[:, 1:]
        row_N = torch.nonzero(real)[:, 0]
        return self._sum(logits_RLV[:, :-1][real], ids_RL[:, 1:][real], row_N, len(rows))

    def _packed(self, rows: list[list[int]]) -> Tensor:
        """The same with each common beginning computed once: one row of nodes, logits only where something follows."""
        made = trie.build([row[:1] for row in rows], [row[1:] for row in rows])
        nodes_U, which_N = torch.unique(made.predictors_N, return_inverse=True)
        logits_UV = self.model(
            input_ids=made.tokens_M[None].to(self.device),
            position_ids=made.depths_M[None].to(self.device),
            # Any mask of four dimensions keeps transformers from making one of its own.
            attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
            paths_RL=made.paths_RL.to(self.device),
            places_M=made.places_M.to(self.device),
            logits_to_keep=nodes_U.to(self.device),
            use_cache=False,
        ).logits[0]
        targets_N = torch.tensor([token for row in rows for token in row[1:]], device=self.device)
        row_N = torch.tensor([r for r, row in enumerate(rows) for _ in row[1:]], device=self.device)
        which_N = which_N.to(self.device)
        picked_N = logits_UV[which_N, targets_N].float()
        parts = [part.float().logsumexp(-1) for part in logits_UV.split(256)]
        losses_N = torch.cat(parts)[which_N] - picked_N
        return torch.zeros(len(rows), device=self.device).index_add_(0, row_N, losses_N)

    def _sum(self, logits_NV: Tensor, targets_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
        sums_R = torch.zeros(rows, device=self.device)
        for logits, targets, row in zip(logits_NV.split(256), targets_N.split(256), row_N.split(256), strict=True):
            sums_R.index_add_(0, row, -token_logprobs(logits, targets, 1.0))
        return sums_R


def _of_all(progress: Progress, total: int, ranks: Ranks) -> Callable[[int], None]:
    """Gets how many texts more this rank has done, and tells `progress` as if all had done as many."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(min(total, done * ranks.size), total)

    return more


def _check_ids(highest: int, model: Any, who: str) -> None:
    """Raises UserError unless the model has an embedding for every token id up to the `highest`."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    if highest >= embeddings:
        raise UserError(
            f"the tokenizer of the {who} gives a text the token id {highest}, and the model's embedding has "
            f"{embeddings} rows: the tokenizer belongs to another model, or has tokens that were added to it alone"
        )


def _accept(source: Source, config: EvaluateConfig, texts: Sequence[str], progress: Progress, ranks: Ranks) -> Any:
    """(N,) 1.0 where the classifier's likeliest label is the acceptable one; an empty text is not acceptable."""
    device = _on_all(lambda: pick_device(own_device(config.device, ranks)), ranks)
    tokenizer, model, wanted = _on_all(lambda: _classifier(source, config, device), ranks)
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST)
    flags = np.zeros(len(texts))
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
    more = _of_all(progress, len(order), ranks)
    compare(lambda: facts_of(device, model.dtype, [], model.parameters()), ranks)

    @torch.inference_mode()
    def judged(batch: Sequence[int]) -> Any:
        clean = [texts[i].encode("utf-8", "surrogatepass").decode("utf-8", "replace") for i in batch]
        inputs = tokenizer(clean, padding=True, truncation=True, max_length=longest - 2, return_tensors="pt")
        _check_ids(int(inputs["input_ids"].max()), model, f"classifier {source.given!r}")
        found = (model(**inputs.to(device)).logits.argmax(-1) == wanted).cpu().numpy()
        more(len(batch))
        return found

    batches = [order[first : first + 64] for first in range(0, len(order), 64)]
    for batch, found in zip(batches, ranks.deal(batches, judged), strict=True):
        flags[batch] = found
    return flags


def _probed(config: EvaluateConfig, texts: Sequence[str], progress: Progress, ranks: Ranks) -> tuple[Any, float]:
    """(N,) probabilities of the packaged probe, in float32 as it was learnt, and its threshold; an empty text is
    acceptable to nobody."""
    probe = _on_all(lambda: Acceptability(pick_device(own_device(config.device, ranks))), ranks)
    more = _of_all(progress, len(texts), ranks)

    def guessed(batch: Sequence[str]) -> Any:
        clean = [text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for text in batch]
        return probe(clean, more)

    batches = [texts[first : first + 256] for first in range(0, len(texts), 256)]
    found = np.concatenate([np.zeros(0), *ranks.deal(batches, guessed)])
    return np.where([bool(text.strip()) for text in texts], found, 0.0), probe.probe.threshold


def _classifier(source: Source, config: EvaluateConfig, device: torch.device) -> tuple[Any, Any, int]:
    """(tokenizer, model, index of the acceptable label). Raises UserError."""
    from transformers import AutoModelForSequenceClassification

    if source.kind not in ("folder", "hub"):
        raise UserError(
            f"{source.given!r} is no classifier: give {MPNET.alias}, a folder or a Hub id with --acceptability"
        )
    if source.kind == "hub" and not (access := hub_access(source.path_or_id, timeout=20.0)).available:
        raise UserError(access.reason)
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token is None:
        raise UserError(
            f"the classifier {source.given!r} cannot read several texts at a time, as its tokenizer has no padding "
            "token: name one as pad_token in its tokenizer_config.json"
        )
    try:
        with quiet_progress() if source.kind == "folder" else nullcontext():
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                source.path_or_id,
                dtype=pick_dtype(config.dtype, device),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError) as error:
        reason = explain(source.path_or_id, error) if source.kind == "hub" else None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(reason or f"the classifier {source.given!r} cannot be loaded: {first}") from None
    model = model.to(device).eval()
    return tokenizer, model, acceptable_label(dict(model.config.id2label), config.acceptable_label)


def acceptable_label(labels: dict[int, str], given: str | None) -> int:
    """The index of the label for acceptable sentences. Raises UserError where it is not plain which one that is."""
    by_name = {str(name).lower(): int(index) for index, name in labels.items()}
    if given is not None:
        if given.lower() in by_name:
            return by_name[given.lower()]
        if given.isdigit() and int(given) in map(int, labels):
            return int(given)
        raise UserError(f"the classifier has no label {given!r}: it has {', '.join(map(str, labels.values()))}")
    found = [by_name[name] for name in ("acceptable", "grammatical", "correct") if name in by_name]
    if len(found) != 1:
        raise UserError(
            f"the classifier's labels are {', '.join(map(str, labels.values()))}: say which one means acceptable, "
            "by name or number, with --acceptable-label"
        )
    return found[0]
