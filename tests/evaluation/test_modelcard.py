"""Results in a model card: read by the Hub's own parser, in one place however often, nothing else touched."""

import dataclasses
import json
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from equipoise.errors import UserError
from equipoise.evaluation.modelcard import method_of, update, with_results
from equipoise.policy.card import ModelCard, render
from tests.evaluation.hostile import TEXTS, example, renamed
from tests.tasks import foreign_task

CARD = render(ModelCard(method="PPO, 200 steps", prompt="describe"), None)


def test_the_hub_reads_the_results(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    update(tmp_path, example(), "PPO")
    card = HubCard.load(tmp_path / "README.md")
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["strict"] == 0.9 and found["pairs_effective"] == pytest.approx(27.8, abs=0.1)
    assert card.data.tags == yaml.safe_load(CARD.split("---")[1])["tags"]
    assert "| strict success, % ↑ | 90.0 | \\[74.9, 98.0\\] |" in card.text
    assert card.text.index("## Results") < card.text.index("## Intended use")


def test_writing_again_changes_nothing_and_newer_results_replace_older_ones() -> None:
    once = with_results(CARD, example(), "PPO", "model")
    assert with_results(once, example(), "PPO", "model") == once
    other = with_results(once, example(), "Prompt-Only", "model")
    assert other.count("## Results") == 1 and other.count("model-index") == 1
    assert with_results(other, example(), "PPO", "model") == once


def test_what_a_person_wrote_into_the_card_stays() -> None:
    mine = CARD.replace("license: ", "datasets:\n- mine\nmodel-index:\n- name: old\n  results: []\nlicense: ")
    text = with_results(mine + "\nA last word.\n", example(), "PPO", "model")
    matter = yaml.safe_load(text.split("---")[1])
    assert matter["datasets"] == ["mine"] and matter["model-index"][0]["name"] == "model"
    assert text.endswith("\nA last word.\n")
    without = text.partition("<!-- results")[0] + text.partition("end -->\n\n")[2]
    assert without.partition("\n---\n")[2] == (mine + "\nA last word.\n").partition("\n---\n")[2]


def test_no_other_file_in_the_folder_is_written(tmp_path: Path) -> None:
    for name in ("README.md", "model.safetensors", "config.json"):
        (tmp_path / name).write_text(CARD if name == "README.md" else "{}")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    update(tmp_path, example(), "PPO")
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"README.md"}


@pytest.mark.parametrize("changed", [False, True])
def test_an_exports_card_stays_an_exports_and_a_persons_a_persons(tmp_path: Path, changed: bool) -> None:
    """What `export.json` has on record of a card is what `report --card` made of it, but of no other text."""
    card = tmp_path / "README.md"
    files = {"README.md": [sha256(CARD.encode()).hexdigest()], "config.json": ["0"]}
    (tmp_path / "export.json").write_text(json.dumps({"written_by": "equipoise", "files": files}))
    card.write_text(CARD + "Mine.\n" * changed)
    update(tmp_path, example(), "PPO")
    known = json.loads((tmp_path / "export.json").read_text())["files"]
    assert (sha256(card.read_bytes()).hexdigest() in known["README.md"]) is not changed
    assert known["config.json"] == ["0"] and files["README.md"][0] in known["README.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_name_breaks_neither_front_matter_nor_section(name: str) -> None:
    evaluation = renamed(example(), lambda old: name if old == "PPO" else old)
    text = with_results(CARD, evaluation, name, name)
    (entry,) = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))["model-index"]
    assert entry["results"][0]["metrics"][0]["value"] == 0.9
    assert with_results(text, evaluation, name, name) == text
    assert "<script" not in text.partition("---\n")[2].partition("---\n")[2]


def test_the_method_is_found_by_the_models_name_or_its_usual_one(tmp_path: Path) -> None:
    assert method_of(tmp_path / "anything", example(), None) == "PPO"
    assert method_of(tmp_path / "anything", example(), "Prompt-Only") == "Prompt-Only"
    without = renamed(example(), lambda old: old.replace("PPO", "mine"))
    with pytest.raises(UserError, match="--card-method, one of Prompt-Only, Generate-and-Filter, mine"):
        method_of(tmp_path / "anything", without, None)
    with pytest.raises(UserError, match="there is no method 'SFT'"):
        method_of(tmp_path, example(), "SFT")


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot put results into"):
        update(tmp_path, example(), "PPO")


def test_the_card_names_the_judge_once_how_the_kl_was_estimated_and_n() -> None:
    text = with_results(CARD, example(), "PPO", "model")
    assert "bundled (bundled)" not in text and "(n = 40)" in text
    kl = example().methods["PPO"].kl
    assert kl is not None and (not kl.note or "That KL to the base model is" in text)


def test_one_sentence_about_one_occupation_is_singular() -> None:
    evaluation = example()
    method = evaluation.methods["PPO"]
    alone = dataclasses.replace(method, n=1, occupations=dict(list(method.occupations.items())[:1]))
    text = with_results(CARD, dataclasses.replace(evaluation, methods={"PPO": alone}), "PPO", "model")
    assert "1 sentence about 1 occupation, measured" in text and '"name": "1 occupation"' in text


def test_a_card_claims_what_it_was_trained_for_and_tags_only_what_is_true() -> None:
    assert "was trained with `equipoise` to continue" in CARD and "This model continues" not in CARD
    foreign = render(ModelCard(method="supervised fine-tuning on 9 sentences", prompt="raw", task=foreign_task()), None)
    assert yaml.safe_load(foreign.split("---")[1])["tags"] == ["sft", "occupations"]
    assert {"ppo", "gender-stereotypes"} <= set(yaml.safe_load(CARD.split("---")[1])["tags"])


def test_a_card_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    with pytest.raises(UserError, match="no model card that equipoise wrote"):
        update(tmp_path, example(), "PPO")
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"
