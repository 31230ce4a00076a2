"""`equipoise prompts`: the file, and what is refused."""

import json
import subprocess
import sys

import pytest

from equipoise.cli import main
from equipoise.plugins.written import read_label
from equipoise.protocol.task import PROTOCOL
from tests.tiny import words_folder


def test_writes_a_data_set_and_replaces_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(PROTOCOL.to_yaml().replace("name: agentic-communal", "name: mine"))
    assert main(["prompts", "--for", "trl", "--task", "mine.yaml", "--no-system-turn"]) == 0
    path = tmp_path / "prompts-trl.jsonl"
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [read_label(row["label"])[0].name for row in made] == ["mine"] * len(PROTOCOL.names)
    monkeypatch.chdir("/")  # the rows name the task's file wherever they are read
    assert read_label(made[0]["label"])[1] == PROTOCOL.names[0]
    monkeypatch.chdir(tmp_path)
    before = path.read_bytes()
    assert main(["prompts", "--for", "trl"]) == 2
    assert path.read_bytes() == before
    assert "already" in capsys.readouterr().err
    assert main(["prompts", "--for", "trl", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--for"),
        (["--for", "ray"], "ray"),
        (["--for", "verl", "--prompt", "raw"], "verl"),
        (["--for", "trl", "--system", "Be kind.", "--no-system-turn"], "exclude"),
        (["--for", "trl", "--output", "no/such/folder/x.jsonl"], "x.jsonl"),
    ],
)
def test_refusals(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", *argv]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_whole_text_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words_folder(tmp_path / "chat", prompt=None, chat=True)
    assert main(["prompts", "--for", "openrlhf", "--model", "chat", "--output", "x.jsonl"]) == 0
    for line, name in zip((tmp_path / "x.jsonl").read_text().splitlines(), PROTOCOL.names, strict=True):
        assert json.loads(line)["prompt"].endswith(PROTOCOL.prefix(name))


def test_needs_no_torch(tmp_path, monkeypatch):
    code = "import sys; from equipoise.cli import main; main(['prompts', '--for', 'trl']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0
