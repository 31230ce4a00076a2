"""What the documentation says is there: commands, options, files, functions, links, examples, tables."""

import ast
import dataclasses
import importlib
import inspect
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

import equipoise
from equipoise import options
from equipoise.cli import COMMANDS, SHARED
from equipoise.commands import several
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import packaged_tasks, task_from_document
from equipoise.protocol.task_checks import KEYS

ROOT = Path(__file__).parents[1]
LOG = "docs/LOG.md"  # of the past: it may name what is gone
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
}
PRESENT = {name: text for name, text in PAGES.items() if name not in (LOG, "CHANGELOG.md")}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its first two lines left out."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", PAGES[page], flags=re.M)[1]
    table = re.search(r"^(\|.*\n)+", section, re.M)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


def named(page: str, heading: str) -> list[str]:
    """What stands in back quotes first in each row of that table."""
    return [re.findall(r"`([^`]+)`", row[0])[0] for row in rows(page, heading)]


def test_every_page_has_its_place_in_the_margin_of_the_built_pages_and_a_link_from_another() -> None:
    conf = runpy.run_path(str(ROOT / "docs/conf.py"))
    found = {path for pattern in conf["include_patterns"] for path in ROOT.glob(pattern)}
    assert sorted(str(path.relative_to(ROOT).with_suffix("")) for path in found) == sorted(
        {*conf["PAGES"], conf["root_doc"]}
    )
    linked = {
        ((ROOT / page).parent / target.partition("#")[0]).resolve()
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^):]+)\)", text)
        if (ROOT / page).name != target.partition("#")[0]
    }
    assert {path for path in found if path.name != "README.md"} <= linked


# Command lines.

LINES = [(page, line) for page in PRESENT for block in blocks(page, "sh") for line in block.splitlines() if line]
ENTRIES = {"python train_rlhf.py": "train", "python generate_rlhf.py": "generate"}


class Understood(Exception):
    """The options were read."""


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the command lines read, as the pages show them."""
    monkeypatch.chdir(tmp_path)
    settings = next(block for block in blocks("docs/TRAINING.md", "yaml") if "steps:" in block)
    Path("run.yaml").write_text(settings, encoding="utf-8")
    for page, name in (("README.md", "warmth.yaml"), ("docs/TASKS.md", "my-study.yaml")):
        task = next(b for b in blocks(page, "yaml") if {"name", "occupations", "classes"} <= yaml.safe_load(b).keys())
        Path(name).write_text(task, encoding="utf-8")


@pytest.mark.parametrize(("page", "line"), LINES)
@pytest.mark.usefixtures("examples")
def test_every_command_line_is_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = re.sub(r"\s+#.*", "", line)
    for entry, command in ENTRIES.items():
        line = line.replace(entry, f"equipoise {command}")
    if made := re.fullmatch(r'make ([\w-]+)(?: ARGS="(.*)")?', line):
        assert re.search(rf"^{made[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), line
        if made[1] not in ("train", "generate") or made[2] is None:
            return
        line = f"equipoise {made[1]} {made[2]}"
    program, *argv = shlex.split(line)
    if program == "torchrun":
        started = get_args_parser().parse_args(argv)
        script = {"train_rlhf.py": ["train"], "generate_rlhf.py": ["generate"], "equipoise": []}
        assert started.training_script in script, f"{page}: {line} is not tested"
        assert started.module == (started.training_script == "equipoise"), line
        program, argv = "equipoise", [*script[started.training_script], *started.training_script_args]
    if program != "equipoise":
        assert line.startswith(("pip install ", "tensorboard --logdir ")), f"{page}: {line} is not tested"
        return
    argv = argv[: argv.index("<")] if "<" in argv else argv
    understand(argv, monkeypatch)


def understand(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the command up to where its options are read, which raises UserError for what it does not know."""
    module = importlib.import_module(COMMANDS[argv[0]][0])
    place, name = next(
        ((module, n) for n in ("configure", "_parse", "parse") if hasattr(module, n)), (options, "parse")
    )
    read = getattr(place, name)

    def understood(*args: Any, **kwargs: Any) -> Any:
        if name == "configure":  # a preset named first keeps this from looking at GPU and Hub; one on the line wins
            args = (["--preset", "bundled-cpu", *args[0]],)
        read(*args, **kwargs)
        raise Understood

    monkeypatch.setattr(place, name, understood)
    if argv[0] in SHARED and argv[0] != "bench":  # processes of its own get the same command line without their number
        monkeypatch.setattr(several, "launch", lambda command, _: module.main(command[3:]))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(Understood):
        module.main(argv[1:])


def test_the_pages_show_every_command_and_many_ways_to_train() -> None:
    shown = {line.split()[1] for _, line in LINES if line.startswith("equipoise ")}
    assert COMMANDS.keys() - shown <= {"train", "generate"}  # which have entry points of their own
    training = {line for _, line in LINES if "train_rlhf.py" in line or "make train" in line}
    assert len(training) > 15 and any("generate_rlhf.py" in line for _, line in LINES)


def test_the_page_lists_the_commands_that_several_processes_share() -> None:
    assert set(named("docs/CLUSTER.md", "Commands over several GPUs")) == set(SHARED)


def test_commands_in_running_text_exist() -> None:
    known = COMMANDS.keys() | {"task", "NAME", "X", "COMMAND"}
    for page, text in PRESENT.items():
        assert set(re.findall(r"`equipoise ([\w-]+)", text)) <= known, page


def flags() -> Iterator[str]:
    """Every option of every command."""
    from equipoise.commands.demo import DemoConfig
    from equipoise.evaluation.config import EvaluateConfig, ReportConfig
    from equipoise.methods.sample import SampleConfig
    from equipoise.methods.sft import SftConfig
    from equipoise.methods.study import StudyConfig
    from equipoise.ppo.config import TrainConfig
    from equipoise.ppo.tool_config import BenchConfig, ExportConfig, SweepConfig

    kinds: list[Any] = [
        SampleConfig,
        SftConfig,
        StudyConfig,
        EvaluateConfig,
        ReportConfig,
        SweepConfig,
        BenchConfig,
        DemoConfig,
        ExportConfig,
    ]
    waiting = [*kinds, TrainConfig, RewardWeights]
    while waiting:
        for field in dataclasses.fields(waiting.pop()):
            if dataclasses.is_dataclass(field.default_factory):
                waiting.append(field.default_factory)
            yield from (f"--{no}{field.name.replace('_', '-')}" for no in ("", "no-"))
    yield from ("--preset", "--config", "--overwrite", "--task", "--new", "--json", "--help", "--help-all", "--version")
    yield from ("--gpus", "--processes")


def test_options_in_running_text_exist() -> None:
    known = {*flags(), "--no-deps", "--metadata"}
    for page, text in PRESENT.items():
        assert set(re.findall(r"`(--[a-z0-9-]+)", text)) <= known, page


def test_every_extra_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert sorted(named("docs/API.md", "Installing")) == sorted(extras)


def test_the_page_of_the_interface_lists_what_is_exported() -> None:
    assert sorted(named("docs/API.md", "What equipoise exports")) == sorted(equipoise.__all__)
    members = {
        name for row in rows("docs/API.md", "Many sentences, with pandas") for name in re.findall(r"`(\w+)", row[0])
    }
    fields = {field.name for field in dataclasses.fields(equipoise.Results) if not field.name.startswith("_")}
    public = {name for name in vars(equipoise.Results) if not name.startswith("_")}
    assert members == public | fields
    told = PAGES["docs/API.md"].split("Of a `Task` these are public:")[1].split("##")[0]
    of_task, of_reward = (set(re.findall(r"`(\w+)", part)) for part in told.split("Of a `Reward`:"))
    assert of_task - {"terms"} <= {*dir(equipoise.PROTOCOL)} and of_reward <= {*dir(equipoise.PROTOCOL.score("x"))}


@pytest.mark.parametrize("function", ["score", "evaluate", "train", "preset"])
def test_the_page_of_the_interface_has_the_arguments_as_they_are(function: str) -> None:
    page = PAGES["docs/API.md"].replace("`score(text, weights)`", "")  # a method of Task
    shown = re.findall(rf"`{function}\((\w[^`]*)\)`", page)[0].split(", ")
    names = [re.split(r"=", argument.lstrip("*"))[0] for argument in shown]
    assert names == [*inspect.signature(getattr(equipoise, function)).parameters][: len(names)]


# Files, functions, links.


def top_level(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PRESENT)
def test_every_file_and_function_that_is_named_is_there(page: str) -> None:
    for name in re.findall(r"`([\w-]+/[\w./-]+\.(?:py|yaml|csv|md))`", PAGES[page]):
        if "NAME" not in name and not name.startswith(("study/", "rlhf_")):
            assert (ROOT / name).is_file() or (ROOT / "equipoise" / name).is_file(), name
    for name, called in re.findall(r"`([\w/]+\.py)` →\s+((?:`\w+`(?:,\s+|\s+and\s+)?)+)", PAGES[page]):
        missing = set(re.findall(r"`(\w+)`", called)) - top_level(ROOT / name)
        assert not missing, f"{name} has no {missing}"


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target, _, anchor in (m.partition("#") for m in re.findall(r"\]\(([^)\s]+)\)", PAGES[page])):
        if target.startswith(("http:", "https:")):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PRESENT)
def test_python_examples_import_what_there_is(page: str) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("trl", "datasets")):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_no_page_names_a_machine() -> None:
    for page, text in PRESENT.items():
        assert not re.search(r"/(home|root|work|tmp)/|index-url|file://", text), page


# Tables and examples.


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len(PAGES["README.md"].split()) <= 1200


def test_the_readme_lists_every_command() -> None:
    listed = named("README.md", "The commands")
    assert sorted(listed) == sorted({*COMMANDS, "task"}), listed


def test_the_table_of_presets_is_theirs() -> None:
    from equipoise.ppo.presets import PRESETS

    table = dict(zip(named("docs/TRAINING.md", "Presets"), rows("docs/TRAINING.md", "Presets"), strict=True))
    assert list(table) == list(PRESETS)
    for name, (_, model, prompt, meant) in table.items():
        config = PRESETS[name]
        assert prompt == f"`{config.prompt}`" and re.search(rf"\b{config.steps:,} steps\b", meant), name
        assert ("Llama" in model) == ("Llama" in config.policy.model), name
        assert ("all weights" in model) == (config.policy.tuning == "full"), name


def test_the_table_of_methods_has_every_method() -> None:
    from equipoise.methods.sample import Method

    assert named("docs/METHODS.md", "The methods") == list(get_args(Method))


def test_the_table_of_the_reward_has_its_numbers() -> None:
    weights = RewardWeights()
    base, bonus, length, repetition = (
        [float(n) for n in re.findall(r"[+-][\d.]+|(?<=most )\+[\d.]+", row[1].replace("−", "-"))]
        for row in rows("docs/METHODS.md", "What is rewarded")
    )
    assert base == [weights.base_both, weights.base_one, weights.base_none]
    assert bonus == [weights.bonus_per_term, weights.bonus_max]
    assert length == [-weights.length_penalty] and repetition == [-weights.repetition_penalty]


def test_the_alerts_are_as_many_as_is_said() -> None:
    alerts = [row for row in re.findall(r"^\| `(\w+)` \|.*", PAGES["docs/METRICS.md"].split("| alert |")[1], re.M)]
    assert alerts[:12][-1] == "leak" and "the twelve alerts" in PAGES["docs/TRAINING.md"]


def test_every_key_of_a_task_file_is_explained_with_an_example() -> None:
    assert {re.findall(r"`(\w+)`", row[0])[0] for row in rows("docs/TASKS.md", "Every key")} == set(KEYS)
    assert {key for block in blocks("docs/TASKS.md", "yaml") for key in yaml.safe_load(block)} == set(KEYS)


def test_examples_of_task_files_are_read() -> None:
    whole = yaml.safe_load(blocks("README.md", "yaml")[0])
    task_from_document(whole, "README.md")
    rest = {key: whole[key] for key in ("name", "occupations", "classes")}
    for block in blocks("docs/TASKS.md", "yaml"):
        given = yaml.safe_load(block)
        task_from_document(given if rest.keys() <= given.keys() else rest | given, block)


def test_the_packaged_tasks_are_listed_wherever_they_are() -> None:
    tasks = packaged_tasks()
    listed = re.findall(r"^\| `([\w-]+)` \|.*Fiske|^\| `([\w-]+)` \|.*(?:default task, and|stem lists)",
                        PAGES["docs/TASKS.md"], re.M)  # fmt: skip
    assert sorted("".join(pair) for pair in listed) == sorted(tasks)
    assert all(f"`{name}`" in PAGES["README.md"] for name in tasks)


def test_every_line_of_the_security_page_names_a_test_that_is_there() -> None:
    page = PAGES["docs/SECURITY.md"]
    lines = [line for line in page.splitlines() if line.startswith("| ") and line != "| what | test |"]
    assert len(lines) >= 20
    for line in lines:
        named = re.fullmatch(r"\| .+ \| `(tests/[\w/]+\.py)::(test_\w+)` \|", line)
        assert named is not None, line
        assert re.search(rf"^def {named[2]}\(", (ROOT / named[1]).read_text(), re.M), line
    for heading in ("Never run", "Never fetched", "Never overwritten", "Never logged"):
        assert f"## {heading}" in page


def test_every_file_of_kernels_is_in_the_table_of_fast_paths_with_tests_that_exist() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("## Fast paths and their plain twins")[1]
    rows = [row.split("|") for row in text.split("## ")[0].splitlines() if row.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`(\w[\w/]*\.py)`", row[1])}
    kernels = {
        str(path.relative_to(ROOT / "equipoise"))
        for path in (ROOT / "equipoise").rglob("*.py")
        if "@triton.jit" in path.read_text()
    }
    assert kernels and kernels <= named, kernels - named
    for row in rows:
        assert re.search(r"`tests/(?!gpu)", row[3]) and (re.search(r"`tests/gpu", row[4]) or "same tests" in row[4])
        for name in re.findall(r"`([\w/]*\.py)`", "|".join(row[1:])):
            assert (ROOT / name).exists() or (ROOT / "equipoise" / name).exists(), name
