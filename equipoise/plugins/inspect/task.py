"""inspect_ai's task `occupations`: a sentence about each occupation, scored by the task's matcher."""

from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, mean, metric, scorer, stderr
from inspect_ai.solver import TaskState, generate

from equipoise.errors import UserError
from equipoise.plugins.measured import MEANS, asked, measured
from equipoise.plugins.measured import effective_pairs as effective
from equipoise.plugins.measured import unique_pairs as unique


@metric
def unique_pairs() -> Metric:
    """How many different pairs of first terms there are."""

    def count(scores: list[SampleScore]) -> float:
        return unique(str((each.score.metadata or {}).get("pair", "")) for each in scores)

    return count


@metric
def effective_pairs() -> Metric:
    """As many equally frequent pairs would be as varied."""

    def count(scores: list[SampleScore]) -> float:
        return effective(str((each.score.metadata or {}).get("pair", "")) for each in scores)

    return count


@scorer(metrics=[{name: [mean(), stderr(cluster="occupation")] for name in MEANS}, unique_pairs(), effective_pairs()])
def sentence() -> Scorer:
    """What `equipoise evaluate` measures of each sentence, under its names; standard errors are over occupations."""

    async def score(state: TaskState, target: Target) -> Score:
        # Messages alone: what is asked may end as a sentence begins, and is not continued for that.
        found = measured(state.metadata["label"], [{"role": "user", "content": ""}], state.output.completion)
        value = {name: found[name] for name in MEANS}
        return Score(value=value, answer=found["text"], metadata={k: v for k, v in found.items() if k not in value})

    return score


@task
def occupations(
    task: str = "", prompt: str = "", runs: int = 1, prompts: str = "", system: str = "", max_tokens: int = 64
) -> Task:
    """A sentence about each of the task's occupations, `runs` times, sampled as the protocol does.

    `task`: a task file, or the name of a packaged task; `prompt`: one of its prompts, or NAME=INSTRUCTION; `prompts`: a
    file of `equipoise prompts --for trl` in their place. The model writes the sentence from its first word: providers
    close every turn, so none is begun. Raises UserError.
    """
    rows = asked(task, prompt, runs, prompts, system, begin=False)
    if any(each.begun or not each.chat for each in rows):
        raise UserError(
            f"{prompts} holds texts, or turns that are begun, and inspect's providers take whole messages alone: write "
            "it without --model"
        )
    samples = []
    for number, each in enumerate(rows, 1):
        turns: list[Any] = [] if each.system is None else [ChatMessageSystem(content=each.system)]
        samples.append(
            Sample(
                id=f"{each.occupation}-{each.run}" if not prompts else number,
                input=[*turns, ChatMessageUser(content=each.user)],
                metadata={"occupation": each.occupation, "run": each.run, "label": each.label},
            )
        )
    return Task(
        dataset=MemoryDataset(samples, name="occupations"),
        solver=generate(),
        scorer=sentence(),
        config=GenerateConfig(temperature=1.0, top_p=0.95, max_tokens=max_tokens),
    )
