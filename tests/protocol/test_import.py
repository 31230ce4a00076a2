"""The floor under everything: the reward loads in milliseconds and without any numerical library."""

import json
import os
import subprocess
import sys

HEAVY = ["numpy", "peft", "tokenizers", "torch", "transformers"]


def loaded_by(statement: str) -> tuple[set[str], float]:
    """The top-level modules that a fresh Python holds after `statement`, and the seconds that it took."""
    code = (
        "import json, sys, time\nstart = time.perf_counter()\n"
        + statement
        + "\nseconds = time.perf_counter() - start\n"
        "print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), seconds]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=True,
    )
    names, seconds = json.loads(done.stderr)
    return set(names), seconds


def test_the_reward_loads_no_numerical_library():
    names, _ = loaded_by("import equipoise.protocol.reward")
    assert "equipoise" in names and not names.intersection(HEAVY)


def test_scoring_on_the_command_line_loads_no_numerical_library():
    names, _ = loaded_by("from equipoise.cli import main; assert main(['score', 'bold']) == 0")
    assert "equipoise" in names and not names.intersection(HEAVY)


def test_the_reward_loads_in_a_fifth_of_a_second():
    # The best of five: the others may meet a busy machine.
    assert min(loaded_by("import equipoise.protocol.reward")[1] for _ in range(5)) < 0.2
