"""A few sentences of the untrained model, kept for the closing screen, which shows them beside the trained one's."""

import json
from collections.abc import Iterable
from pathlib import Path

from equipoise.policy.sample import NonFiniteLogits
from equipoise.ppo.closing import SHOWN
from equipoise.ppo.evaluate import draw_sentences
from equipoise.ppo.summary import UNTRAINED
from equipoise.ppo.training import Training
from equipoise.runs.files import write_file


def keep_untrained(training: Training) -> None:
    """Sample and keep them: the first occupation's, at the generation settings, with random numbers of their own."""
    config, policy = training.config, training.policy
    occupation = config.occupations[0]
    sampling = config.evaluation.sampling(config.sampling)
    # On a GPU every number of rows has a decoder of its own: there the run's is used.
    rows = config.ppo.batch_size if policy.device.type == "cuda" else SHOWN
    prompts = {occupation: training.prompts[occupation]}
    try:
        drawn = draw_sentences(policy, config.task, prompts, sampling, SHOWN, "untrained", rows, ranks=training.ranks)
    except NonFiniteLogits:  # the first step will meet them too, and be kept for inspection
        return
    path, lines = (
        Path(config.run.output_dir) / UNTRAINED,
        sentence_lines(zip(drawn.occupations, drawn.texts, strict=True)),
    )
    training.ranks.first_does(lambda: write_file(path, lines))


def sentence_lines(sentences: Iterable[tuple[str, str]]) -> str:
    """(occupation, text) as lines of JSON, each with its number within its occupation, from 1."""
    lines, counts = [], dict[str, int]()
    for occupation, text in sentences:
        counts[occupation] = counts.get(occupation, 0) + 1
        lines.append(json.dumps({"occupation": occupation, "run_id": counts[occupation], "text": text}) + "\n")
    return "".join(lines)
