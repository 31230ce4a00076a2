"""`make bench`: what counts as slower, and what happens where there is no baseline."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEP = {
    "equipoise": "1", "torch": "2", "transformers": "5", "base_weights": None, "updates": 16.0,
    "step_s": 1.0, "sample_s": 0.25, "reward_s": 0.01, "score_s": 0.1, "update_s": 0.6, "rest_s": 0.05,
    "tflops": 200.0, "matmul_tflops": 800.0, "peak_gb": 20.0,
}  # fmt: skip


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = importlib.import_module("guard")
    monkeypatch.setattr(made, "device_name", lambda: "NVIDIA X100 (80 GB)")
    return made


def times(monkeypatch: pytest.MonkeyPatch, guard: ModuleType, **changed: Any) -> None:
    monkeypatch.setattr(guard, "last_json", lambda command: STEP | changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"step_s": 1.04, "update_s": 0.62}, []),
        ({"step_s": 1.06, "update_s": 0.66}, ["step takes 6% longer", "update takes 10% longer"]),
        # A card or a host at half the speed, all of it.
        ({"step_s": 2.0, "sample_s": 0.5, "score_s": 0.2, "update_s": 1.2, "matmul_tflops": 400.0}, []),
        # As many seconds on a card of twice the speed.
        ({"matmul_tflops": 1600.0}, [f"{phase} takes 100% longer" for phase in ("step", "sample", "score", "update")]),
        ({"score_s": 0.12}, []),  # a fifth of a tenth of the step
        ({"sample_s": 0.29}, ["sample takes 16% longer than the baseline: 0.290 s at 800 TFLOP/s, 0.250 s at 800"]),
        ({"peak_gb": 21.5}, ["memory is 21.5 GB where the baseline took 20.0"]),
        ({"updates": 8.0, "step_s": 0.7}, ["does 8 updates a step where the baseline did 16"]),
    ],
)
def test_what_grew_by_more_than_a_20th_is_named_in_units_of_the_matrix_product(
    guard: ModuleType, changed: dict[str, Any], named: list[str]
) -> None:
    lines = guard.slower(STEP | changed, STEP)
    assert len(lines) == len(named) and all(n in line for n, line in zip(named, lines, strict=True))


def test_a_baseline_is_recorded_compared_with_and_named_where_it_is_missing(
    guard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, argv = tmp_path / "deep" / "nvidia-x100-80-gb.json", ["--baselines", str(tmp_path / "deep")]
    times(monkeypatch, guard)
    assert guard.main(argv) == 0
    assert f"--record writes {path}" in capsys.readouterr().out and not path.exists()
    assert guard.main([*argv, "--record", "--peer-s", "7.5"]) == 0
    document = json.loads(path.read_text())
    assert document["device"] == "NVIDIA X100 (80 GB)" and document["peer"]["times_as_fast"]["8b"] == 7.5
    assert document["versions"] == {"equipoise": "1", "torch": "2", "transformers": "5"}
    assert all(case["of_matmul"] == 0.25 and case["peak_gb"] == 20 for case in document["cases"].values())
    assert guard.main(argv) == 0
    assert "nothing above" in capsys.readouterr().out
    times(monkeypatch, guard, step_s=1.2, update_s=0.8, torch="3")
    assert guard.main([*argv, "--only", "8b"]) == 1
    printed = capsys.readouterr().out
    assert "8b: step takes 20% longer" in printed and "note: torch is 3, the baseline's was 2" in printed


def test_wrong_options_and_a_damaged_baseline_are_one_line_and_code_2(
    guard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times(monkeypatch, guard)
    path, argv = tmp_path / "nvidia-x100-80-gb.json", ["--baselines", str(tmp_path)]
    for text in ("", "{", "[]", "{}", '{"cases": {"8b": {}}}', '{"cases": {"8b": 3}, "versions": {}}'):
        path.write_text(text)
        with pytest.raises(SystemExit) as ended:
            guard.main(argv)
        assert ended.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    for wrong in (["--only", "9b"], ["--only", "8b", "--record"]):
        with pytest.raises(SystemExit) as ended:
            guard.main([*argv, *wrong])
        assert ended.value.code == 2


def test_the_cases_are_command_lines_that_the_benchmark_takes(guard: ModuleType) -> None:
    from equipoise import options
    from equipoise.ppo.presets import preset
    from equipoise.ppo.tool_config import BenchConfig

    for argv in (*guard.GPU.values(), *guard.CPU.values()):
        rest = list(argv)
        default = BenchConfig()
        if "--preset" in rest:
            place = rest.index("--preset")
            default = BenchConfig(train=preset(rest[place + 1]))
            del rest[place : place + 2]
        options.parse(BenchConfig, rest, default, prog="equipoise bench", description="")


def test_the_baselines_that_are_kept_can_be_read(guard: ModuleType) -> None:
    for path in (BENCHMARKS / "baselines").glob("*.json"):
        document = guard.read_baseline(path)
        assert guard.file_of(document["device"], path.parent) == path
        assert document["cases"].keys() == (guard.CPU if document["device"].startswith("CPU ") else guard.GPU).keys()


def test_a_cpu_is_named_with_its_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    made = importlib.import_module("guard")
    name = made.device_name()
    assert name.startswith("CPU ") and name.endswith(" 7 cores")
    assert made.file_of(name, Path("x")).name.endswith("7-cores.json")
