"""`equipoise demo`: the recorded run is a run's, the rest is computed, and nothing of anybody else's is touched."""

import json
import re
import webbrowser
from pathlib import Path

import pytest
import torch

from equipoise.cli import main
from equipoise.commands import demo
from equipoise.methods.ctrlg import writer
from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.prompted import fingerprint
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.ppo import replay
from equipoise.ppo.evaluate import measure
from equipoise.ppo.replay import RECORDED, read_recorded
from equipoise.ppo.summary import training_summary
from equipoise.protocol.marking import in_marks, pieces
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.progress import Progress
from equipoise.runs.stage import Stage
from tests.tiny import words_folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, whose hidden Markov model is small enough to be made; the present folder is empty."""
    monkeypatch.setattr(demo, "HIDDEN_STATES", 4)
    monkeypatch.setattr(demo, "DISTILLED", 40)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(webbrowser, "open", lambda *_: pytest.fail("a browser was opened"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return words_folder(tmp_path / "model")


def show(model: Path) -> int:
    return main(["demo", "--model", str(model)])


def test_the_demo_from_end_to_end_and_again(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare = writer.CtrlG.prepare
    monkeypatch.setattr(writer.CtrlG, "prepare", lambda self, say, may_distil, ranks: prepare(self, say, ranks=ranks))
    # One terminal has room for one bar: the report's texts are counted on the demo's own.
    monkeypatch.setattr(Progress, "__call__", lambda *_: pytest.fail("a second bar"))
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(Stage, "__call__", lambda self, *state: counted.append(state))
    assert show(model) == 0
    assert (180, 180) in counted  # 3 methods, 20 occupations, 3 sentences each
    shown = capfd.readouterr().out
    run = read_recorded()
    assert f"replay: {run.describe()}" in shown
    # Every step of the record and every sample, as training shows them.
    assert re.findall(r"^step (\d+)/20 ", shown, re.M) == [str(i) for i in range(1, 21)]
    for texts in run.samples.values():
        assert all(in_marks(pieces(text, PROTOCOL.lexicon)) in shown for text in texts)
    for name in ("prompt-only", "rlhf", "ctrlg"):
        assert len(Path(f"demo/{name}.csv").read_text().splitlines()) == 1 + 60, name
    assert "Ctrl-G: both classes in 60 of 60, strict success in 60; sampled now" in shown
    recorded = [text for _, text in run.final[:20]]
    assert all(text in Path("demo/rlhf.csv").read_text() for text in recorded)
    assert f"{recorded[0]}" in shown.replace("[", "").replace("]", "").replace("{", "").replace("}", "")
    assert "demo/report.html" in shown and "data-value" in Path("demo/report.html").read_text()
    # Again: replaced, since all of it is ours.
    monkeypatch.setattr(demo.Live, "report", lambda self: Path("demo/report.html"))
    assert show(model) == 0


def test_another_model_has_no_hidden_markov_model_and_does_without(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.Live, "report", lambda self: Path("demo/report.html"))
    assert show(model) == 0
    shown = capsys.readouterr().out
    assert "Ctrl-G is left out: there is no hidden Markov model of this very model" in shown
    assert "distilling" not in shown and not Path("demo/ctrlg.csv").exists()


@pytest.mark.parametrize("what", ["file", "folder", "link", "record"])
def test_what_is_not_a_demos_is_left_alone(what: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("demo")
    if what == "file":
        folder.write_text("mine")
    elif what == "link":
        Path("elsewhere").mkdir()
        folder.symlink_to("elsewhere")
    else:
        folder.mkdir()
        (folder / ("demo.json" if what == "record" else "mine.txt")).write_text("{}")
    before = sorted(path.name for path in Path().rglob("*"))
    assert show(model) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "choose another --output-dir" in printed.err
    assert sorted(path.name for path in Path().rglob("*")) == before


def test_a_file_of_ones_own_in_a_demos_folder_is_kept(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("demo")
    folder.mkdir()
    (folder / "demo.json").write_text('{"written_by": "equipoise"}')
    (folder / "rlhf.csv").write_text("my,own,table\n")
    assert show(model) == 2
    assert (folder / "rlhf.csv").read_text() == "my,own,table\n" and "move it away" in capsys.readouterr().err


def test_a_browser_opens_only_before_someone_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name in ("CI", "PYTEST_CURRENT_TEST", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not demo._has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert demo._has_display()
    for name in ("CI", "PYTEST_CURRENT_TEST"):
        with monkeypatch.context() as one:
            one.setenv(name, "true")
            assert not demo._has_display()
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert not demo._has_display()


# What is packaged.


def test_the_packaged_run_is_what_its_summary_says() -> None:
    run = read_recorded()
    config = run.record["config"]
    assert (config["preset"], config["steps"], run.task) == ("bundled-cpu", 20, PROTOCOL)
    assert [row["step"] for row in run.steps] == list(range(1, 21))
    told = training_summary(run.steps, run.summary["exported_step"])
    assert {key: run.summary[key] for key in told} == told
    occupations, texts = zip(*run.final, strict=True)
    found = measure(texts, occupations, PROTOCOL)
    assert {key: run.summary["final"][key] for key in found} == pytest.approx(found)
    assert run.summary["reward_first"] < 0.35 and found["both"] >= 0.85
    # Samples are sentences of their step: as many of each step as a console shows, each of another occupation.
    assert set(run.samples) == {1, 5, 10, 15, 20} and all(len(texts) == 6 for texts in run.samples.values())
    assert sum(path.stat().st_size for path in RECORDED.iterdir()) < 300_000
    assert run.describe().startswith("recorded on 2026-11-28, seed 0, by `train_rlhf.py --preset bundled-cpu --seed 0`")


def test_the_packaged_hidden_markov_model_is_the_bundled_models_and_small() -> None:
    assert writer.PACKAGED.stat().st_size < 1_000_000
    model, metadata, more = HMM.load(writer.PACKAGED)
    made = json.loads(metadata["distillation"])
    assert made["weights"] == fingerprint(resolve("bundled"))
    assert (made["hidden_states"], made["sentences"]) == (demo.HIDDEN_STATES, demo.DISTILLED)
    assert made["version"] == writer.HMM_VERSION
    assert model.emission_SH.shape[1] == model.transition_HH.shape[0] == demo.HIDDEN_STATES
    assert len(model.initial_PH) == len(PROTOCOL.names) and int(more["symbols"].max()) + 1 == len(model.emission_SH)
    ones = torch.ones(demo.HIDDEN_STATES)
    torch.testing.assert_close(model.emission_SH.sum(0), ones)
    torch.testing.assert_close(model.transition_HH.sum(1), ones)
    assert model.emission_SH.dtype == torch.float32 and (model.emission_SH.sum(1) > 0).all()


def test_the_replay_keeps_the_recorded_times_and_waits_as_long_as_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    run = read_recorded()
    with open("/dev/null", "w") as nowhere:
        replay.replay(run, nowhere, 12.0, waited.append)
    assert len(waited) == 20 and sum(waited) == pytest.approx(12.0)


@pytest.mark.slow
def test_the_real_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The bundled model, its packaged hidden Markov model, and the report."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(resolve("bundled"))
    assert prompt_ids(tokenizer, PROTOCOL.default_prompt, PROTOCOL.names[0], PROTOCOL)
    assert main(["demo"]) == 0
    shown = capfd.readouterr().out
    assert "Ctrl-G: both classes in 60 of 60, strict success in 60; sampled now" in shown
    assert "distilling" not in shown and Path("demo/report.html").exists()
