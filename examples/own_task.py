"""A study of your own: read the task file, score sentences by it, measure two methods, draw the figures.

    python examples/own_task.py

No model is needed. The numbers come as pandas' data frames; `own-task/` gets the figures and the evaluation, of which
`equipoise report own-task/evaluation` makes a page.
"""

from pathlib import Path

import pandas as pd

import equipoise

TASK = equipoise.read_task(Path(__file__).with_name("own_task.yaml"))
ENDS = {
    "plain": ["at work for long hours in the city.", "kind to everyone who asks.", "here."],
    "both": ["skilled and warm with everyone who asks.", "both capable and friendly at work.",
             "efficient and kind to all who come."],
}  # fmt: skip


def main() -> int:
    print(equipoise.score("The nurse is skilled and warm with everyone.", task=TASK).T)
    sentences = pd.DataFrame(
        [
            {"method": method, "occupation": name, "text": TASK.sentence(name, end)}
            for method, ends in ENDS.items()
            for name in TASK.names
            for end in ends
        ]
    )
    results = equipoise.evaluate(sentences, task=TASK, fluency=False)
    print(results)
    print(results.comparisons[["Metric", "A", "B", "Difference", "PHolm"]])
    folder = Path("own-task")
    results.save(folder / "evaluation")
    for name, figure in results.figures().items():
        figure.savefig(folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
