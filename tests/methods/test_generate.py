"""Generation is exact and survives kills: real processes, a real (tiny) model."""

import csv
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.errors import UserError
from equipoise.methods import prompted
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.generate import GenerateConfig, Outcome, generate
from equipoise.methods.prompted import Prompted, uniforms
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.sample import sample
from equipoise.protocol.task import PROTOCOL
from tests.killing import counted, exit_code, in_child, killed_until_done
from tests.tiny import words_folder

OCCUPATIONS = PROTOCOL.names

ROOT = Path(__file__).resolve().parents[2]


def quiet(_line: str) -> None:
    pass


def config(model: Path, output: Path, **changes: object) -> GenerateConfig:
    settings: dict[str, object] = {"n": 6, "max_new_tokens": 8, "batch_size": 8, "dtype": "float32", "device": "cpu"}
    return GenerateConfig(model=str(model), output=output, **(settings | changes))  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "out.csv"
    assert generate(config(tiny_model, path), quiet).status == "done"
    return path.read_bytes()


def test_the_file_has_n_rows_for_every_occupation_in_order(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.csv"
    outcome = generate(config(tiny_model, path, n=3), quiet)
    rows = read(path)
    assert [(row["Occupation"], row["RunID"]) for row in rows] == [(o, str(i)) for o in OCCUPATIONS for i in (1, 2, 3)]
    assert outcome == Outcome("done", {Key(r["Occupation"], int(r["RunID"])): r["Text"] for r in rows}, 0, PROTOCOL)
    for row in rows:
        assert row["Text"].startswith(f"The {row['Occupation']} was")
        assert row["WordCount"] == str(len(row["Text"].split()))
        assert (row["Model"], row["Label"]) == ("tiny", "RLHF")
    assert len({row["Text"] for row in rows}) > 50


def test_killed_between_any_two_calls_it_ends_with_the_very_same_file(
    tiny_model: Path, tmp_path: Path, uninterrupted: bytes
) -> None:
    path = tmp_path / "out.csv"
    whole = counted(lambda: generate(config(tiny_model, tmp_path / "counted.csv"), quiet).exit_code)
    wanted = config(tiny_model, path)
    assert killed_until_done(lambda: generate(wanted, quiet).exit_code, whole, random.Random(7)) >= 3
    assert path.read_bytes() == uninterrupted
    assert len({(row["Occupation"], row["RunID"]) for row in read(path)}) == 120


def test_cut_inside_a_batch_that_whole_batch_is_computed_again_and_the_file_is_the_very_same(
    tiny_model: Path, tmp_path: Path, uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    generate(config(tiny_model, path), quiet)
    sizes: list[int] = []

    def counted(policy: object, prompts: list[list[int]], *args: object, **kwargs: object) -> object:
        sizes.append(len(prompts))
        return sample(policy, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(prompted, "sample", counted)
    for size in random.Random(1).sample(range(len(uninterrupted)), 5):
        path.write_bytes(uninterrupted[:size])
        assert generate(config(tiny_model, path), quiet).status == "done"
        assert path.read_bytes() == uninterrupted
    assert set(sizes) == {8}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_finishes_the_batch_and_gives_its_exit_code(
    tiny_model: Path, tmp_path: Path, uninterrupted: bytes, number: signal.Signals
) -> None:
    path = tmp_path / "out.csv"
    said: list[str] = []

    def stop_after_first_batch(done: int, total: int) -> None:
        if done == 8:
            os.kill(os.getpid(), number)

    outcome = generate(config(tiny_model, path), said.append, stop_after_first_batch)
    assert (outcome.status, outcome.exit_code, len(outcome.texts)) == ("stopped", 128 + number, 8)
    assert len(read(path)) == 8
    assert said[-1].startswith(f"stopped by {number.name} with 8 of 120 rows") and "same command" in said[-1]
    assert generate(config(tiny_model, path), quiet).status == "done"
    assert path.read_bytes() == uninterrupted


def test_out_of_room_it_keeps_whole_rows_and_continues_later(
    tiny_model: Path, tmp_path: Path, uninterrupted: bytes
) -> None:
    path = tmp_path / "out.csv"

    def with_little_room() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # a write beyond fails, part of it done
        try:
            return generate(config(tiny_model, path), quiet).exit_code
        except UserError as error:
            return 2 if "the same command continues" in str(error) else 98

    assert exit_code(in_child(with_little_room)) == 2
    rows = read(path)
    assert len(rows) % 8 == 0 and 0 < len(rows) < 120 and path.read_bytes().endswith(b",RLHF\r\n")
    assert generate(config(tiny_model, path), quiet).status == "done"
    assert path.read_bytes() == uninterrupted


def test_a_complete_file_is_left_alone_without_loading_the_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    generate(config(tiny_model, path, n=1), quiet)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    monkeypatch.setattr(Prompted, "load", lambda self: pytest.fail("loaded"))
    assert generate(config(tiny_model, path, n=1), quiet).status == "done"
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    whole = path.read_bytes()
    path.write_bytes(whole + b'tiny,architect,2,"The arch')  # an extension that was killed
    assert generate(config(tiny_model, path, n=1), quiet).status == "done"
    assert path.read_bytes() == whole


def test_a_sentence_depends_on_seed_occupation_and_run_alone(tiny_model: Path, tmp_path: Path) -> None:
    def texts(**changes: object) -> dict[Key, str]:
        return generate(config(tiny_model, tmp_path / f"{len(os.listdir(tmp_path))}.csv", **changes), quiet).texts

    whole = texts(n=4)
    assert texts(n=4, batch_size=1) == whole
    assert texts(n=4, batch_size=33) == whole
    assert texts(n=2) == {key: text for key, text in whole.items() if key.run_id <= 2}
    assert texts(n=4, seed=1) != whole


def test_a_shape_with_random_weights_writes_and_is_told_from_another() -> None:
    def writer(model: str) -> Prompted:
        config, sampling = PolicyConfig(model, device="cpu", dtype="float32"), SamplingConfig(max_new_tokens=2)
        return Prompted(config, prompt="raw", sampling=sampling, seed=0, task=PROTOCOL)

    one, other = writer("shape:tiny:1"), writer("shape:tiny")
    assert one.settings != other.settings and writer("shape:tiny:1").settings == one.settings
    one.load(quiet)
    written = one([Key("nurse", 1), Key("chef", 1)], quiet)
    assert [w.text.startswith(f"The {k.occupation} was") for k, w in written.items()] == [True, True]


def test_random_numbers_are_the_top_53_bits_of_shake_256() -> None:
    drawn = uniforms(3, [Key("nurse", 1), Key("chef", 250)], 5)
    for row, name in zip(drawn.tolist(), (b"3/nurse/1", b"3/chef/250"), strict=True):
        stream = hashlib.shake_256(name).digest(40)
        expected = [(int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(5)]
        assert row == expected
    many = uniforms(0, all_keys(100, OCCUPATIONS), 32)
    assert float(many.min()) >= 0 and float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.005  # 64,000 numbers: four standard errors
    assert torch.equal(uniforms(0, all_keys(2, OCCUPATIONS), 4), uniforms(0, all_keys(2, OCCUPATIONS), 64)[:, :4])


def test_temperature_zero_writes_what_transformers_decodes_greedily(tiny_model: Path, tmp_path: Path) -> None:
    outcome = generate(config(tiny_model, tmp_path / "out.csv", n=1, temperature=0.0), quiet)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "."])
    for occupation in OCCUPATIONS:
        inputs = tokenizer(f"The {occupation} was", return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=1)
        assert outcome.texts[Key(occupation, 1)] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_out_of_memory_halves_the_batch_and_changes_no_sentence(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(config(tiny_model, tmp_path / "whole.csv", n=1), quiet).texts
    sizes: list[int] = []

    def small_memory(policy: object, prompts: list[list[int]], *args: object, **kwargs: object) -> object:
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(policy, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(prompted, "sample", small_memory)
    limit, said = 3, list[str]()
    outcome = generate(config(tiny_model, tmp_path / "out.csv", n=1), said.append)
    assert outcome.texts == whole
    assert sizes == [8, 4, 2, 2, 2, 2, *[2] * 4, 2, 2]
    assert "going on with 4" in "".join(said) and "going on with 2" in "".join(said)
    limit = 0
    with pytest.raises(UserError, match="not even one sentence"):
        generate(config(tiny_model, tmp_path / "none.csv", n=1), quiet)


def test_non_finite_logits_stop_it_with_code_3_and_keep_the_rows(tmp_path: Path) -> None:
    model = words_folder(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][OCCUPATIONS.index("writer") + 12] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    # With one new token each, no sampled token is read again: only the prompts about the writer meet the nan.
    outcome = generate(config(model, tmp_path / "out.csv", max_new_tokens=1), said.append)
    assert (outcome.status, outcome.exit_code) == ("nonfinite", 3)
    assert "non-finite" in said[-1] and "float32" in said[-1]
    assert len(read(tmp_path / "out.csv")) == len(outcome.texts) == 16  # two batches end before the first writer


def test_another_model_or_setting_does_not_continue_a_file(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    generate(config(tiny_model, path, n=1), quiet)
    before = path.read_bytes()
    retrained = words_folder(tmp_path / "tiny", seed=1)
    for wanted, difference in (
        (config(retrained, path, n=1), "weights: sha256"),
        (config(tiny_model, path, n=1, top_p=0.9), "top_p: 0.95 → 0.9"),
        (config(tiny_model, path, n=1, prompt="mine=About {occupation}"), None),
        (config(tiny_model, path, n=1, label="SFT"), "Label: RLHF → SFT"),
    ):
        with pytest.raises(UserError, match=difference or "chat template"):
            generate(wanted, quiet)
    assert path.read_bytes() == before
    moved = tiny_model.rename(tiny_model.with_name("elsewhere"))
    try:
        assert generate(config(moved, path, n=1, model_name="tiny"), quiet).status == "done"
    finally:
        moved.rename(tiny_model)
    assert generate(config(retrained, path, n=1, overwrite=True), quiet).status == "done"
    assert path.read_bytes() != before


def test_other_rendered_prompts_do_not_continue_a_file(tiny_model: Path, tmp_path: Path) -> None:
    path, record = tmp_path / "out.csv", tmp_path / "out.csv.json"
    generate(config(tiny_model, path, n=1), quiet)
    document = json.loads(record.read_text())
    assert re.fullmatch("[0-9a-f]{64}", document["settings"]["prompts"])
    rows_before = path.read_bytes()
    record.write_text(json.dumps(document | {"settings": document["settings"] | {"prompts": "0" * 64}}))
    with pytest.raises(UserError, match=r"made with other settings \(prompts: 0+"):
        generate(config(tiny_model, path, n=2), quiet)
    assert path.read_bytes() == rows_before
    # A record of before prompts were fingerprinted says nothing of them.
    del document["settings"]["prompts"]
    record.write_text(json.dumps(document))
    assert generate(config(tiny_model, path, n=2), quiet).status == "done"


def test_the_prompt_is_the_one_the_model_was_trained_with(tmp_path: Path) -> None:
    def load(model: Path, prompt: str | None = None) -> Prompted:
        return Prompted(PolicyConfig(str(model), device="cpu"), prompt=prompt, sampling=SamplingConfig(), seed=0)

    trained = load(words_folder(tmp_path / "trained", prompt="raw"))
    assert (trained.settings["prompt"], trained.label) == ("raw", "RLHF")
    untrained = words_folder(tmp_path / "untrained", prompt=None)
    assert load(untrained, "raw").label == "Prompt-Only"
    with pytest.raises(UserError, match=r"'describe'.*--prompt raw"):
        load(untrained)
    with pytest.raises(UserError, match="'study'"):
        load(words_folder(tmp_path / "other", prompt="study"))
    (untrained / "run.json").write_text("{}")
    with pytest.raises(UserError, match="does not say with which prompt"):
        load(untrained, "raw")


def test_what_training_left_decides_the_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no model in ./rlhf_llama3_7b_output yet.*python train_rlhf.py"):
        generate(GenerateConfig())
    folder = tmp_path / "rlhf_llama3_7b_output"
    folder.mkdir()
    with pytest.raises(UserError, match=r"no model in .* yet"):
        generate(GenerateConfig())
    (folder / "training_metrics.csv").write_text("step\n1\n")
    with pytest.raises(UserError, match=r"has not finished.*python train_rlhf.py again"):
        generate(GenerateConfig())
    words_folder(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        generate(GenerateConfig())
    assert sorted(os.listdir(tmp_path)) == ["rlhf_llama3_7b_output"]


def test_the_script_and_the_command_write_the_file_without_control_characters(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_model), "--n", "2", "--max-new-tokens", "8", "--dtype", "float32"]
    ran = subprocess.run(
        [sys.executable, ROOT / "generate_rlhf.py", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(read(tmp_path / "rlhf_llama3_completions.csv")) == 40
    assert all(c == "\n" or c.isprintable() for c in ran.stdout)
    assert "40 of 40 rows" in ran.stdout
    assert "rlhf_llama3_completions.csv is complete: 40 rows" in ran.stdout
