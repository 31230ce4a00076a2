"""From completion files to one `Evaluation` and its rows: read, measure, judge, summarise, compare."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equipoise.errors import UserError
from equipoise.evaluation import pairs, results
from equipoise.evaluation.catalogue import titled
from equipoise.evaluation.compare import compare
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.counted import Fluency, Sample
from equipoise.evaluation.equal_n import at_equal_n
from equipoise.evaluation.frontier import frontier
from equipoise.evaluation.inputs import Given, Inputs, Judged, read_inputs
from equipoise.evaluation.measure import Measured
from equipoise.evaluation.reference import NOT_OURS, STUDY_ROWS, is_of_the_study, read_reference
from equipoise.evaluation.results import Estimate, Evaluation, Method
from equipoise.evaluation.side import Side, cost, distance
from equipoise.evaluation.summary import SELF_BLEU_TEXTS, duplicates, estimates, occupation_estimates, parts
from equipoise.evaluation.wording import untrained
from equipoise.measures.variety import pair_counts
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.runs.records import software
from equipoise.tables.frame import Frame


def evaluate(
    config: EvaluateConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
    more: Sequence[Given] = (),
) -> tuple[Evaluation, list[Measured], Judged]:
    """Everything that is in evaluation.json, the measured rows, and the judges' scores. `more`: tables to
    measure beside the files. Raises UserError."""
    found = evaluate_shared(config, ALONE, say, progress, more)
    assert found is not None
    return found


def evaluate_shared(
    config: EvaluateConfig,
    ranks: Ranks,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
    more: Sequence[Given] = (),
) -> tuple[Evaluation, list[Measured], Judged] | None:
    """`evaluate`, the judging dealt out to the ranks: the others have their judges from their hosts, and everything
    else rank 0 does, which alone gets the result. Raises UserError, on all."""
    read: list[tuple[Sequence[results.Reference], Inputs]] = []

    def begin() -> list[str]:
        own = () if config.reference is None else read_reference(config.reference)
        inputs = read_inputs(config, more)
        for line in inputs.told():
            say(f"note: {line}")
        read.append((own, inputs))
        return [m.row.measured for m in inputs.rows]

    texts = ranks.first_does(begin)
    judged = Judged()
    if config.judges or config.acceptability:
        # Only here: everything else does without torch.
        from equipoise.evaluation.fluency import judge

        judged = judge(config, texts, say, progress, ranks)
    done: list[tuple[Evaluation, list[Measured], Judged]] = []

    def end() -> None:
        ((own, inputs),) = read
        published = STUDY_ROWS if is_of_the_study(inputs.task) else ()
        done.append((summarise(config, inputs, judged, (*published, *own)), inputs.rows, judged))

    ranks.first_does(end)
    return done[0] if done else None


def summarise(
    config: EvaluateConfig,
    inputs: Inputs,
    judged: Judged,
    reference: tuple[results.Reference, ...] = STUDY_ROWS,
) -> Evaluation:
    """The evaluation of rows that have been read and judged. Raises UserError for a base that is no method."""
    samples = _samples(config, inputs, judged)
    sizes = {len(sample.rows) for sample in samples.values()}
    equal_n = min(sizes) if len(sizes) > 1 else None
    self_bleu_texts = min(SELF_BLEU_TEXTS, *sizes)
    task, begins = inputs.task, Frame(inputs.task).occupation
    catalogue = titled(task, [j.name for j in judged.judges], next(iter(judged.acceptable or {}), None))
    measured = {}
    base = _base(config, samples)
    for name, sample in samples.items():
        found = estimates(sample, self_bleu_texts, base)
        files = sorted({m.row.file for m in sample.rows})
        sides = [side for file in files if (side := _side_of(inputs, file, name))]
        measured[name] = _Measured({key: found[key] for key in catalogue}, occupation_estimates(sample), files, sides)
    methods = {
        name: _method(sample, measured[name], [inputs.files[f].path for f in measured[name].files], equal_n)
        for name, sample in samples.items()
    }
    for name, places in inputs.empty.items():
        if name not in methods:
            methods[name] = _without_rows(inputs, catalogue, places)
    metrics = {name: own.metrics for name, own in measured.items()}
    sides_of = {name: own.sides for name, own in measured.items()}
    kl = {name: methods[name].kl for name in measured}
    judge = judged.judges[0].name if judged.judges else None
    return Evaluation(
        version=results.VERSION,
        settings=_settings(config, task, self_bleu_texts),
        provenance=_provenance(),
        files=inputs.files,
        lexicon={name: terms for name, terms in task.classes},
        judges=judged.judges,
        metrics=catalogue,
        methods=methods,
        equal_n=equal_n,
        comparisons=compare(samples, {name: own.occupations for name, own in measured.items()}, config.margin),
        frontier=frontier(config.event, samples, metrics, sides_of, kl, config.base, judge),
        reference=reference,
        notices=(*judged.notices, *inputs.told(), *_notices(inputs, methods, equal_n)),
        not_begun=sum(begins(m.row.measured) is None for m in inputs.rows),
    )


def _samples(config: EvaluateConfig, inputs: Inputs, judged: Judged) -> dict[str, Sample]:
    """The rows of each method, ready to be counted. Raises UserError for a base that is no method."""
    places: dict[str, list[int]] = {}
    for i, m in enumerate(inputs.rows):
        places.setdefault(m.row.method, []).append(i)
    if config.base is not None and config.base not in places:
        what = "has no sentences to compare with" if config.base in inputs.empty else "is no method"
        raise UserError(f"--base {config.base!r} {what}: there are {', '.join(map(repr, places))}")
    return {
        name: Sample(
            [inputs.rows[i] for i in own],
            inputs.task,
            {j: Fluency(f.nll_N[own], f.tokens_N[own]) for j, f in (judged.scores or {}).items()},
            {c: values[own] for c, values in (judged.acceptable or {}).items()},
            config.bootstrap_draws,
            config.seed,
            name,
        )
        for name, own in places.items()
    }


def _base(config: EvaluateConfig, samples: Mapping[str, Sample]) -> Sample | None:
    """The untrained model's sentences: those of the method that --base names, else of the one called so."""
    names = [config.base] if config.base is not None else untrained(samples)
    return samples[names[0]] if len(names) == 1 else None


class _Measured(NamedTuple):
    """What a method's numbers are, and which files they are from."""

    metrics: dict[str, Estimate]
    occupations: dict[str, dict[str, Estimate]]
    files: list[int]
    """Places among the input files."""
    sides: list[Side]


def _method(sample: Sample, measured: _Measured, paths: list[str], equal_n: int | None) -> Method:
    rows = [m.row for m in sample.rows]
    lexicon = sample.task.lexicon
    return Method(
        n=len(rows),
        model=", ".join(dict.fromkeys(row.model for row in rows if row.model)),
        seeds=tuple(dict.fromkeys(row.seed for row in rows if row.seed)),
        files=tuple(paths),
        metrics=measured.metrics,
        occupations=measured.occupations,
        equal_n={} if equal_n is None else at_equal_n(sample, equal_n),
        pairs=pairs.table(pair_counts(sample.pairs), {name: terms for name, terms in sample.task.classes}),
        terms=dict(zip(lexicon.terms, (int(x) for x in sample.terms_NT.sum(0)), strict=True)),
        lengths=_lengths(sample),
        parts=parts(sample.rows),
        duplicates=duplicates(sample.rows),
        cost=cost(measured.sides),
        kl=distance(measured.sides),
        problems=tuple(_problems(sample)),
    )


def _without_rows(inputs: Inputs, catalogue: Mapping[str, results.Metric], places: Sequence[int]) -> Method:
    """A method whose files hold no row, such as of a filter that kept nothing: no number exists, and it is said."""
    none = Estimate(None, note="no rows")
    return Method(
        n=0,
        model="",
        seeds=(),
        files=tuple(inputs.files[place].path for place in places),
        metrics=dict.fromkeys(catalogue, none),
        occupations={},
        equal_n={},
        pairs=pairs.table(pair_counts([]), {name: terms for name, terms in inputs.task.classes}),
        terms=dict.fromkeys(inputs.task.lexicon.terms, 0),
        lengths=(),
        parts=results.Parts(0.0, 0.0, 0.0, 0.0, 0.0),
        duplicates=duplicates([]),
        cost=cost([side for place in places if (side := inputs.sides[place]) is not None]),
        kl=None,
        problems=("no rows: its files hold none",),
    )


def _side_of(inputs: Inputs, file: int, method: str) -> Side | None:
    """A file with several methods cannot share its costs out, unless the side file names one of them."""
    side = inputs.sides[file]
    within = {m.row.method for m in inputs.rows if m.row.file == file}
    return side if side is not None and (len(within) == 1 or side.method == method) else None


def _lengths(sample: Sample) -> tuple[tuple[int, int], ...]:
    words, counts = np.unique([m.found.reward.words for m in sample.rows], return_counts=True)
    return tuple((int(w), int(c)) for w, c in zip(words, counts, strict=True))


def _problems(sample: Sample) -> list[str]:
    out = []
    repeated = duplicates(sample.rows)
    if repeated.rows:
        out.append(
            f"{repeated.rows} of {plural(len(sample.rows), 'row')} repeat{'s' * (repeated.rows == 1)} an "
            "earlier text of the same occupation"
        )
    if empty := sum(not m.row.measured for m in sample.rows):
        verb = "has no text; it counts as a failure" if empty == 1 else "have no text; they count as failures"
        out.append(f"{empty} of {plural(len(sample.rows), 'row')} {verb}")
    models = {m.row.model for m in sample.rows if m.row.model}
    if len(models) > 1:
        out.append(f"rows of {len(models)} models are pooled; --method-column Model would part them")
    if len(set(sample.n_O)) > 1:
        out.append(f"{int(sample.n_O.min())} to {plural(sample.n_O.max(), 'row')} per occupation: not balanced")
    return out


def _notices(inputs: Inputs, methods: Mapping[str, Method], equal_n: int | None) -> list[str]:
    out = [f"{name}: {line}" for name, method in methods.items() for line in method.problems]
    if equal_n is not None:
        whose = "the smallest" if all(m.n for m in methods.values()) else "the smallest of those that have sentences"
        out.append(f"methods differ in n: what depends on n is also given at n = {equal_n}, {whose}")
    shared: dict[str, set[str]] = {}
    for m in inputs.rows:
        if m.row.measured:
            shared.setdefault(m.row.measured, set()).add(m.row.method)
    common = sum(len(names) > 1 for names in shared.values())
    if common:
        out.append(f"{plural(common, 'text')} occur{'s' * (common == 1)} with more than one method")
    if not is_of_the_study(inputs.task):
        out.append(NOT_OURS)
    return out


def _settings(config: EvaluateConfig, task: Task, self_bleu_texts: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name != "inspect_log"
    }
    out |= {"task": task.document(), "min_words": task.min_words, "max_words": task.max_words}
    out["judge"] = list(config.judges)
    return out | {"self_bleu_texts": self_bleu_texts}


def _provenance() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return software(("numpy", "scipy", "statsmodels", "sacrebleu", "torch", "transformers")) | {"date": now}
