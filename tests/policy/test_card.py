"""The model card says what is true of the task that was trained on, and nothing of the default one."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from equipoise.policy.card import ModelCard, render
from equipoise.policy.config import LLAMA_8B
from equipoise.policy.export import export
from equipoise.policy.source import Source, resolve
from equipoise.protocol.task import PROTOCOL, Task, task_from_document
from tests.policy.exported import CARD
from tests.tasks import FOREIGN, foreign_task, one_class_task
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


def card(task: Task) -> str:
    return render(ModelCard(method="PPO", prompt="raw", task=task), None)


def test_the_example_word_is_a_term_of_the_task_and_gender_is_where_the_task_is_about_it() -> None:
    for task, term in ((foreign_task(), "fähig"), (one_class_task(), "careful")):
        text = card(task)
        assert "gender" not in text and "stereotype" not in text and "confident" not in text
        assert f'"{term}" counts as much' in text
    assert '"ambitious" counts as much' in card(PROTOCOL) and "gender-stereotypes" in card(PROTOCOL)


def test_a_copy_of_the_default_task_with_other_terms_is_no_study_of_gender() -> None:
    # `equipoise task --new` writes the default task's file, whose name a user may well leave as it is.
    copied = task_from_document(FOREIGN | {"name": PROTOCOL.name}, "mine.yaml")
    matter = yaml.safe_load(card(copied).split("---\n")[1])
    assert "gender-stereotypes" not in matter["tags"] and "language" not in matter
    renamed = yaml.safe_load(card(replace(PROTOCOL, name="mine")).split("---\n")[1])
    assert "gender-stereotypes" in renamed["tags"] and renamed["language"] == "en"


def test_a_task_of_stems_alone_has_an_example_too() -> None:
    stems = foreign_task(classes={"fähig": ["klug*"]})
    assert '"klug…" counts as much' in card(stems)
    assert '"kluge" counts as much' in card(foreign_task(classes={"fähig": ["klug*"]}, write={"klug*": ["kluge"]}))


def card_of(folder: Path, card: ModelCard, source: Source | None) -> tuple[dict, str]:
    export(tiny_model(), tiny_tokenizer(), folder, card=card, source=source)
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


def test_the_card_names_base_licence_method_prompt_and_occupations(tmp_path: Path) -> None:
    card = ModelCard(method="PPO with *stars*", prompt="study", occupations=("nurse", "pilot"))
    matter, text = card_of(tmp_path, card, resolve("bundled"))
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and matter["license"] == "apache-2.0"
    assert matter["library_name"] == "transformers" and matter["pipeline_tag"] == "text-generation"
    assert isinstance(matter["tags"], list)
    assert "PPO with *stars*" in text and "`study`" in text and "nurse, pilot" in text
    assert "Not in that source: bold, accommodating, caring, friendly, helpful." in text


def test_a_llama_model_carries_its_licence_and_attribution(tmp_path: Path) -> None:
    matter, text = card_of(tmp_path, CARD, resolve("Llama-3.1-7B-Instruct"))
    assert (matter["base_model"], matter["license"]) == (LLAMA_8B, "llama3.1")
    assert "Built with Llama" in text


def test_a_local_folder_is_named_without_its_path_however_odd_its_name(tmp_path: Path) -> None:
    odd = tiny_folder(tmp_path / 'my: "model" #1')
    matter, text = card_of(tmp_path / "out", CARD, resolve(str(odd)))
    assert matter["base_model"] == 'my: "model" #1' and matter["license"] == "other"
    assert str(tmp_path) not in text


@pytest.mark.parametrize("prompt", ["study", "describe", "raw", 'own=Say "who" the {occupation} is.\\'])
def test_the_cards_example_runs_and_prompts_as_the_training_did(
    tmp_path: Path, prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = card_of(tmp_path, ModelCard(method="PPO", prompt=prompt), None)
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    lines = capsys.readouterr().out.strip()
    assert lines.count("The architect was") == 5
    message = PROTOCOL.prompt(prompt).user_message("architect")
    expected = "The architect was"
    if message is not None:
        system, user = "<|im_start|>system\n<|im_end|>\n", f"<|im_start|>user\n{message}<|im_end|>\n"
        expected = f"{system}{user}<|im_start|>assistant\nThe architect was"
    assert names["text"] == expected
