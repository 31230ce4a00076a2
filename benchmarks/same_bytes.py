"""Whether this tree computes, byte for byte, what another revision computed: python benchmarks/same_bytes.py REVISION

Both trees run the same command lines on a CPU: training (a tiny model with adapters and with all weights, two steps of
the bundled model), every way to write sentences, supervised fine-tuning, evaluation and scoring. What decides a number
is compared: metrics, samples, sentences, weights, tables. Records that name commits, times and versions are not. The
results of a revision are kept in --folder, so that they are computed once. Run it before and after moving code.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TINY = (
    "--preset bundled-cpu --model ../words --prompt raw --dtype float32 --steps 6 --batch-size 16 --mini-batch-size 8"
)
TINY += " --micro-batch-size 4 --warm-start off --learning-rate 3e-3 --max-new-tokens 10 --base-samples 40"
TINY += " --eval-sentences 40 --final-sentences 60 --save-every 2 --sample-every 2"
BUNDLED = "--preset bundled-cpu --steps 2 --batch-size 16 --mini-batch-size 8 --warm-start-sentences 16"
# What the preset held then, so that it may change.
BUNDLED += " --warm-start-learning-rate 5e-4 --learning-rate 5e-5"
BUNDLED += " --warm-start-epochs 1 --warm-start-budget 512 --eval-sentences 20 --final-sentences 20 --max-new-tokens 20"
SAMPLE = "sample --model out-lora --n 4 --prompt raw --dtype float32 --device cpu --kl-sentences 20"

COMMANDS = (
    f"train {TINY} --output-dir out-lora --checkpoint-dir c1 --tensorboard-dir runs --lora-rank 4",
    f"train {TINY} --output-dir out-full --checkpoint-dir c2 --tensorboard-dir runs --tuning full --seed 3 --holdout"
    " --average-weights 0.9 --opening-weight 0.1 --missing-eos-penalty 0.1",
    f"train {BUNDLED} --output-dir out-bundled --checkpoint-dir c3 --tensorboard-dir runs",
    "generate --model out-full --n 3 --output generated.csv --dtype float32 --device cpu",
    f"{SAMPLE} --method prompt-only --output prompt-only.csv",
    f"{SAMPLE} --method gen-filter --output gen-filter.csv",
    f"{SAMPLE} --method ctrlg --output ctrlg.csv --shape free --distil-sentences 400 --hidden-states 8",
    "sample --model bundled --method prompt-best --n 1 --kl-sentences 0 --output prompt-best.csv --device cpu",
    "sft --data gen-filter.csv --filter both --output-dir sft --model ../words --prompt raw --dtype float32"
    " --device cpu --epochs 2 --check 0",
    "evaluate generated.csv prompt-only.csv gen-filter.csv ctrlg.csv --no-fluency --output evaluation",
    'score "The nurse was confident, bold and caring in the emergency room."',
    "score --json",
)
LINES = "The nurse was confident and caring in the emergency room.\nThe pilot was bold. She was self\u2010reliant.\n\n"
COMPARED = ("*.csv", "*.safetensors", "*.jsonl")
PASSED_OVER = {"metrics.jsonl", "events.jsonl"}
"""They hold durations and times of day."""


def results(tree: Path, folder: Path) -> None:
    """Run every command of `tree` in `folder`. Raises CalledProcessError."""
    place = folder / "run"
    place.mkdir(parents=True)
    sys.path.insert(0, str(ROOT))
    from tests.tiny import words_folder

    words_folder(folder / "words")
    environment = dict(os.environ) | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2", "EQUIPOISE_CACHE": str(folder)}
    for number, line in enumerate(COMMANDS):
        print(f"  {line[:110]}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "equipoise", *shlex.split(line)],
            cwd=place, env=environment, input=LINES, text=True, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{tree}: {line}\nended with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        if line.startswith("score"):
            (place / f"score-{number}.csv").write_text(done.stdout)


def digests(folder: Path) -> dict[str, str]:
    place = folder / "run"
    found = sorted({path for pattern in COMPARED for path in place.rglob(pattern) if path.name not in PASSED_OVER})
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if not path.relative_to(place).parts[0].startswith(("c1", "c2", "c3", "runs"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision", help="the commit to compare this tree with")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "equipoise-same-bytes")
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", options.revision], capture_output=True, text=True, check=True)
    before = options.folder / commit.stdout.strip()
    if not (before / "done").exists():
        print(f"{options.revision}:")
        with tempfile.TemporaryDirectory() as tree:
            subprocess.run([*git, "worktree", "add", "--detach", tree, options.revision], check=True)
            try:
                results(Path(tree), before)
            finally:
                subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)
        (before / "done").touch()
    print("this tree:")
    with tempfile.TemporaryDirectory() as now:
        results(ROOT, Path(now))
        old, new = digests(before), digests(Path(now))
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    print(f"{len(old)} files of {options.revision}, {len(new)} of this tree, {len(differing)} differ")
    print("\n".join(f"  differs: {name}" for name in differing))
    sys.exit(bool(differing) or not old)


if __name__ == "__main__":
    main()
