"""Methods side by side: their files, their accounts, and that being killed changes neither."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.methods.completions import COMPARED, Completions, Key
from equipoise.methods.costs import Costs
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.gen_filter import raw_path
from equipoise.methods.generate import GenerateConfig, generate
from equipoise.methods.guided import Guided
from equipoise.methods.sample import LABELS, SampleConfig, sample
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.protocol.task import PROTOCOL, Task
from tests.killing import counted, killed_until_done
from tests.tiny import words_folder

OCCUPATIONS = PROTOCOL.names


def quiet(_line: str) -> None:
    pass


def config(model: Path, output: Path, method: str = "prompt-only", **changes: object) -> SampleConfig:
    settings: dict[str, Any] = {
        "n": 4, "max_new_tokens": 8, "batch_size": 16, "dtype": "float32", "device": "cpu", "kl_sentences": 0,
    }  # fmt: skip
    return SampleConfig(method=method, model=str(model), output=output, **(settings | changes))  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def costs(output: Path) -> dict[str, Any]:
    """The account without what time decides."""
    document = json.loads(output.with_name(output.name + ".costs.json").read_text())
    return {key: value for key, value in document.items() if "seconds" not in key}


def test_the_sentences_are_generates_with_method_and_seed_beside_them(tiny_model: Path, tmp_path: Path) -> None:
    outcome = sample(config(tiny_model, tmp_path / "s.csv", seed=3), quiet)
    plain = GenerateConfig(
        str(tiny_model), tmp_path / "g.csv", n=4, max_new_tokens=8, dtype="float32", device="cpu", seed=3
    )
    assert outcome.texts == generate(plain, quiet).texts
    rows = read(tmp_path / "s.csv")
    assert tuple(rows[0]) == COMPARED
    assert {(r["Method"], r["Seed"], r["Label"]) for r in rows} == {("prompt-only", "3", "Prompt-Only")}
    assert tuple(read(tmp_path / "g.csv")[0]) == COMPARED[:6]
    with pytest.raises(UserError, match="not a completions file: its columns are"):
        sample(config(tiny_model, tmp_path / "g.csv"), quiet)


def test_the_account_counts_sentences_and_their_tokens(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    outcome = sample(config(tiny_model, path, max_new_tokens=1), quiet)
    both = sum(PROTOCOL.match(text).complete for text in outcome.texts.values())
    found = costs(path)
    assert found == {
        "written_by": "equipoise", "method": "prompt-only", "tokens": 80, "generations": 80, "accepted": both,
        "rows": 80, "generations_per_accepted": None,
    }  # fmt: skip
    assert both == 0  # one token cannot hold two terms


@pytest.mark.parametrize("method", ["prompt-only", "gen-filter"])
def test_killed_between_any_two_calls_files_and_account_are_as_if_never_killed(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert sample(config(tiny_model, whole, method), quiet).status == "done"
    calls = counted(lambda: sample(config(tiny_model, tmp_path / "counted.csv", method), quiet).exit_code)
    wanted = config(tiny_model, path, method)
    assert killed_until_done(lambda: sample(wanted, quiet).exit_code, calls, random.Random(11)) >= 3
    assert path.read_bytes() == whole.read_bytes()
    assert costs(path) == costs(whole)
    if method == "gen-filter":
        assert raw_path(path).read_bytes() == raw_path(whole).read_bytes()


def test_killed_between_rows_and_account_the_batch_is_paid_for_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "out.csv"
    sample(config(tiny_model, whole), quiet)
    write = Costs.write

    def fail(self: Costs) -> None:
        if self.generations >= 32:
            raise KeyboardInterrupt
        write(self)

    monkeypatch.setattr(Costs, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        sample(config(tiny_model, path), quiet)
    monkeypatch.undo()
    assert len(read(path)) == 32 and costs(path)["generations"] == 16
    sample(config(tiny_model, path), quiet)
    assert costs(path) == costs(whole) and path.read_bytes() == whole.read_bytes()


def test_a_lost_account_is_made_again_by_computing_the_rows_again(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    sample(config(tiny_model, path), quiet)
    before, rows = costs(path), path.read_bytes()
    account = path.with_name("out.csv.costs.json")
    half = account.read_bytes()[:100]
    for damage in (b"", half, b'{"written_by": "equipoise", "method": "prompt-only"}'):
        account.write_bytes(damage)
        sample(config(tiny_model, path), quiet)
        assert costs(path) == before and path.read_bytes() == rows


def test_somebody_elses_file_in_the_place_of_the_account_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    account = tmp_path / "out.csv.costs.json"
    account.write_text('{"method": "mine"}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="equipoise did not write it"):
            sample(config(tiny_model, tmp_path / "out.csv", overwrite=overwrite), quiet)
    assert account.read_text() == '{"method": "mine"}' and os.listdir(tmp_path) == [account.name]


@pytest.mark.parametrize("event", ["both", "strict"])
def test_gen_filter_keeps_the_first_n_draws_of_each_occupation_that_pass(
    tiny_model: Path, tmp_path: Path, event: str
) -> None:
    path = tmp_path / "out.csv"
    n, budget = (4, None) if event == "both" else (1, 600)
    sample(config(tiny_model, path, "gen-filter", n=n, filter=event, budget=budget, max_new_tokens=16), quiet)
    raw = read(raw_path(path))
    accepts = PROTOCOL.strict if event == "strict" else (lambda text: PROTOCOL.match(text).complete)
    expected = []
    for occupation in OCCUPATIONS:
        own = [row for row in raw if row["Occupation"] == occupation]
        assert [int(row["RunID"]) for row in own] == list(range(1, len(own) + 1))
        kept = [row["Text"] for row in own if accepts(row["Text"])][:n]
        expected += [(occupation, str(i), text) for i, text in enumerate(kept, start=1)]
    rows = [(row["Occupation"], row["RunID"], row["Text"]) for row in read(path)]
    assert rows == expected and len(rows) >= 10
    found = costs(path)
    passing = sum(accepts(row["Text"]) for row in raw)
    assert (found["generations"], found["accepted"], found["rows"]) == (len(raw), passing, len(rows))
    assert found["generations_per_accepted"] == pytest.approx(len(raw) / passing)
    assert found["yield"]["value"] == pytest.approx(passing / len(raw))


def test_a_budget_that_ends_early_is_told_with_its_yield_and_no_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.csv"
    options = ["--method", "gen-filter", "--model", str(tiny_model), "--n", "9", "--budget", "50", "--batch-size", "16"]
    options += ["--max-new-tokens", "8", "--dtype", "float32", "--output", str(path)]
    assert main(["sample", *options]) == 0
    shown = capsys.readouterr().out
    assert (
        "of 50 draws pass" in shown and "The budget of 50 draws ended with" in shown and "--budget continues" in shown
    )
    assert len(read(raw_path(path))) == 50 and 0 < len(read(path)) < 50
    first = read(path)
    # More budget goes on with the same draws.
    assert main(["sample", *options[:6], "--budget", "90", *options[8:]]) == 0
    assert len(read(raw_path(path))) == 90
    assert len(read(path)) > len(first) and all(row in read(path) for row in first)


def test_a_filter_that_nothing_passes_ends_with_the_budget(tiny_model: Path, tmp_path: Path) -> None:
    path, said = tmp_path / "out.csv", list[str]()
    outcome = sample(config(tiny_model, path, "gen-filter", max_new_tokens=1, budget=40), said.append)
    assert (outcome.status, outcome.texts, outcome.exit_code) == ("done", {}, 0)
    assert path.read_bytes() == (",".join(COMPARED) + "\r\n").encode()
    found = costs(path)
    assert found["generations_per_accepted"] is None and found["yield"]["value"] == 0 and "kl" not in found
    assert found["p0"]["high"] == pytest.approx(3.8415 / 43.8415, abs=1e-4)  # z² / (n + z²), n = 40
    assert "0 of 40 draws pass: 0 % (0 % to 8.76 %)" in said[-1]
    # Again: the same, without drawing anew.
    before = path.stat().st_mtime_ns, raw_path(path).stat().st_mtime_ns
    sample(config(tiny_model, path, "gen-filter", max_new_tokens=1, budget=40), quiet)
    assert raw_path(path).stat().st_mtime_ns == before[1] and costs(path) == found


def test_a_stopped_gen_filter_goes_on_to_the_same_files(tiny_model: Path, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "out.csv"
    sample(config(tiny_model, whole, "gen-filter"), quiet)
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    outcome = sample(config(tiny_model, path, "gen-filter"), said.append, stop)
    assert (outcome.status, outcome.exit_code) == ("stopped", 143) and "The same command continues" in said[-1]
    sample(config(tiny_model, path, "gen-filter"), quiet)
    assert path.read_bytes() == whole.read_bytes() and costs(path) == costs(whole)


def test_a_draw_is_the_sentence_of_its_number_whatever_the_batches(tiny_model: Path, tmp_path: Path) -> None:
    texts = []
    for size in (16, 7, 40):
        path = tmp_path / f"{size}.csv"
        sample(config(tiny_model, path, "gen-filter", batch_size=size), quiet)
        texts.append({(row["Occupation"], row["RunID"]): row["Text"] for row in read(raw_path(path))})
    for other in texts[1:]:
        shared = texts[0].keys() & other.keys()
        assert len(shared) >= 80 and all(texts[0][key] == other[key] for key in shared)
    # And the first four are what prompt-only writes.
    plain = sample(config(tiny_model, tmp_path / "plain.csv"), quiet).texts
    assert all(plain[Key(o, int(r))] == text for (o, r), text in texts[0].items() if int(r) <= 4)


def test_prompt_best_asks_with_a_prompt_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with pytest.raises(UserError, match="'require'"):  # which needs a chat template
        sample(config(tiny_model, path, "prompt-best"), quiet)
    sample(config(tiny_model, path, "prompt-best", best_prompt="raw"), quiet)
    assert {(row["Method"], row["Label"]) for row in read(path)} == {("prompt-best", "Prompt-Best")}


def test_every_method_draws_from_the_protocols_nucleus_and_ctrlg_from_everything() -> None:
    assert {m: SampleConfig(method=m).nucleus for m in LABELS} == dict.fromkeys(LABELS, 0.95) | {"ctrlg": 1.0}
    assert {SampleConfig(method=m, top_p=0.9).nucleus for m in LABELS} == {0.9}
    assert GenerateConfig().nucleus == 0.95
    assert SampleConfig(method="gen-filter", n=10).draws(PROTOCOL) == 5 * 20 * 10


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None)


def guided(words: Path, output: Path, **changes: object) -> SampleConfig:
    small = CtrlGConfig(hidden_states=8, distil_sentences=200, em_passes=2)
    shared: dict[str, Any] = {"n": 2, "max_new_tokens": 32, "prompt": "raw", "kl_sentences": 40, "ctrlg": small}
    return config(words, output, "ctrlg", **(shared | changes))


def test_ctrlg_tells_p0_and_kl_from_the_weights_of_its_own_sentences(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    monkeypatch.setattr(Guided, "_drawn_anew", lambda *_: pytest.fail("drew others"))
    path = tmp_path / "out.csv"
    sample(guided(words, path), quiet)
    assert json.loads((tmp_path / "out.csv.json").read_text())["settings"]["top_p"] == 1.0
    found = costs(path)
    logs = [x for of_runs in found["log_weights"].values() for x in of_runs]
    assert len(logs) == 40 == found["kl_sentences"] == found["p0"]["n"]
    assert found["p0"]["value"] == pytest.approx(sum(map(math.exp, logs)) / 40)
    assert found["kl"]["value"] == pytest.approx(-sum(logs) / 40)
    # The number itself is what is recorded: saying it changes nothing, and another is another file.
    sample(guided(words, path, top_p=1.0), quiet)
    with pytest.raises(UserError, match=r"top_p: 1\.0 → 0\.95"):
        sample(guided(words, path, top_p=0.95), quiet)
    # Finished before the distance was asked for: the same account.
    later = tmp_path / "later.csv"
    sample(guided(words, later, kl_sentences=0), quiet)
    sample(guided(words, later), quiet)
    assert costs(later) == found


def test_ctrlgs_p0_is_of_the_event_that_it_names(words: Path) -> None:
    def event(task: Task = PROTOCOL, **changes: Any) -> str:
        policy = PolicyConfig(str(words), dtype="float32", device="cpu")
        asked = CtrlGConfig(**changes)
        return Guided(policy, asked, prompt="raw", sampling=SamplingConfig(), seed=0, task=task).event

    assert event() == event(min_words=8, max_words=15) == "strict"
    assert event(shape="free") == event(shape="free", min_words=3) == "both"
    assert event(min_words=7) == "strict with 7 to 15 words"
    assert event(PROTOCOL.with_bounds(7, 15), min_words=7) == "strict"


@pytest.mark.parametrize("changes", [{"top_p": 0.6}, {"temperature": 0.9}, {"kl_sentences": 60}], ids=str)
def test_where_ctrlgs_own_sentences_do_not_serve_others_are_drawn(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    drawn: list[int] = []
    anew = Guided._drawn_anew

    def counted(self: Guided, keys: Any, *others: Any) -> dict[Key, float]:
        drawn.append(len(keys))
        return anew(self, keys, *others)

    monkeypatch.setattr(Guided, "_drawn_anew", counted)
    path = tmp_path / "out.csv"
    sample(guided(words, path, **changes), quiet)
    found = costs(path)
    assert drawn == [changes.get("kl_sentences", 40)] == [found["p0"]["n"]]
    assert "temperature 1 and top-p 1" in found["p0"]["how"]
    logs = [x for of_runs in found["log_weights"].values() for x in of_runs]
    assert found["p0"]["value"] != pytest.approx(sum(map(math.exp, logs)) / 40)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "magic"], "'magic'"),
        (["--method", "gen-filter", "--budget", "0"], "--budget 0 must be at least 1"),
        (["--kl-sentences", "-1"], "--kl-sentences -1"),
        (["--method", "sft"], "equipoise sft"),
        (["--method", "ppo"], "train it first"),
        (["--method", "ctrlg", "--min-words", "9", "--max-words", "3"], "min-words 9"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *options]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and os.listdir(tmp_path) == []


def test_help_and_mistyped_options_do_not_wait_for_torch() -> None:
    code = "import sys; import equipoise.commands.sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gen_filter_killed_between_rows_and_their_order_ends_in_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "out.csv"
    sample(config(tiny_model, whole, "gen-filter", max_new_tokens=16), quiet)
    finish = Completions.finish

    def killed(file: Completions) -> None:
        if file.path == path:
            raise KeyboardInterrupt
        finish(file)

    monkeypatch.setattr(Completions, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(config(tiny_model, path, "gen-filter", max_new_tokens=16), quiet)
    assert path.read_bytes() != whole.read_bytes()  # all rows, in another order
    monkeypatch.undo()
    sample(config(tiny_model, path, "gen-filter", max_new_tokens=16), quiet)
    assert path.read_bytes() == whole.read_bytes()
