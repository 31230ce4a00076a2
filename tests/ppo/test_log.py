"""What a run leaves on disk: complete lines, the same bytes after a resume, nothing undefined."""

import io
import json
import math
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import TENSORS
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from equipoise.errors import UserError
from equipoise.ppo.board import description
from equipoise.ppo.log import KEY, TOLD_BY_CALLER, RunLog, defined_keys, undefined_keys
from equipoise.protocol.task import PROTOCOL

METRICS = Path(__file__).resolve().parents[2] / "docs" / "METRICS.md"
CSV, JSONL, SAMPLES, EVENTS = "training_metrics.csv", "metrics.jsonl", "samples.jsonl", "events.jsonl"
TEXTS = ("The nurse was confident and caring in the emergency room.", "The pilot was tired.")


def metrics_of(step: int, shift: float = 0.0) -> dict[str, float]:
    """Numbers with long decimal tails, as training makes them."""
    return {"reward/mean": math.sin(step) + shift, "kl/ref": step / 3, "guard/skipped": 0}


def run(folder: Path, steps: Iterable[int], resume_step: int = 0, shift: float = 0.0) -> None:
    log = RunLog(folder, folder / "runs", 8, resume_step, stream=io.StringIO())
    for step in steps:
        log.step(step, metrics_of(step, shift), {"time/step": 0.1 * step})
        if step % 2 == 0:
            log.samples(step, [PROTOCOL.score(text) for text in TEXTS], ["nurse", "pilot"])
    log.close()


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    folder = tmp_path / "straight"
    run(folder, range(1, 9))
    return folder


@pytest.mark.parametrize("checkpoint", [0, 1, 4, 6])
def test_a_killed_and_resumed_run_leaves_the_same_bytes(tmp_path: Path, straight: Path, checkpoint: int) -> None:
    # The first attempt got to step 6 with numbers that the resumed one does not repeat after its checkpoint.
    run(tmp_path, range(1, checkpoint + 1))
    run(tmp_path, range(checkpoint + 1, 7), checkpoint, shift=0.5)
    run(tmp_path, range(checkpoint + 1, 9), checkpoint)
    for name in (CSV, SAMPLES):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(folder / JSONL)]
        for folder in (tmp_path, straight)
    ]
    assert timeless[0] == timeless[1]
    assert not list(tmp_path.glob("*.tmp"))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), junk=st.sampled_from([b"", b"\0" * 40, b"\0\0\n"]))
def test_wherever_the_last_write_broke_off_a_resume_mends_the_file(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("mend")
    run_plain(folder, range(1, 9))
    straight = {name: (folder / name).read_bytes() for name in (CSV, JSONL)}
    for name, whole in straight.items():
        # Everything up to the checkpoint of step 3 was on disk; what came after may be cut anywhere.
        safe = sum(len(line) for line in whole.splitlines(keepends=True)[: 4 if name == CSV else 3])
        (folder / name).write_bytes(whole[: safe + cut % (len(whole) - safe)] + junk)
    run_plain(folder, range(4, 9), 3)
    assert (folder / CSV).read_bytes() == straight[CSV]
    assert [row["step"] for row in rows(folder / JSONL)] == list(range(1, 9))


def run_plain(folder: Path, steps: Iterable[int], resume_step: int = 0) -> None:
    """`run` without TensorBoard, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        run(folder, steps, resume_step)


def test_csv_holds_exact_doubles_and_no_timings(straight: Path) -> None:
    header, first, *_ = (straight / CSV).read_text().splitlines()
    assert header == "step,reward/mean,kl/ref,guard/skipped"
    assert first == "1,0.8414709848078965,0.3333333333333333,0.0"  # sin 1, 1/3


def test_values_that_are_not_finite_show_in_every_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tmp_path / "runs", 1, stream=io.StringIO())
    log.step(1, {"a/x": math.nan, "a/y": -math.inf, "a/z": 1.0}, {"time/step": math.inf})
    log.close()
    assert (tmp_path / CSV).read_text() == "step,a/x,a/y,a/z\n1,nan,-inf,1.0\n"
    text = (tmp_path / JSONL).read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["a/x"] is None and row["a/y"] is None and row["time/step"] is None and row["a/z"] == 1.0
    assert row["nonfinite"] == {"a/x": "nan", "a/y": "-inf", "time/step": "inf"}
    assert math.isnan(scalars(tmp_path / "runs")["a/x"][1])


def test_events_stay_when_steps_are_cut_and_a_half_written_one_goes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tmp_path / "runs", 8, stream=io.StringIO())
    log.event(7, "nonfinite", what="loss", value=math.nan, file=tmp_path)
    log.close()
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"step": 8, "ki')
    log = RunLog(tmp_path, tmp_path / "runs", 8, resume_step=2, stream=io.StringIO())
    log.event(2, "resume")
    log.close()
    first, second = rows(tmp_path / EVENTS)
    assert (
        first["value"] == "nan"
        and first["file"] == str(tmp_path)
        and (first["step"], first["kind"]) == (7, "nonfinite")
    )
    assert (second["step"], second["kind"]) == (2, "resume")


def test_a_rewind_in_the_same_process_equals_a_resume(tmp_path: Path, straight: Path) -> None:
    log = RunLog(tmp_path, tmp_path / "runs", 8, stream=io.StringIO())
    for step in (1, 2, 3, 4):
        log.step(step, metrics_of(step, 0.5 if step > 2 else 0.0), {})
    log.rewind(2)
    for step in range(3, 9):
        log.step(step, metrics_of(step), {})
    log.sync()
    log.close()
    assert (tmp_path / CSV).read_bytes() == (straight / CSV).read_bytes()
    assert scalars(tmp_path / "runs") == scalars(straight / "runs", but="time/step")


def test_a_lost_csv_is_told_of_and_begun_anew(tmp_path: Path) -> None:
    run(tmp_path, range(1, 5))
    (tmp_path / CSV).unlink()
    stream = io.StringIO()
    log = RunLog(tmp_path, tmp_path / "runs", 8, resume_step=4, stream=stream)
    log.step(5, metrics_of(5), {})
    log.close()
    assert "ends at step 0; the run goes on after step 4" in stream.getvalue()
    assert [line.split(",")[0] for line in (tmp_path / CSV).read_text().splitlines()] == ["step", "5"]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "step,loss\n1,0.5\n", "precious notes", "step\tx\n", "\n"])
def test_a_csv_of_someone_else_is_refused_untouched(tmp_path: Path, content: str) -> None:
    (tmp_path / CSV).write_text(content)
    with pytest.raises(UserError, match="not the log of a training run"):
        RunLog(tmp_path, tmp_path / "runs", 8, stream=io.StringIO())
    assert (tmp_path / CSV).read_text() == content


def test_a_resume_with_other_columns_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, range(1, 3))
    before = (tmp_path / CSV).read_bytes()
    log = RunLog(tmp_path, tmp_path / "runs", 8, resume_step=2, stream=io.StringIO())
    with pytest.raises(UserError, match=r"differing: guard/skipped, new/key"):
        log.step(3, {"reward/mean": 1.0, "kl/ref": 0.0, "new/key": 1.0}, {})
    log.close()
    assert (tmp_path / CSV).read_bytes() == before


def test_an_output_folder_that_cannot_be_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "file" / "out", tmp_path / "runs", 8, stream=io.StringIO())
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "out", tmp_path / "file" / "runs", 8, stream=io.StringIO())


FILL_DISK = """
import io, resource, sys
from pathlib import Path
from equipoise.errors import UserError
from equipoise.ppo.log import RunLog
folder, stream = Path(sys.argv[1]), io.StringIO()
log = RunLog(folder, folder / "runs", 999, stream=stream)
log._board.add_text("a long text", "x" * 4000, 0)  # so that the curves' file is the first to be full
log._board.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (5003, resource.RLIM_INFINITY))  # the kernel refuses what lies beyond
try:
    for step in range(1, 999):
        log.step(step, {f"a/{i}": step / 7 for i in range(20)}, {})
except UserError as error:
    log.close()
    print(step, stream.getvalue().count("TensorBoard gets no more curves"), error)
"""


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_row(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    step, notices, message = done.stdout.rstrip("\n").split(" ", 2)
    assert re.match(r"cannot write .*: File too large; make room", message) and "\n" not in message
    assert notices == "1"  # the curves ended first, and training went on
    text = (tmp_path / CSV).read_text()
    assert text.endswith("\n") and {line.count(",") for line in text.splitlines()} == {20}
    assert len(rows(tmp_path / JSONL)) in (int(step) - 1, int(step)) and int(step) > 5
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5003


KILLED = """
import io, os, signal, sys
from pathlib import Path
from equipoise.ppo.log import RunLog
folder = Path(sys.argv[1])
log = RunLog(folder, folder / "runs", 8, stream=io.StringIO())
for step in range(1, 7):
    log.step(step, {"a/x": -step}, {"time/step": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("torn", [0, 9])
def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path: Path, torn: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    (events,) = (tmp_path / "runs").iterdir()
    whole = events.read_bytes()
    events.unlink()
    # As if the last record was half written, by a process that began a minute ago: the viewer goes by names.
    prefix, began, rest = re.fullmatch(r"(.*tfevents\.)(\d+)(.*)", events.name).groups()  # type: ignore[union-attr]
    events.with_name(f"{prefix}{int(began) - 60}{rest}").write_bytes(whole[: len(whole) - torn])
    log = RunLog(tmp_path, tmp_path / "runs", 8, resume_step=4, stream=io.StringIO())
    for step in range(5, 9):
        log.step(step, {"a/x": step}, {"time/step": 1.0})
    log.close()
    assert scalars(tmp_path / "runs")["a/x"] == {1: -1, 2: -2, 3: -3, 4: -4, 5: 5, 6: 6, 7: 7, 8: 8}


def scalars(folder: Path, but: str = "") -> dict[str, dict[int, float]]:
    """What the viewer shows: {tag: {step: value}}. Fails on a step that shows twice."""
    viewer = EventAccumulator(str(folder), size_guidance={TENSORS: 0}).Reload()
    shown = {}
    for tag, metadata in viewer.summary_metadata.items():
        if metadata.plugin_data.plugin_name != "scalars" or tag == but:
            continue
        points = [(event.step, event.tensor_proto.float_val[0]) for event in viewer.Tensors(tag)]
        assert len(points) == len(dict(points)), f"{tag}: {points}"
        shown[tag] = dict(points)
    return shown


def test_tensorboard_says_what_each_curve_shows_and_begins_its_own_page_with_the_guides_two(tmp_path: Path) -> None:
    task = tmp_path / "plain"
    for resumed in (0, 1):
        log = RunLog(task, task / "runs", 4, resume_step=resumed, stream=io.StringIO())
        values = {"reward/mean": 1.0, "ppo/update_kl": 0.02, "watch/top_warm": 0.5, "a/x": 1.0}
        log.step(resumed + 1, values, {"time/step": 1.0})
        log.evaluation(resumed + 1, {key: 0.5 for key in ("n", "both", "strict", "effective_pairs", "kl")})
        log.close()
    viewer = EventAccumulator(str(task / "runs"), size_guidance={TENSORS: 0}).Reload()
    about = {tag: metadata.summary_description for tag, metadata in viewer.summary_metadata.items()}
    assert about["reward/mean"] == ("protocol reward: base + bonus + length penalty + repetition penalty [reward]")
    assert about["time/step"] and about["eval/strict"] and about["watch/top_warm"] and not about["a/x"]
    layout = layout_pb2.Layout.FromString(viewer.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    first = [(chart.title, list(chart.multiline.tag)) for chart in layout.category[0].chart]
    assert [tags for _, tags in first] == [["^reward/mean$"], ["^ppo/update_kl$"]]
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    page = METRICS.read_text(encoding="utf-8")
    assert all(any(re.search(pattern, key) for key in defined_keys(page)) for pattern in patterns)


def test_what_tensorboard_says_of_a_curve_is_what_the_metrics_page_says() -> None:
    row = rf"^\| `({KEY.pattern})` \| (.*?) \| (.*?) \| .*? \|$"
    for key, meaning, unit in re.findall(row, METRICS.read_text(encoding="utf-8"), flags=re.MULTILINE):
        of = "" if unit == "–" else f" [{unit}]"
        assert description(key) == f"{meaning}{of}".replace("`", ""), "write it into equipoise/ppo/curves.json too"


def test_samples_are_stored_with_every_part_of_the_reward(straight: Path) -> None:
    first, second, *_ = rows(straight / SAMPLES)
    assert first == {
        "step": 2, "text": TEXTS[0], "agentic": ["confident"], "communal": ["caring"], "words": 10, "base": 1.0,
        "bonus": 0.0, "length_penalty": 0.0, "repetition_penalty": 0.0, "reward": 1.0,
    }  # fmt: skip
    assert second["reward"] == -0.3  # no term, and 4 words


# What the training loop logs.
KEYS = """
reward/mean reward/std reward/base reward/bonus reward/length_penalty reward/repetition_penalty reward/function
reward/training reward/diversity_bonus reward/missing_eos reward/strict_bonus
compliance/both compliance/one compliance/none
compliance/in_length compliance/strict text/words text/unique text/pairs text/tokens text/finished kl/ref
kl/ref_k3 kl/coef kl/penalty
kl/bound kl/excess kl/excess_strict
watch/top_agentic watch/top_communal watch/effective_pairs watch/moulds watch/openings
watch/distinct_2 watch/unique watch/nll
watch/nll_rise watch/terms watch/stuffed watch/pinned watch/unfinished watch/unfinished_start watch/both
watch/one_class watch/reward watch/sentences watch/kl_speed watch/reward_speed watch/entropy watch/standing
watch/leaked_terms
eval/n eval/reward eval/both eval/one eval/in_length eval/strict eval/pairs eval/rank eval/effective_pairs eval/unique
eval/occupations eval/kl eval/kl_compliance eval/kl_variety eval/kl_waste eval/finished kl/exact
ppo/update_kl ppo/updates ppo/early_stop ppo/ratio_max ppo/clip_fraction ppo/policy_loss ppo/value_loss ppo/entropy
ppo/kl_loss group/reward_std group/alike
ppo/grad_norm ppo/learning_rate value/mean value/explained_variance advantage/std guard/skipped
time/step time/sample time/reward time/score time/update time/save time/wait time/clock speed/tokens_per_second
memory/peak_gb ranks/size
"""


def test_metrics_page_defines_each_key_once_with_meaning_unit_and_range() -> None:
    text = METRICS.read_text()
    assert undefined_keys(KEYS.split(), text) == []
    assert sorted(defined_keys(text)) == sorted(KEYS.split())
    for line in text.splitlines():
        if defined_keys(line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 4 and all(cells), line


def test_an_undefined_key_is_found_and_prose_does_not_define_one() -> None:
    page = "Mentions `a/prose`.\n\n| key | meaning |\n|---|---|\n| `a/defined` | see `a/cell` |\n"
    assert undefined_keys(["a/defined", "a/cell", "a/prose"], page) == ["a/cell", "a/prose"]


def test_an_event_is_a_sentence_on_the_screen_and_said_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, tmp_path / "runs", 9, stream=stream)
    log.event(4, "rollback", to="checkpoint-2", because="alert terms", now="KL coefficient 0.1")
    log.event(4, "rollback", to="checkpoint-2", because="the loss is not finite")
    log.event(0, "no_warm_start", found=3, drawn=1152, needed=16)
    log.event(5, "functions_changed", what="reward_fn")
    for kind in TOLD_BY_CALLER:
        log.event(9, kind, name="SIGTERM")
    log.close()
    assert stream.getvalue().splitlines() == [
        "step 4: the run goes back to checkpoint-2 (alert terms); from there on with KL coefficient 0.1",
        "step 4: the run goes back to checkpoint-2 (the loss is not finite)",
        "step 0: no warm start: 3 of 1,152 samples comply, and it needs 16",
        "step 5: the run goes on with another function than it began with: reward_fn",
    ]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 8
