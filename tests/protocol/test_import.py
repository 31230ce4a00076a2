"""The floor under everything: the reward loads in milliseconds and without any numerical library."""

import json
import os
import subprocess
import sys

HEAVY = ["numpy", "peft", "tokenizers", "torch", "transformers"]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh Python holds after `statement`."""
    code = (
        "import json, sys\n"
        + statement
        + "\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=True,
    )
    return set(json.loads(done.stderr))


def test_the_reward_loads_no_numerical_library():
    names = loaded_by("import equipoise.protocol.reward")
    assert "equipoise" in names and not names.intersection(HEAVY)


def test_scoring_on_the_command_line_loads_no_numerical_library():
    names = loaded_by("from equipoise.cli import main; assert main(['score', 'bold']) == 0")
    assert "equipoise" in names and not names.intersection(HEAVY)


def test_the_reward_loads_hardly_more_than_the_standard_library_has():
    # A count, since durations are those of the machine.
    names = loaded_by("import equipoise.protocol.reward") - loaded_by("pass")
    assert {name for name in names if name not in sys.stdlib_module_names} <= {"equipoise", "yaml", "_yaml"}
