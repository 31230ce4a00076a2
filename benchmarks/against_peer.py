"""Time a step of ours and of a peer's benchmark script on the same machine, in turn, and print the ratio.

    python benchmarks/against_peer.py PATH/peer_trl_ppo.py [--rounds 2] [--peer-args ...] [-- bench options]

The peer prints `RESULT {"median": seconds, "peak_gb": …, …}` last, ours one line of JSON. Each round runs both, as
processes of their own, so that neither finds the other's memory or warmed-up clocks. Without options ours does the
guide's step in the Llama-3.1-8B shape.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

GUIDE_STEP = shlex.split("--model shape:llama-3.1-8b --tuning lora --prompt study --full-length --prompt-tokens 64")


def last_json(command: list[str]) -> dict[str, Any]:
    """The JSON object in the last line a command prints. Ends the program with the command's errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        sys.exit(f"{shlex.join(command)} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT"))
    return result


def main() -> None:
    own_args = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else GUIDE_STEP
    mine = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer-args", default="", help="options for the peer's script, in one string")
    args = parser.parse_args(mine)
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(args.rounds):
        peer = last_json([sys.executable, str(args.peer), *shlex.split(args.peer_args)])
        own = last_json([sys.executable, "-m", "equipoise", "bench", *own_args])
        theirs.append(peer["median"])
        ours.append(own["step_s"])
        print(
            f"round {number + 1}: ours {own['step_s']:.3f} s, {own['peak_gb']:.1f} GB; "
            f"peer {peer['median']:.3f} s, {peer.get('peak_gb') or float('nan'):.1f} GB",
            flush=True,
        )
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(json.dumps({"ours_s": ours, "peer_s": theirs, "ratio": ratio}))


if __name__ == "__main__":
    main()
