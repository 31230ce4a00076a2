"""A random pair of runs in shared folders, killed and continued at random."""

import json
import shutil
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from equipoise.errors import UserError
from equipoise.runs.checkpoint import newest
from equipoise.runs.ownership import OWNER

from .light import everything, light, rows_of, work


class Pair(RuleBasedStateMachine):
    """Runs of two seeds in two output and two checkpoint folders, killed anywhere, their folders moved about."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.where = Path(tempfile.mkdtemp())
        self.kept: dict[str, list[tuple[int, float]]] = {}
        """Rows of each output folder that a checkpoint counts on: they may never go."""

    def teardown(self) -> None:
        shutil.rmtree(self.where)

    @rule(
        out=st.sampled_from(["o1", "o2"]),
        checkpoints=st.sampled_from(["c1", "c2"]),
        seed=st.sampled_from([1, 2]),
        rows=st.integers(0, 4),
        saved=st.none() | st.integers(1, 4),
    )
    def train(self, out: str, checkpoints: str, seed: int, rows: int, saved: int | None) -> None:
        before = everything(self.where)
        try:
            work(light(self.where, out, checkpoints, seed=seed), rows, saved)
        except UserError:
            changed = {k: v for k, v in everything(self.where).items() if before.get(k) != v}
            assert not changed and set(before) == set(everything(self.where))
        found = newest(self.where / checkpoints)
        step = found.step if found else 0
        if self.where.joinpath(out, "training_metrics.csv").exists() and rows_of(self.where / out):
            record = json.loads((self.where / out / "run.json").read_text())
            owner = self.where / checkpoints / OWNER
            if owner.exists() and json.loads(owner.read_text())["run"] == record["run"]:
                self.kept[out] = [row for row in rows_of(self.where / out) if row[0] <= step]

    @rule(kind=st.sampled_from(["o", "c"]))
    def swap(self, kind: str) -> None:
        """The two folders exchange their names."""
        first, second, third = (self.where / f"{kind}{x}" for x in ("1", "2", "3"))
        for a, b in ((first, third), (second, first), (third, second)):
            if a.exists():
                a.rename(b)
        if kind == "o":
            self.kept = {{"o1": "o2", "o2": "o1"}[name]: rows for name, rows in self.kept.items()}

    @rule(which=st.sampled_from(["c1", "c2"]), there=st.booleans())
    def move_checkpoints(self, which: str, there: bool) -> None:
        here, away = self.where / which, self.where / f"away-{which}"
        a, b = (here, away) if there else (away, here)
        if a.exists() and not b.exists():
            a.rename(b)

    @invariant()
    def no_row_is_lost_or_mixed(self) -> None:
        for out in ("o1", "o2"):
            rows = rows_of(self.where / out)
            assert len({seed for _, seed in rows}) <= 1, "rows of two seeds"
            assert [step for step, _ in rows] == sorted({step for step, _ in rows}), "rows out of order"
            assert self.kept.get(out, []) == rows[: len(self.kept.get(out, []))], "rows were lost"
            steps = [step for step, _ in rows]
            assert not steps or steps == list(range(steps[0], steps[0] + len(steps))), "rows of two runs"
            record = self.where / out / "run.json"
            if rows and record.exists():
                assert json.loads(record.read_text())["config"]["seed"] == rows[0][1], "one's record, the other's rows"


Pair.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
test_a_random_pair_of_runs_in_shared_folders_never_loses_or_mixes_a_row = Pair.TestCase
