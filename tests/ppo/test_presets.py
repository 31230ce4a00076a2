"""Which preset a machine gets, what presets hold, and how options, a file and presets go together."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.commands.train import COMMON, configure
from equipoise.errors import UserError
from equipoise.policy.config import LLAMA_8B
from equipoise.ppo import machine, preflight
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.machine import Machine
from equipoise.ppo.preflight import choose
from equipoise.ppo.presets import PRESETS, preset
from equipoise.ppo.sweep import read_plans
from equipoise.ppo.tool_config import SweepConfig
from tests.tasks import one_class_task

CPU = Machine(gpu=None, gpu_free_gb=0.0, memory_free_gb=8.0, cores=2)


def gpu(free_gb: float) -> Machine:
    return dataclasses.replace(CPU, gpu="NVIDIA X", gpu_free_gb=free_gb)


class Access:
    def __init__(self, reason: str = "") -> None:
        self.available, self.reason = not reason, reason


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Hub gives access to everything; the models it is asked for."""
    asked: list[str] = []
    monkeypatch.setattr(preflight, "hub_access", lambda model: asked.append(model) or Access())
    return asked


def test_the_guides_preset_is_its_model_its_prompt_and_its_numbers() -> None:
    guide = preset("guide")
    assert (guide.policy.model, guide.policy.tuning, guide.prompt, guide.steps) == (LLAMA_8B, "lora", "study", 2000)
    added = {"entropy_coef": 0.01, "average_weights": 0.98}  # see presets.py: of these the guide says nothing
    assert guide.ppo == dataclasses.replace(TrainConfig().ppo, **added) and guide.reward == TrainConfig().reward
    assert guide.sampling.temperature == 1.0 and guide.sampling.max_new_tokens == 32
    assert guide.warm_start.warm_start == "off" and guide.diversity.diversity_weight == 0.0
    assert guide.run.save_every == 100 and guide.run.sample_every == 50 and guide.run.keep_checkpoints == 0


def test_bundled_gpu_has_the_guides_numbers_on_the_bundled_model() -> None:
    mine = preset("bundled-gpu")
    assert (mine.policy.model, mine.prompt, mine.steps) == ("bundled", "describe", 2000)
    assert mine.ppo == preset("guide").ppo


def test_on_the_bundled_model_the_guides_preset_is_plain_ppo_with_the_prompt_study() -> None:
    """What docs/FRONTIER.md says of `ppo-study` it says of the guide's preset."""
    guide = configure(["--preset", "guide", "--model", "bundled"])[0].document()
    plain = configure(["--preset", "bundled-gpu", "--prompt", "study"])[0].document()
    guide["run"]["keep_checkpoints"] = plain["run"]["keep_checkpoints"]  # of the files alone
    assert guide | {"preset": ""} == plain | {"preset": ""}


def test_on_the_bundled_model_the_guides_preset_trains_all_weights_unless_asked_otherwise(tmp_path: Path) -> None:
    config, told, _ = configure(["--preset", "guide", "--model", "bundled"])
    assert config.policy.tuning == "full" and [line for line in told if line.startswith("tuning ")]
    assert config.ppo == preset("guide").ppo
    file = tmp_path / "run.yaml"
    file.write_text("preset: guide\nmodel: bundled\ntuning: lora\n")
    for words in (["--preset", "guide", "--model", "bundled", "--tuning", "lora"], ["--config", str(file)]):
        config, told, _ = configure(words)
        assert config.policy.tuning == "lora" and not [line for line in told if line.startswith("tuning ")]
        assert [line for line in told if line.startswith("note ") and "--learning-rate 3e-4" in line]
    faster = ["--preset", "guide", "--model", "bundled", "--tuning", "lora", "--learning-rate", "3e-4"]
    assert not [line for line in configure(faster)[1] if "adapters" in line]
    assert not [line for line in configure(["--preset", "guide"])[1] if "adapters" in line]
    assert configure(["--preset", "guide"])[0].policy.tuning == "lora"
    assert configure(["--preset", "bundled-cpu"])[0].policy.tuning == "lora"
    assert configure(["--preset", "guide", "--model", "bundled", "--use-8bit"])[0].policy.tuning == "lora"
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("base: {preset: guide, model: bundled}\nsettings:\n  all: {}\n  adapters: {tuning: lora}\n")
    plans = read_plans(SweepConfig(sweep, str(tmp_path / "out")))
    assert [plan.config.policy.tuning for plan in plans] == ["full", "lora"]


@pytest.mark.parametrize("name", ["near", "even"])
def test_a_targets_preset_trains_all_weights_at_their_own_learning_rates(name: str) -> None:
    """Those of adapters are eight and six times as large."""
    config, told, _ = configure(["--preset", name, "--tuning", "full"])
    assert (config.ppo.learning_rate, config.warm_start.warm_start_learning_rate) == (4e-5, 1e-4)
    (line,) = [line for line in told if line.startswith("tuning ")]
    assert "--learning-rate 4e-05 --warm-start-learning-rate 0.0001, since" in line
    asked = configure(["--preset", name, "--tuning", "full", "--learning-rate", "1e-5"])[0]
    assert (asked.ppo.learning_rate, asked.warm_start.warm_start_learning_rate) == (1e-5, 1e-4)
    assert configure(["--preset", name])[:2] == (preset(name), [f"preset    {name}, as asked"])


def test_what_an_algorithm_has_no_use_for_is_named_all_at_once() -> None:
    words = ["--preset", "near", "--algorithm", "rloo"]
    with pytest.raises(UserError, match=r"is about a value head, which RLOO does not have: .* give (--.*);") as refused:
        configure(words)
    without = re.search(r"give (--[^;]*);", str(refused.value))
    assert without is not None
    assert configure([*words, *without[1].split()])[0].ppo.algorithm == "rloo"


def test_the_guides_preset_says_what_it_adds_and_how_to_do_without() -> None:
    (line,) = [each for each in configure(["--preset", "guide"])[1] if each.startswith("guide ")]
    assert "an entropy bonus (0.01) and a moving average of the weights (0.98)" in line
    assert line.endswith("without: --entropy-coef 0 --average-weights 0")
    half = configure(["--preset", "guide", "--average-weights", "0"])[1]
    assert "guide     beside the guide's own numbers: an entropy bonus (0.01); without: --entropy-coef 0" in half
    config, told, _ = configure(["--preset", "guide", "--entropy-coef", "0", "--average-weights", "0"])
    assert config.ppo == TrainConfig().ppo and not [each for each in told if each.startswith("guide ")]
    assert not [each for each in configure(["--preset", "bundled-gpu"])[1] if each.startswith("guide ")]


@pytest.mark.parametrize("name", ["near", "even"])
def test_targets_are_paid_for_success_alone_and_begin_with_ctrl_gs_sentences(name: str) -> None:
    config = preset(name)
    assert config.reward.bonus_per_term == 0.0 and config.strict_bonus > 0  # a further term would be waste
    assert config.warm_start.warm_start_target == name and config.warm_start.warm_start_epochs == 1
    assert config.ppo.decay_steps == config.steps and config.warm_start.wanted
    assert (config.diversity.diversity_weight > 0) == (name == "even")
    if name == "even":  # the price of a nat: what makes evenness the optimum
        assert config.diversity.diversity_weight == config.ppo.kl_coef and config.diversity.diversity_on == "even"


@pytest.mark.parametrize("name", ["guide", "bundled-gpu"])
def test_plain_presets_pay_the_protocols_reward_alone(name: str) -> None:
    config = preset(name)
    assert config.strict_bonus == config.missing_eos_penalty == 0.0 and config.reward == TrainConfig().reward
    assert config.diversity.diversity_weight == config.diversity.opening_weight == 0.0
    assert not config.warm_start.wanted


def test_varied_keeps_the_guides_batch_and_bound_of_an_update() -> None:
    mine, guide = preset("varied").ppo, preset("guide").ppo
    for name in ("batch_size", "mini_batch_size", "ppo_epochs", "target_kl", "clip", "gamma", "gae_lambda"):
        assert getattr(mine, name) == getattr(guide, name)


def test_every_preset_is_named_as_it_is_called_and_bundled_ones_need_no_access() -> None:
    assert set(PRESETS) == {"guide", "bundled-gpu", "varied", "near", "even", "bundled-cpu"}
    for name, config in PRESETS.items():
        assert config.preset == name and config.system == "" and config.sampling.temperature == 1.0
        assert (config.policy.model, config.prompt) == ("bundled", "describe") or name == "guide"


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no preset 'gide': choose guide, bundled-gpu, varied, near, even, bundled-cpu"):
        preset("gide")


def test_without_a_gpu_the_bundled_model_is_trained_on_the_cpu_and_the_hub_is_not_asked(hub: list[str]) -> None:
    choice = choose(CPU)
    assert choice.config == preset("bundled-cpu") and "no CUDA GPU" in choice.reasons[0]
    assert hub == []


def test_a_large_gpu_and_access_get_the_guides_run(hub: list[str]) -> None:
    choice = choose(gpu(140))
    assert choice.config == preset("guide") and LLAMA_8B in choice.reasons[0]
    assert hub == [LLAMA_8B]


def test_a_24_gb_card_gets_it_in_8_bits(hub: list[str]) -> None:
    config = choose(gpu(23.5)).config
    assert config == choose(gpu(16.4)).config  # a card of 16 GiB
    assert config.policy.use_8bit and config.policy.model == LLAMA_8B
    assert dataclasses.replace(config, policy=dataclasses.replace(config.policy, use_8bit=False)) == preset("guide")


def test_a_small_gpu_or_no_access_gets_the_bundled_model_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "hub_access", lambda model: Access("you are not logged in"))
    for here, why in ((gpu(11), "11 GB free"), (gpu(140), "you are not logged in")):
        choice = choose(here)
        assert choice.config == preset("bundled-gpu") and why in choice.reasons[0]


@pytest.mark.parametrize("free_gb", [None, 11, 20, 140])
def test_the_reason_for_a_preset_claims_no_model_no_device_and_no_dtype(
    free_gb: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--model`, `--device` and `--dtype` may be given beside it."""
    monkeypatch.setattr(preflight, "hub_access", lambda model: Access())
    (reason,) = choose(CPU if free_gb is None else gpu(free_gb)).reasons
    assert "training" not in reason and "bfloat16" not in reason and re.search(r"preset \S+, made for ", reason)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "inspect_machine", lambda: CPU)


@pytest.mark.usefixtures("on_cpu")
def test_with_no_options_the_machine_decides_and_the_first_line_says_why_and_how_to_choose_otherwise() -> None:
    config, reasons, overwrite = configure([])
    assert config == preset("bundled-cpu") and not overwrite
    assert "no CUDA GPU" in reasons[0] and "--preset guide" in reasons[0] and "--model" in reasons[0]


def test_options_change_a_preset_and_no_more() -> None:
    config, reasons, overwrite = configure(["--steps", "7", "--preset", "guide", "--clip", "0.1", "--overwrite"])
    assert overwrite and "guide, as asked" in reasons[0]
    guide = preset("guide")
    assert config == dataclasses.replace(guide, steps=7, ppo=dataclasses.replace(guide.ppo, clip=0.1))


@pytest.mark.usefixtures("on_cpu")
def test_a_files_preset_is_where_it_starts_its_settings_come_next_and_options_last(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: guide\nsteps: 5\nclip: 0.1\n")
    config, reasons, _ = configure(["--config", str(file), "--steps", "6"])
    guide = preset("guide")
    assert config == dataclasses.replace(guide, steps=6, ppo=dataclasses.replace(guide.ppo, clip=0.1))
    assert "guide, as" in reasons[0] and "run.yaml" in reasons[0]

    other, _, _ = configure([f"--config={file}", "--preset=bundled-gpu"])
    assert (other.preset, other.policy.model, other.steps, other.ppo.clip) == ("bundled-gpu", "bundled", 5, 0.1)

    file.write_text("clip: 0.1\n")
    assert configure(["--config", str(file)])[0].preset == "bundled-cpu"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("argv", "text", "says"),
    [
        (["--preset"], None, "--preset"),
        (["--config"], None, "--config"),
        (["--preset", "gide"], None, "no preset 'gide'"),
        (["--config", "FILE"], "preset: gide\n", "no preset 'gide'"),
        (["--config", "FILE"], "preset: [guide]\n", "no preset"),
        (["--config", "FILE"], "stepz: 3\n", "no setting 'stepz'"),
        (["--config", "FILE"], None, "cannot read"),
        (["--over"], None, "--over"),  # abbreviations would change their meaning with the next option
        (["--pre", "guide"], None, "--pre"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, argv: list[str], text: str | None, says: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        configure([str(file) if word == "FILE" else word for word in argv])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_help_looks_at_no_hardware_and_lists_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise AssertionError("looked")

    monkeypatch.setattr(machine, "inspect_machine", fail)
    with pytest.raises(SystemExit) as stop:
        configure(["--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = [
        TrainConfig(),
        *(getattr(TrainConfig(), f.name) for f in dataclasses.fields(TrainConfig) if f.name != "task"),
    ]
    for group in filter(dataclasses.is_dataclass, groups):
        for field in dataclasses.fields(group):
            if field.name == "task" or not dataclasses.is_dataclass(getattr(group, field.name)):
                assert f"--{field.name.replace('_', '-')}" in text or f"no-{field.name.replace('_', '-')}" in text
    for own in ("--preset NAME", "--config FILE.yaml", "--overwrite"):
        assert own in text


@pytest.mark.usefixtures("on_cpu")
def test_options_are_understood_as_the_guide_spells_its_constants() -> None:
    config, _, _ = configure(["--BATCH_SIZE", "32", "--mini_batch_size=8", "--TRAINING_STEPS", "5", "--Use_8bit"])
    assert (config.ppo.batch_size, config.ppo.mini_batch_size, config.steps) == (32, 8, 5)
    assert config.policy.use_8bit


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_constant_edited_in_the_script_counts_as_an_option_and_one_on_the_line_wins(name: str | None) -> None:
    asked = ["--preset", name] if name else []
    edited = {"BATCH_SIZE": 1024, "TRAINING_STEPS": 50, "LEARNING_RATE": 2e-5}
    config, lines, _ = configure([*asked, "--steps", "60"], edited)
    plain = configure(asked)[0]
    expected = dataclasses.replace(
        plain, steps=60, ppo=dataclasses.replace(plain.ppo, batch_size=1024, learning_rate=2e-5)
    )
    assert config == expected
    text = "\n".join(lines)
    assert "--batch-size 1024, from BATCH_SIZE in train_rlhf.py" in text
    assert "--steps from the command line, not TRAINING_STEPS = 50" in text


@pytest.mark.usefixtures("on_cpu")
def test_a_constant_wins_over_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 1024\nclip: 0.1\n")
    config, _, _ = configure(["--config", str(file)], {"BATCH_SIZE": 32})
    assert (config.ppo.batch_size, config.ppo.clip) == (32, 0.1)


def test_help_shows_the_twenty_options_that_matter_and_how_to_see_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        configure(["--help"])
    text = capsys.readouterr().out
    listed = re.findall(r"^[│| ]*(--[a-z][\w-]*)[ ,]", text[text.index("-h, --help") :], re.MULTILINE)
    assert stop.value.code == 0 and len(listed) == len(COMMON) == 20
    assert set(listed) == {f"--{name.replace('_', '-')}" for name in COMMON}
    assert "those of the preset bundled-cpu" in " ".join(text.split())
    assert "--help-all" in text and "--gae-lambda" not in text and "(model: str" not in text
    assert not re.search(r"^[│| ]*--[a-z][\w-]* [A-Z]+ +\(default", text, re.MULTILINE), (
        "an option without a word on it"
    )


def test_a_prompt_that_was_asked_for_is_not_said_to_stand_in_for_another(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    prompts = {"tell": "Tell of the {occupation}.", "ask": "Who is the {occupation}?"}
    file.write_text(one_class_task(prompts=prompts).to_yaml())
    argv = ["--preset", "guide", "--task", str(file)]
    config, reasons, _ = configure(argv)
    assert config.prompt == "tell" and any("'tell', since the task has no 'study'" in line for line in reasons)
    for more in (["--prompt", "ask"], ["--prompt=ask"], ["--prompt", "tell"], ["--config", str(tmp_path / "c.yaml")]):
        (tmp_path / "c.yaml").write_text("prompt: ask\n")
        config, reasons, _ = configure([*argv, *more])
        assert config.prompt in prompts and not any("since the task has no 'study'" in line for line in reasons)


def test_a_mistake_points_to_the_help_of_what_was_called() -> None:
    for prog in ("equipoise train", "equipoise doctor", "train_rlhf.py"):
        for argv in (["--preset", "guide", "--tuning", "half"], ["--preset"]):
            with pytest.raises(UserError, match=f"; {prog} --help lists the options"):
                configure(argv, {}, prog)


def test_bench_begins_from_the_preset_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("equipoise.ppo.bench.bench", lambda config, ranks: seen.append(config.train) or {})
    assert cli.main(["bench", "--preset", "varied", "--steps", "3"]) == 0
    assert seen == [dataclasses.replace(preset("varied"), steps=3)]
    assert cli.main(["bench", "--preset", "varid"]) == 2
