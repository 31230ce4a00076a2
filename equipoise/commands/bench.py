"""`equipoise bench`: where the time of a PPO step goes."""

import argparse
import json
import tempfile
from pathlib import Path

from equipoise import options
from equipoise.commands.several import only_first_speaks
from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.ppo.presets import preset
from equipoise.ppo.tool_config import BenchConfig
from equipoise.runs.console import quiet
from equipoise.runs.files import write_file
from equipoise.runs.launch import launch, processes_of
from equipoise.runs.ranks import joined

DESCRIPTION = "Time PPO steps by phase. --gpus 1,2,4 compares numbers of GPUs, --processes 1,2 of processes on the CPU."


def main(argv: list[str]) -> int:
    """Print a line a step and one line of JSON last; of several numbers of processes a table."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--gpus", type=numbers)
    first.add_argument("--processes", type=numbers)
    try:
        own, rest = first.parse_known_args(options.spelled(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; equipoise bench --help lists the options") from None
    default = BenchConfig() if own.preset is None else BenchConfig(train=preset(own.preset))

    def read() -> BenchConfig:
        return options.parse(BenchConfig, rest, default, prog="equipoise bench", description=DESCRIPTION)

    if own.gpus or own.processes:
        into = read().output
        again = [*(["--preset", own.preset] if own.preset else []), *rest]
        counts = [
            *(processes_of(number, None) for number in own.gpus or ()),
            *(processes_of(None, number) for number in own.processes or ()),
        ]
        return _compared(again, counts, into)
    with joined() as ranks:
        only_first_speaks(ranks)
        config = ranks.first_does(read)
        quiet()
        from equipoise.ppo.bench import bench

        result = json.dumps(bench(config, ranks))
        print(result)
        if config.output and ranks.first:
            write_file(Path(config.output), result + "\n")
    return 0


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _compared(argv: list[str], counts: list[int], into: str) -> int:
    """A benchmark in processes of its own for each of the numbers, then the table; `into` gets a line of each."""
    from equipoise.ppo.bench import scaling

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            output = Path(folder) / f"{count}.json"
            print(f"{count} of them:", flush=True)
            if code := launch(["-m", "equipoise", "bench", *argv, "--output", str(output)], count):
                return code
            results.append(read_json(output))
    print("\n".join(scaling(results)))
    if into:
        write_file(Path(into), "".join(json.dumps(result) + "\n" for result in results))
    return 0
