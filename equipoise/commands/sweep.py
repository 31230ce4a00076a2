"""`equipoise sweep`: train seeds × settings and compare them in one table."""

from pathlib import Path

from equipoise import options
from equipoise.ppo.sweep import SweepConfig, _run_beside, _run_here, is_finished, read_plans, read_result
from equipoise.ppo.sweep_table import table, write_tables
from equipoise.protocol.plural import plural
from equipoise.runs.console import quiet


def main(argv: list[str]) -> int:
    """Run what is missing and print the table. 0, or the exit code of a run that was stopped by a signal, or 3 if
    one ended because of non-finite values, or 1 if one failed otherwise."""
    quiet()
    config = options.parse(
        SweepConfig, argv, SweepConfig(), prog="equipoise sweep", description=(__doc__ or "").partition("\n")[0]
    )
    plans = read_plans(config)
    waiting = [p for p in plans if not is_finished(p)]
    print(
        f"{plural(len(plans), 'run')} in {config.output_dir}, {len(plans) - len(waiting)} of them finished", flush=True
    )
    code = _run_here(waiting, config) if config.jobs == 1 else _run_beside(waiting, config)
    results = [r for p in plans if (r := read_result(p))]
    write_tables(Path(config.output_dir), results)
    print(table(results, [plan.config.task for plan in plans]))
    return code
