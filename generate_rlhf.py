"""Writes the trained model's sentences to rlhf_llama3_completions.csv; `--help` lists the options.

The same as `equipoise generate`, and it needs no installation of the package: it runs where it lies.
"""

import sys

from equipoise.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
