"""`equipoise join`: the file whose parts were written with `--part`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from equipoise.methods.parts import join
from equipoise.methods.summary import summary
from equipoise.options import parse


@dataclass(frozen=True)
class JoinConfig:
    name: tyro.conf.Positional[Path] = Path("rlhf_llama3_completions.csv")
    """The file whose parts lie beside it as NAME.part-1-of-8.csv and so on: what --output said when they were
    written."""


def main(argv: list[str]) -> int:
    """Write the file, print a summary and return 0. Raises UserError."""
    config = parse(
        JoinConfig,
        argv,
        JoinConfig(),
        prog="equipoise join",
        description="Put the parts of a file of sentences together. The parts stay as they are.",
    )
    joined = join(config.name)
    print(summary(joined.texts, joined.task))
    if joined.method is not None:
        print("the command that wrote the parts, without --part, adds the KL to the base model; it draws no row anew")
    return 0
