import errno
import json
import os
import shutil
import socket
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from equipoise.errors import UserError
from equipoise.policy.config import LLAMA_8B
from equipoise.policy.hub import HubAccess, cached_folder, explain, hub_access
from equipoise.policy.source import load_config, load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.tiny import tiny_folder, tiny_model

ADAPTED = "adapter_model.safetensors"
CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


# --- names


@pytest.mark.parametrize("name", ["bundled", "Bundled", "SmolLM2-135M-Instruct", " bundled "])
def test_bundled_has_two_names(name: str) -> None:
    assert resolve(name).kind == "bundled"


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-7B-Instruct",
        "LLaMA-3-7B-Instruct",
        "llama-3-7b-instruct",
        "meta-llama/Llama-3.1-7B-Instruct",
        "meta-llama/LLaMA-3-7B-Instruct",
        "Meta-Llama/Meta-Llama-3-7B-Instruct",
        "llama3-7b-instruct",
        "Llama_3.1_7B_Instruct",
        "Meta Llama 3.1 7B Instruct",
        "meta-llama/Llama-3.2-7B-Instruct",
    ],
)
def test_the_guides_7b_names_mean_the_8b_and_say_so(name: str) -> None:
    source = resolve(name)
    assert (source.kind, source.path_or_id) == ("hub", "meta-llama/Llama-3.1-8B-Instruct")
    (notice,) = source.notices
    assert "no 7B Llama 3" in notice and "\n" not in notice


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-7B", "llama-3-7b", "LLaMA3 7B"])
def test_a_7b_that_is_no_instruct_model_is_answered_with_what_to_write_before_the_hub_is_asked(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert str(caught.value) == f"there is no 7B Llama 3, so no {name!r}: write {LLAMA_8B}"


@pytest.mark.parametrize("name", [LLAMA_8B, "meta-llama/Llama-2-7b-hf", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_ids_stay_as_they_are_without_a_notice(name: str) -> None:
    source = resolve(name)
    assert (source.kind, source.path_or_id, source.notices) == ("hub", name, ())


@pytest.mark.parametrize(
    "name", ["", "bundeld", "gpt2", "./absent", "/absent/model", "~/absent", "a/b/c", "a b/c", "..\\m"]
)
def test_a_name_that_is_nothing_known_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_below_an_existing_folder_is_no_hub_id() -> None:
    Path("runs").mkdir()
    with pytest.raises(UserError, match="no model folder 'runs/final'"):
        resolve("runs/final")


def test_a_folder_wins_over_a_hub_id_of_the_same_name() -> None:
    tiny_folder(Path("org/model"))
    assert resolve("org/model").kind == "folder"


# --- folders


def test_a_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    model = load_model(resolve(str(folder)), dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and model.config._attn_implementation == "eager"
    assert load_config(resolve(str(folder))).hidden_size == 32
    # Three special tokens, then the printable characters from "!" on.
    assert load_tokenizer(resolve(str(folder)))("aa")["input_ids"] == [3 + ord("a") - ord("!")] * 2


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def leave_pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20_000)


def empty_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "config.json"),
        (break_config, "config.json"),
        (remove_weights, "no model.safetensors"),
        (leave_pickles_only, "pickles"),
        (cut_weights_short, "damaged or cut short"),
        (empty_weights, "damaged or cut short"),
        (lose_a_shard, "lacks model-00002-of-00002.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused_before_anything_is_loaded(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        resolve(str(folder))
    assert "\n" not in str(caught.value)


def change_tensors(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_noise(folder: Path) -> None:
    change_tensors(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors \(model.norm.weight"):
        load_model(resolve(str(folder)), **CPU)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(UserError, match="do not fit its configuration"):
        load_model(resolve(str(folder)), **CPU)


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="code of its own"):
        load_model(resolve(str(folder)), **CPU)
    assert not (folder / "ran").exists()


def test_an_unknown_kind_of_model_and_a_missing_tokenizer_are_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(resolve(str(folder)))
    (folder / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(UserError, match="transformers does not know"):
        load_model(resolve(str(folder)), **CPU)


# --- adapters


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model(torch.arange(3, 20)[None]).logits.detach(), tmp_path / "logits.pt")
    return tmp_path / "adapter"


def test_an_adapter_folder_loads_merged_into_its_base(adapter: Path) -> None:
    source = resolve(str(adapter))
    assert source.kind == "adapter"
    model = load_model(source, **CPU)
    expected = torch.load(adapter.parent / "logits.pt", weights_only=True)
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(torch.arange(3, 20)[None]).logits, expected, rtol=0, atol=1e-5)
    assert load_tokenizer(source).eos_token == "<|im_end|>"  # the base's, as the adapter has none


def test_an_adapter_without_effect_is_its_base_to_the_bit_in_every_dtype(adapter: Path, folder: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in weights.items()}, adapter / ADAPTED)
    ids = torch.arange(400)[None, :200] % 200 + 3
    for dtype in (torch.bfloat16, torch.float32):
        base, merged = (load_model(resolve(str(f)), dtype=dtype, device="cpu") for f in (folder, adapter))
        assert torch.equal(merged(ids).logits, base(ids).logits), dtype
        assert {n: b.dtype for n, b in merged.named_buffers()} == {n: b.dtype for n, b in base.named_buffers()}


def test_an_adapter_that_has_an_effect_is_rounded_once(adapter: Path) -> None:
    exact, rounded = (load_model(resolve(str(adapter)), dtype=t, device="cpu") for t in (torch.float32, torch.bfloat16))
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, dict(exact.named_parameters())[name].bfloat16()), name


@pytest.mark.parametrize("how", ["prefix", "other", "half", "extra"])
def test_an_adapter_whose_tensors_are_not_those_of_its_layers_is_refused(adapter: Path, how: str) -> None:
    weights = load_file(adapter / ADAPTED)
    first = next(n for n in weights if ".layers.0." in n)
    changed = {
        "prefix": {n.removeprefix("base_model.model."): t for n, t in weights.items()},
        "other": {"x": torch.zeros(64, 64)},
        "half": {n: t for n, t in weights.items() if "v_proj" not in n},
        "extra": weights | {first.replace(".layers.0.", ".layers.9."): weights[first].clone()},
    }
    save_file(changed[how], adapter / ADAPTED)
    with pytest.raises(UserError, match=r"the adapter in .* (lacks|has) \d+ ") as caught:
        load_model(resolve(str(adapter)), **CPU)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_leads_back_to_itself_is_refused(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match="is its own base"):
        resolve(str(adapter))
    shutil.copytree(adapter, adapter.parent / "second")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(adapter.parent / "second"))
    with pytest.raises(UserError, match="is its own base"):
        resolve(str(adapter))


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "x"}, {"num_attention_heads": 0}, {"hidden_size": -1}, {"num_hidden_layers": "two"}, {"vocab_size": {}}],
)
def test_any_nonsense_of_a_configuration_is_one_line(folder: Path, changes: dict[str, object]) -> None:
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(folder)), **CPU)
    assert "\n" not in str(caught.value)


def test_an_adapters_base_must_be_named_and_be_no_adapter_itself(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in ((None, "names no base model"), ("absent", "no model 'absent'"), (str(adapter), "another")):
        if base == str(adapter):  # an adapter whose base is an adapter whose base is a folder
            shutil.copytree(adapter, adapter.parent / "second")
            (adapter / "adapter_config.json").write_text(
                json.dumps(config | {"base_model_name_or_path": str(adapter.parent / "model")})
            )
            name = adapter.parent / "second"
        else:
            name = adapter
        (name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            resolve(str(name))


def test_an_adapter_may_name_the_bundled_model_as_its_base(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "bundled"}))
    assert resolve(str(adapter)).kind == "adapter"


# --- the Hub, played by a server on this machine

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
from equipoise.policy.hub import hub_access
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model

time.sleep = lambda seconds: None  # between the retries of huggingface_hub

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


# --- the quick check


def cached(hub_cache: Path, name: str, files: dict[str, str]) -> None:
    snapshot = hub_cache / f"models--org--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub_cache / f"models--org--{name}" / "refs").mkdir()
    (hub_cache / f"models--org--{name}" / "refs" / "main").write_text("abc")
    for file, text in files.items():
        (snapshot / file).write_text(text)


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


@pytest.fixture
def connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A cache with `org/whole` in it, and no network: every attempt to reach one is refused and noted here."""
    attempts: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(arguments)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    cached(tmp_path / "hub", "whole", {})
    tiny_folder(tmp_path / "hub" / "models--org--whole" / "snapshots" / "abc")
    return attempts


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


# --- code that comes with a model


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path, named as libraries trust it, that leaves a file when it is imported; the file."""
    ran = tmp_path / "ran"
    package = tmp_path / "planted" / "megatron"
    package.mkdir(parents=True)
    for name in ("__init__.py", "core.py"):
        (package / name).write_text(f"open({str(ran)!r}, 'w').close()\n")
    (tmp_path / "planted" / "planted.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "planted"))
    for name in ("megatron", "megatron.core", "planted"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return ran


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("module", ["megatron.core", "planted"])
def test_a_module_that_an_adapter_names_is_not_imported(adapter: Path, planted: Path, module: str) -> None:
    change_json(adapter / "adapter_config.json", megatron_core=module)
    load_model(resolve(str(adapter)), **CPU)
    change_json(adapter / "adapter_config.json", megatron_config={"tensor_model_parallel_size": 1})
    with pytest.raises(UserError, match="sets 'megatron_config', which is not read here") as caught:
        resolve(str(adapter))
    assert "\n" not in str(caught.value) and not planted.exists()


def test_planted_modules_would_have_run(adapter: Path, planted: Path) -> None:
    from peft import PeftModel

    change_json(adapter / "adapter_config.json", megatron_core="megatron.core", megatron_config={"x": 1})
    with pytest.raises(Exception):  # noqa: B017 - whatever it says of the module that it has imported
        PeftModel.from_pretrained(tiny_model(), str(adapter))
    assert planted.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "XLORA"}, "kind 'XLORA'"),
        ({"peft_type": None}, "kind None"),
        ({"init_lora_weights": "pissa"}, "begun by 'pissa'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"of_a_later_version": "x"}, "of_a_later_version"),
        ({"revision": "abc"}, "revision 'abc'"),
        ({"r": "eight"}, "cannot be loaded"),
        ({"r": 0}, "cannot be loaded"),
        ({"r": 10**12}, "gives the rank 1000000000000"),
        ({"rank_pattern": {"q_proj": 10**12}}, "gives the rank 1000000000000"),
    ],
)
def test_settings_of_an_adapter_that_are_not_read_are_refused_in_one_line(adapter: Path, changes, message: str) -> None:
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(resolve(str(adapter)), **CPU)
    assert "\n" not in str(caught.value)


def test_an_adapter_inside_a_models_folder_is_not_put_on_top_of_it_unasked(folder: Path, adapter: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder / name)
    with pytest.raises(UserError, match="holds a model and an adapter"):
        resolve(str(folder))


def test_attention_code_that_a_configuration_names_is_neither_fetched_nor_run(folder: Path) -> None:
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: "someone/kernel"}))
        with pytest.raises(UserError, match="names code to be fetched and run"):
            load_model(resolve(str(folder)), **CPU)
        (folder / "config.json").write_text(json.dumps(config))


def test_code_for_a_tokenizer_or_for_generation_is_not_run(folder: Path, planted: Path) -> None:
    code = f"open({str(planted)!r}, 'w').close()\nclass Own: ...\ndef generate(*_, **__): ...\n"
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    change_json(folder / "generation_config.json", custom_generate=str(folder))
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    load_model(resolve(str(folder)), **CPU)
    assert load_tokenizer(resolve(str(folder))).eos_token == "<|im_end|>"
    change_json(folder / "tokenizer_config.json", tokenizer_class="Own")
    try:
        load_tokenizer(resolve(str(folder)))
    except UserError as error:
        assert "\n" not in str(error)
    assert not planted.exists()


def test_a_chat_template_reaches_nothing_of_python(folder: Path, planted: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(folder)))
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=attack, tokenize=False)


def test_pickled_weights_beside_an_adapter_are_not_read(adapter: Path, planted: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(planted), "w")

    torch.save({"x": Planted()}, adapter / "adapter_model.bin")
    load_model(resolve(str(adapter)), **CPU)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model.safetensors"):
        resolve(str(adapter))
    assert not planted.exists()


def test_a_file_of_a_model_that_is_nested_without_end_is_one_line(folder: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        with pytest.raises(UserError) as caught:
            load_tokenizer(resolve(str(folder))) if "token" in name else load_model(resolve(str(folder)), **CPU)
        assert "\n" not in str(caught.value)
        (folder / name).write_text(kept)


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
