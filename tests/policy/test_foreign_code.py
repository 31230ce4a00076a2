"""Code that comes with a model is never run, and nothing of it is imported."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from equipoise.errors import UserError
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.policy.sources import CPU, change_json
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


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
