"""Time the steps that matter and name what got slower, or larger, than this device's baseline: `make bench`.

    python benchmarks/guard.py [--record] [--peer-s SECONDS] [--only NAME] [--baselines FOLDER]

Seconds are compared as what the same machine's large matrix product could have done meanwhile (seconds times measured
TFLOP/s), so that a slower card or host is not called a regression. Ends with 1 where something is more than 5 % above
the baseline, with 0 where there is none for this device: `--record` writes one, to be kept with the code that it is of.
`--peer-s`: seconds of a peer's step on this machine (`benchmarks/against_peer.py` measures them), kept as a ratio.
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from against_peer import GUIDE_STEP, last_json

MOST = 1.05
"""What a number may be, as a multiple of the baseline's."""
LEAST = 0.03
"""Share of the step that a phase has to have grown by: the shortest ones vary by more than 5 % of themselves."""
PHASES = ("step", "sample", "score", "update")
GPU = {
    # No update may end before the others, whatever its sentences were.
    "8b": [*GUIDE_STEP, *shlex.split("--target-kl 1000 --bench-steps 9")],
    "8b in 8 bits": [*GUIDE_STEP, *shlex.split("--use-8bit --target-kl 1000 --bench-steps 9")],
    "bundled, all weights": shlex.split("--preset bundled-gpu --full-length --target-kl 1000 --bench-steps 20"),
}
CPU = {
    "bundled, LoRA": shlex.split("--preset bundled-cpu --full-length --target-kl 1000 --bench-steps 3 --bench-warmup 1")
}
KEPT = ("step_s", "sample_s", "reward_s", "score_s", "update_s", "rest_s", "tflops", "matmul_tflops", "peak_gb")


def device_name() -> str:
    """The GPU's, or the processor's with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"CPU {found[1] if found else ''} {os.cpu_count()} cores"


def file_of(device: str, folder: Path) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def recorded(results: dict[str, dict[str, Any]], device: str, peer_s: float | None) -> dict[str, Any]:
    """The document of a baseline."""
    first = next(iter(results.values()))
    cases = {
        name: {key: round(result[key], 4) for key in KEPT}
        | {"of_matmul": round(result["tflops"] / result["matmul_tflops"], 4), "updates": result["updates"]}
        | {"base_weights": result["base_weights"]}
        for name, result in results.items()
    }
    versions = {name: first[name] for name in ("equipoise", "torch", "transformers")}
    document: dict[str, Any] = {"device": device, "versions": versions, "cases": cases}
    if peer_s:
        ratios = {name: round(peer_s / r["step_s"], 2) for name, r in results.items() if name.startswith("8b")}
        document["peer"] = {"step_s": peer_s, "times_as_fast": ratios}
    return document


def slower(result: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A line for each phase, and the memory, that is above its baseline."""
    if result["updates"] != before["updates"]:
        return [f"does {result['updates']:g} updates a step where the baseline did {before['updates']:g}: other work"]
    here, there = result["matmul_tflops"], before["matmul_tflops"]
    lines = []
    for phase in PHASES:
        now, then = result[f"{phase}_s"] * here, before[f"{phase}_s"] * there
        if now > MOST * then and now - then > LEAST * before["step_s"] * there:
            lines.append(
                f"{phase} takes {now / then - 1:.0%} longer than the baseline: {result[f'{phase}_s']:.3f} s at "
                f"{here:.0f} TFLOP/s, {before[f'{phase}_s']:.3f} s at {there:.0f}"
            )
    if result["peak_gb"] > MOST * before["peak_gb"]:
        lines.append(f"memory is {result['peak_gb']:.1f} GB where the baseline took {before['peak_gb']:.1f}")
    return lines


def read_baseline(path: Path) -> dict[str, Any] | None:
    """None where there is none. Ends the program with 2 for a file that is no baseline."""
    try:
        document = json.loads(path.read_text())
        wanted = (*(f"{phase}_s" for phase in PHASES), "matmul_tflops", "peak_gb", "updates")
        for case in document["cases"].values():
            assert all(float(case[key]) >= 0 for key in wanted) and case["matmul_tflops"] > 0
        dict(document["versions"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        print(f"{path} is no baseline ({error!r:.80}): restore it, or write it anew with --record", file=sys.stderr)
        raise SystemExit(2) from None
    return document  # type: ignore[no-any-return]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the baseline of this device")
    parser.add_argument("--peer-s", type=float, help="seconds of a peer's step on this machine")
    parser.add_argument("--only", help="one of the cases")
    parser.add_argument("--baselines", type=Path, default=Path(__file__).parent / "baselines")
    args = parser.parse_args(argv)
    device = device_name()
    cases = CPU if device.startswith("CPU ") else GPU
    if args.only and args.only not in cases:
        parser.error(f"--only {args.only!r}: choose {', '.join(map(repr, cases))}")
    if args.only and args.record:
        parser.error("--record writes a baseline of all cases: leave --only out")
    path = file_of(device, args.baselines)
    before = None if args.record else read_baseline(path)
    if before is None and not args.record:
        print(f"no baseline for {device}: python benchmarks/guard.py --record writes {path}")
        return 0
    results = {}
    for name in [args.only] if args.only else cases:
        results[name] = result = last_json([sys.executable, "-m", "equipoise", "bench", *cases[name]])
        print(
            f"{name}: {result['step_s']:.3f} s a step (sample {result['sample_s']:.3f}, score {result['score_s']:.3f}, "
            f"update {result['update_s']:.3f}), {result['tflops']:.0f} of {result['matmul_tflops']:.0f} TFLOP/s, "
            f"{result['peak_gb']:.1f} GB",
            flush=True,
        )
    if before is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(recorded(results, device, args.peer_s), indent=1) + "\n")
        print(f"written: {path}")
        return 0
    for name, version in before["versions"].items():
        if (now := next(iter(results.values()))[name]) != version and name != "equipoise":
            print(f"note: {name} is {now}, the baseline's was {version}")
    known = {name: case for name, case in before["cases"].items() if name in results}
    found = [f"{name}: {line}" for name, case in known.items() for line in slower(results[name], case)]
    new = [f"{name}: not in the baseline" for name in results if name not in known]
    print("\n".join([*new, *(found or [f"nothing above {path.name}"])]))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
