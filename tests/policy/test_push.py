"""A model put on the Hub: which files, how private, and what a refusal says. The Hub is a fake; its errors are real."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.methods.sft import SftConfig
from equipoise.policy import push as pushing
from equipoise.policy.out_config import OutConfig
from equipoise.policy.push import check_push, push
from equipoise.policy.source import Source
from equipoise.ppo.tool_config import ExportConfig
from equipoise.ppo.train import train
from tests.ppo.small import small_config

# huggingface_hub speaks HTTP through the one or the other.
httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
TOKEN = "hf_secretsecretsecret"
BUNDLED, FOLDER = Source("bundled", "bundled", "x"), Source("m", "folder", "m")


class FakeHub:
    """What `HfApi` does, for one repository, as far as it is used here."""

    def __init__(self) -> None:
        self.private: bool | None = None
        self.files: set[str] = set()
        self.fails: BaseException | None = None

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        if self.private is None:
            self.private = private
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def repo_info(self, name: str) -> Any:
        assert "/" in name
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        if self.fails:
            raise self.fails
        self.files |= {name for name in allow_patterns if (folder_path / name).is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(pushing, "HfApi", lambda: fake)
    monkeypatch.setattr(pushing, "get_token", lambda: TOKEN)
    monkeypatch.setattr(pushing, "is_offline_mode", lambda: False)
    return fake


def http(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, text: str = "") -> HfHubHTTPError:
    """An error as huggingface_hub raises it, the token in its text."""
    request = httpx.Request("POST", "https://huggingface.co/api", headers={"authorization": f"Bearer {TOKEN}"})
    return kind(f"{status} for {TOKEN}\n{text}", response=httpx.Response(status, request=request))


def test_a_run_puts_its_model_there_private_and_keeps_its_records(
    model: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(model, tmp_path, steps=1)
    config = replace(config, run=replace(config.run, push_to_hub="mine"))
    assert train(config).exit_code == 0
    assert hub.private is True
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "task.yaml"} <= hub.files
    assert not hub.files & {"run.json", "export.json", "training_metrics.csv", "samples.jsonl", "summary.json"}
    assert "on the Hub: https://huggingface.co/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http(401), "it rejects the access token"),
        (http(403), "the access token may not write there"),
        (http(400, text="bad README"), "it refuses what was sent"),
        (http(402), "no room left"),
        (http(403, text="Private repository storage limit reached, please upgrade"), "no room left"),
        (RuntimeError("Data processing error: CAS service error: Storage quota exceeded"), "no room left"),
        (OSError(28, "No space left on device"), "on this machine"),
        (http(404, RepositoryNotFoundError), "it has no such place"),
        (http(500), "it could not take it (HTTP 500)"),
        (httpx.ConnectError(f"no route, {TOKEN}"), "it cannot be reached"),
        (RuntimeError(f"odd, {TOKEN}"), "it failed with RuntimeError"),
    ],
)
def test_a_refusal_is_one_line_without_the_token_and_the_same_command_tries_again(
    model: Path,
    tmp_path: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    said: str,
) -> None:
    folder = tmp_path / "out"
    config = small_config(model, tmp_path, steps=1)
    if said != "it failed with RuntimeError":  # a whole run once, and else only what it does at its end
        folder.mkdir()
        with pytest.raises(UserError) as found:
            hub.fails = error
            push(folder, OutConfig(push_to_hub="mine"), lambda line: None)
        assert said in str(found.value) and TOKEN not in str(found.value) and found.value.__cause__ is None
        return
    hub.fails = error
    config = replace(config, run=replace(config.run, push_to_hub="mine"))
    with pytest.raises(UserError, match=r"It is whole in .*, and the same command tries again"):
        train(config)
    shown = capsys.readouterr().out
    assert TOKEN not in shown and "summary of 1 step" in shown
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".csv")}
    hub.fails = None
    assert train(config).exit_code == 0
    assert "model.safetensors" in hub.files
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_what_is_public_is_never_taken_for_private(tmp_path: Path, hub: FakeHub) -> None:
    hub.private = False
    with pytest.raises(UserError, match="already and public, so nothing was put there"):
        push(tmp_path, OutConfig(push_to_hub="me/mine"), lambda line: None)
    assert not hub.files
    push(tmp_path, OutConfig(push_to_hub="me/mine", hub_visibility="public"), lambda line: None)
    hub.private = None
    push(tmp_path, OutConfig(push_to_hub="me/mine", hub_visibility="public"), lambda line: None)
    assert hub.private is False


def test_what_cannot_succeed_is_refused_before_training(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = OutConfig(push_to_hub="mine")
    check_push(wanted, FOLDER)
    check_push(replace(wanted, save="adapter"), BUNDLED)
    with pytest.raises(UserError, match="on this machine alone: use --save merged"):
        check_push(replace(wanted, save="adapter"), FOLDER)
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(UserError, match="there is none: run `hf auth login`"):
        check_push(wanted, FOLDER)
    monkeypatch.setattr(pushing, "is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_push(wanted, FOLDER)
    check_push(OutConfig(), FOLDER)


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-a", "a--b", "a..b", "a.git", "a.", "/a", "ü", "a" * 97])
def test_a_name_that_the_hub_does_not_take_is_refused(name: str) -> None:
    for config in (SftConfig, lambda **given: ExportConfig(Path("c"), **given)):
        with pytest.raises(UserError, match="--push-to-hub"):
            config(push_to_hub=name)


def test_no_token_stops_the_commands_before_anything_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    monkeypatch.setattr(pushing, "is_offline_mode", lambda: False)
    monkeypatch.chdir(tmp_path)
    for command in (["train", "--steps", "1", "--prompt", "raw"], ["sft", "--data", "forced", "--prompt", "raw"]):
        assert main([*command, "--model", str(model), "--push-to-hub", "mine", "--device", "cpu"]) == 2
        assert "needs an access token that may write" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
