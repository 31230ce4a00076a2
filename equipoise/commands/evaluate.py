"""`equipoise evaluate`: the numbers of completion files, as a table and as files."""

import sys
from contextlib import ExitStack

from equipoise.commands.several import HELP, only_first_speaks, started
from equipoise.errors import UserError
from equipoise.evaluation import inspect_log
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.evaluate import evaluate_shared
from equipoise.evaluation.files import FILES, prepared, write
from equipoise.evaluation.results import Estimate, Evaluation
from equipoise.options import parse
from equipoise.protocol.marking import printable
from equipoise.runs.progress import Progress
from equipoise.runs.ranks import Ranks, joined


def main(argv: list[str]) -> int:
    """Measure the files, print the headline table, write the results. Raises UserError for bad input."""
    if any(argument.partition("=")[0] == "--lexicon" for argument in argv):
        raise UserError(
            "--lexicon has become --task FILE: write the terms into a task file, under `classes` "
            "(docs/TASKS.md says how; `equipoise task --new` writes one to start from)"
        )
    code, argv = started(argv, ("-m", "equipoise", "evaluate"), "equipoise evaluate")
    if code is not None:
        return code

    def read() -> EvaluateConfig:
        return parse(
            EvaluateConfig,
            argv,
            EvaluateConfig(),
            prog="equipoise evaluate",
            description="Measure completion files of any method: compliance, diversity, fluency, with 95 % intervals, "
            f"comparisons and the trade-off. {HELP}",
        )

    with joined() as ranks, ExitStack() as opened:
        only_first_speaks(ranks)
        config = ranks.first_does(read)  # which may name a task file, and only the first one's host need have that

        def prepare() -> None:
            if config.inspect_log is not None:
                inspect_log.check(config.inspect_log)
            opened.enter_context(prepared(config.output))

        ranks.first_does(prepare)
        _evaluate(config, ranks)
    return 0


def _evaluate(config: EvaluateConfig, ranks: Ranks) -> None:
    """Measure, judge, write and print. Raises UserError, on all ranks."""
    told: set[str] = set()

    def tell(line: str) -> None:
        told.add(line)
        say(line)

    if ranks.first:
        with Progress(sys.stderr, unit="texts") as progress:
            found = evaluate_shared(config, ranks, tell, progress)
    else:
        found = evaluate_shared(config, ranks, lambda line: None, lambda done, total: None)

    def end() -> None:
        assert found is not None
        evaluation, rows, judged = found
        write(config.output, evaluation, rows, judged)
        logs = [] if config.inspect_log is None else inspect_log.write(config.inspect_log, evaluation, rows, judged)
        print("\n".join(table(evaluation)))
        for notice in evaluation.notices:
            if (line := f"note: {notice}") not in told:
                say(line)
        print(f"written to {config.output}: {', '.join(FILES)}")
        if logs:
            print(f"written to {config.inspect_log}: {', '.join(path.name for path in logs)}")

    ranks.first_does(end)


def say(line: str) -> None:
    """A line that is not a result: to standard error, so that the table can be piped."""
    print(printable(line), file=sys.stderr, flush=True)


def table(evaluation: Evaluation) -> list[str]:
    """The headline tier, one line for each method, values with their intervals."""
    keys = [key for key, metric in evaluation.metrics.items() if metric.tier == "headline"]
    heads = ["method", "n", *(_head(evaluation, key) for key in keys)]
    lines = [heads]
    for name, method in evaluation.methods.items():
        cells = [_cell(method.metrics[key], evaluation.metrics[key].unit) for key in keys]
        lines.append([printable(name)[:40], f"{method.n:,}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    out = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    task = evaluation.task
    what = f"{task.all_classes}, {task.bounds}, one complete sentence"
    out.append(f"strict: {what}; [95 % interval over occupations]")
    return out


def _head(evaluation: Evaluation, key: str) -> str:
    metric = evaluation.metrics[key]
    return f"{metric.title} %" if metric.unit == "share" else metric.title


def _cell(estimate: Estimate, unit: str) -> str:
    if estimate.value is None:
        return "–"
    scale, decimals = (100.0, 1) if unit == "share" else (1.0, 0 if unit == "count" else 3)
    if unit == "count" and not float(estimate.value).is_integer():
        decimals = 1
    text = f"{scale * estimate.value:.{decimals}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{scale * estimate.low:.{decimals}f}, {scale * estimate.high:.{decimals}f}]"
