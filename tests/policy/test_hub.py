"""The Hugging Face Hub, played by a server on this machine: its refusals, what is cached, and no answer at all."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from equipoise.errors import UserError
from equipoise.policy.hub import HubAccess, cached_folder, explain, hub_access
from equipoise.policy.source import load_config, load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.policy.sources import CPU, cached

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


TOKEN = "hf_verysecrettoken"
ANSWERS = {
    "needs-login": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access is restricted, {TOKEN}"}),
    "not-granted": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the authorized list."}),
    "fine-grained": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Enable it in your fine-grained token"}),
    "absent": (404, {"X-Error-Code": "RepoNotFound"}),
    "bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "no"}),
    "busy": (429, {}),
    "broken": (500, {}),
    "no-config": (404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}),
}


class FakeHub(BaseHTTPRequestHandler):
    def answer(self) -> None:
        name = self.path.partition("/org/")[2].partition("/")[0]
        if name == "silent":
            self.connection.settimeout(60)
            self.connection.recv(1)  # until the asker has given up
        if name in ("silent", "hangs-up"):
            self.close_connection = True
            return
        status, headers = ANSWERS[name]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *_: object) -> None: ...


CHILD = """
import json, sys, time, torch, traceback
from huggingface_hub import constants
from equipoise.errors import UserError
from equipoise.policy import source
from equipoise.policy.hub import hub_access
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model

time.sleep = lambda seconds: None  # between the retries of huggingface_hub
source.hub_access = lambda name, timeout: hub_access(name, 1.0 if name == "org/silent" else timeout)

def said(load, name, **options):
    try:
        load(resolve("org/" + name), **options)
    except UserError as error:
        traceback.print_exc()
        return str(error)

lines = {}
for name in json.loads(sys.argv[1]):
    if name == "offline":
        constants.HF_HUB_OFFLINE = True
    access = hub_access("org/" + name, timeout=1.0)
    lines[name] = {"available": access.available, "check": access.reason}
    if name != "silent":  # huggingface_hub would wait for it dozens of times
        lines[name]["tokenizer"] = said(load_tokenizer, name)
    lines[name]["model"] = said(load_model, name, dtype=torch.float32, device="cpu")
print(json.dumps(lines))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "*",
    }
    names = json.dumps([*ANSWERS, "silent", "hangs-up", "offline"])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, names],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    server.shutdown()
    assert child.returncode == 0, child.stderr
    assert TOKEN not in child.stdout + child.stderr
    yield json.loads(child.stdout)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("needs-login", ["gated", "hf auth login", "https://huggingface.co/org/needs-login"]),
        ("not-granted", ["gated", "request access at https://huggingface.co/org/not-granted"]),
        ("fine-grained", ["token", "allow gated repositories"]),
        ("absent", ["no model 'org/absent'", "check the spelling"]),
        ("bad-token", ["rejects the access token", "HF_TOKEN"]),
        ("forbidden", ["may not read org/forbidden", "permission"]),
        ("busy", ["wait", "429"]),
        ("broken", ["500", "try again later"]),
        ("silent", ["cannot be reached", "connect"]),
        ("hangs-up", ["cannot be reached", "connect"]),
        ("offline", ["HF_HUB_OFFLINE", "unset it"]),
    ],
)
def test_each_refusal_of_the_hub_becomes_one_line_with_its_remedy(hub, name: str, words: list[str]) -> None:
    lines = {what: line for what, line in hub[name].items() if what != "available"}
    for what, line in lines.items():
        assert line is not None and "\n" not in line and len(line) < 220
        assert all(word in line for word in words), (what, line)
    assert not hub[name]["available"] and len(lines) == (2 if name == "silent" else 3)


def test_a_repository_without_a_model_is_refused(hub) -> None:
    for what in ("model", "check", "tokenizer"):
        assert "lacks config.json or safetensors weights" in hub["no-config"][what]


def test_a_full_disk_is_found_behind_the_errors_wrapped_around_it() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = OSError("There was a problem when downloading")
    wrapped.__cause__ = RuntimeError("in between")
    wrapped.__cause__.__context__ = full
    assert "disk is full" in (explain("org/model", wrapped) or "")


def test_a_token_with_a_line_break_is_reported_without_quoting_it() -> None:
    error = OSError(f"Illegal header value b'Bearer {TOKEN}\\n'")
    line = explain("org/model", error) or ""
    assert "access token" in line and TOKEN not in line


def test_an_error_that_is_no_refusal_is_left_alone() -> None:
    assert explain("org/model", ValueError("a bug")) is None
    assert "cannot be reached" in (explain("org/model", LocalEntryNotFoundError("nothing cached")) or "")


def test_a_model_counts_as_cached_only_with_all_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    cached(tmp_path, "single", {"config.json": "{}", "model.safetensors": ""})
    cached(tmp_path, "whole", {"config.json": "{}", "model.safetensors.index.json": index, "1.safetensors": ""})
    cached(tmp_path, "half", {"config.json": "{}", "model.safetensors.index.json": index, "1.safetensors": ""})
    (tmp_path / "models--org--whole/snapshots/abc/2.safetensors").touch()
    cached(tmp_path, "broken", {"config.json": "{}", "model.safetensors.index.json": "{"})
    for name, expected in (("single", True), ("whole", True), ("half", False), ("broken", False), ("none", False)):
        access = hub_access(f"org/{name}")
        assert (access.cached, access.available) == (expected, expected), name


def test_the_check_never_raises_and_keeps_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, ended = threading.Event(), threading.Event()

    def asked(*_: object, **__: object) -> None:
        answer.wait(60)
        ended.set()

    monkeypatch.setattr("equipoise.policy.hub.get_hf_file_metadata", asked)
    assert not hub_access("org/model", timeout=0.01).available
    assert not ended.is_set()  # it has not waited for the answer
    answer.set()
    assert not hub_access("no valid id", timeout=0.01).available


def test_a_cached_model_is_loaded_without_asking_the_network(connections: list[object], tmp_path: Path) -> None:
    source = resolve("org/whole")
    snapshot = tmp_path / "hub" / "models--org--whole" / "snapshots" / "abc"
    expected = load_model(resolve(str(snapshot)), **CPU)(torch.arange(3, 20)[None]).logits
    assert torch.equal(load_model(source, **CPU)(torch.arange(3, 20)[None]).logits, expected)
    assert load_config(source).hidden_size == 32 and load_tokenizer(source).eos_token == "<|im_end|>"
    assert hub_access("org/whole").cached and connections == []


def test_a_cache_that_may_lack_the_chat_template_is_used_only_where_the_hub_gives_no_answer(
    connections: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--whole" / "snapshots" / "abc"
    (snapshot / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((snapshot / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (snapshot / "tokenizer_config.json").write_text(json.dumps(config))
    asked: list[str] = []
    monkeypatch.setattr("equipoise.policy.hub._refusal", lambda name, timeout: asked.append(name) or "no network")
    assert cached_folder("org/whole") == snapshot and asked == ["org/whole"]
    assert load_tokenizer(resolve("org/whole")).chat_template is None and connections == []
    monkeypatch.setattr("equipoise.policy.hub._refusal", lambda name, timeout: None)
    assert cached_folder("org/whole") is None
    (tmp_path / "hub" / "models--org--whole" / ".no_exist" / "abc").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--whole" / ".no_exist" / "abc" / "chat_template.jinja").touch()
    assert cached_folder("org/whole") == snapshot


def test_an_adapter_on_the_hub_is_refused_before_anything_of_it_is_loaded(
    connections: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub" / "models--org--whole" / "snapshots" / "abc" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model and an adapter"):
        load_model(resolve("org/whole"), **CPU)
    monkeypatch.setattr("equipoise.policy.source.hub_access", lambda *_, **__: HubAccess(True, False, ""))
    monkeypatch.setattr("equipoise.policy.hub.file_exists", lambda repository, name: name == "adapter_config.json")
    with pytest.raises(UserError, match="org/lora is an adapter, or holds one"):
        load_model(resolve("org/lora"), **CPU)
    assert connections == []


@pytest.mark.parametrize(
    "load", [load_config, load_tokenizer, lambda source: load_model(source, dtype=torch.float32, device="cpu")]
)
def test_a_hub_that_gives_no_answer_is_one_line_before_a_loader_tries_again_and_again(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.policy.source.cached_folder", lambda _: None)
    monkeypatch.setattr("equipoise.policy.source.hub_access", lambda *_, **__: HubAccess(False, False, "no answer"))
    for loader in ("source.AutoConfig", "source.AutoTokenizer", "weights.AutoModelForCausalLM"):
        monkeypatch.setattr(f"equipoise.policy.{loader}.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match="no answer"):
        load(resolve("meta-llama/Llama-3.1-7B-Instruct"))
