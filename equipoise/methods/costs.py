"""What a file of completions cost: `NAME.csv.costs.json`, kept up to date batch by batch.

Members: `method`; `seconds` of writing and `load_seconds` of loading, added up over resumes; `tokens` drawn, stop
tokens counted; `generations`, the sentences drawn; `accepted`, the rows with terms of every class (for gen-filter, the
draws that pass its filter); `generations_per_accepted`, null where none was; `rows` of the file. Where they are known:

- `training_seconds` of supervised fine-tuning, the making of its sentences not counted;
- `kl`: KL from the method's distribution to the base model's under the base prompt, nats per sentence, as
  {value, low, high, how}, the bounds being a 95 % interval's, with the `kl_sentences` it was estimated from;
- `outcomes`: of the same sentences, for each event, how many fail and how many succeed with each pair, and mean and
  variance of log q − log p in each of these classes; `pair_rates`: how often the base model succeeds with each pair
  (`measures/decomposition.py` says what both are for);
- `p0`: the probability that the base model's sentence complies, as {value, low, high, n, event, how},
  the event being `both` (terms of every class) or `strict` success;
- `ess`: effective sample size of the importance weights of a method that weights its sentences, and `log_weights`,
  those weights in nats, by occupation in the order of RunID (of p at the file's temperature; at a top-p below 1 their
  mean falls short of p0, as sentences outside the nucleus have no part in it, so `kl`, `p0` and `ess` are never
  estimated from such); `hmm`, what its hidden Markov model is.

Everything but the seconds is what an uninterrupted run would have written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import UserError
from equipoise.methods.completions import Key
from equipoise.protocol.task import Task
from equipoise.runs.files import write_file
from equipoise.runs.ownership import look, marked

if TYPE_CHECKING:
    from equipoise.methods.prompted import Written


def costs_path(output: Path) -> Path:
    """Where the costs of the file `output` are kept."""
    return output.with_name(output.name + ".costs.json")


class Costs:
    """The running account of one file. `document` holds what is known besides the counters."""

    def __init__(self, output: Path, method: str, task: Task, texts: Mapping[Key, str], candidates: int = 1) -> None:
        """`texts` are the rows that the file of generations holds, in its order; without any the account is new. Each
        was chosen among so many `candidates`, which are all counted. Raises UserError for somebody else's file."""
        self.path = costs_path(output)
        self.task = task
        self.method = method
        self.seconds = 0.0
        self.load_seconds = 0.0
        self.tokens = 0
        self.priced = 0
        self.candidates = candidates
        self.log_weights: dict[Key, float] = {}
        self.document: dict[str, Any] = {}
        self.closed = False
        """Whether the account on record is that of a finished file."""
        found = look(self.path, _is_account, b'{"method":"')
        if found.state == "foreign" and self.path.lstat().st_size:
            raise UserError(
                f"{self.path} is there and equipoise did not write it, so the costs cannot take its place: move it "
                "away, or choose another --output"
            )
        if texts:
            self._read(found.document)
        self.unpriced = set(list(texts)[self.priced :])
        """Rows whose costs are not on record."""

    def _read(self, found: Mapping[str, Any]) -> None:
        try:
            if found["method"] != self.method:
                return
            numbers = [float(found["seconds"]), float(found["load_seconds"])]
            counts = [int(found["tokens"]), int(found["generations"])]
            weights = {
                Key(occupation, i): float(weight)
                for occupation, of_runs in found.get("log_weights", {}).items()
                for i, weight in enumerate(of_runs, start=1)
                if weight is not None
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # lost or damaged: the rows are computed again for their costs, and come out the same
        (self.seconds, self.load_seconds), (self.tokens, generations) = numbers, counts
        self.priced, self.closed = generations // self.candidates, "accepted" in found
        self.log_weights = weights
        kept = ("kl", "kl_sentences", "kl_seconds", "outcomes", "p0", "pair_rates", "ess", "hmm")
        self.document = {name: found[name] for name in kept if name in found}

    @property
    def generations(self) -> int:
        """Sentences drawn."""
        return self.priced * self.candidates

    def add(self, seconds: float, written: Mapping[Key, "Written"]) -> None:
        """One batch more, on the disk when this returns. Raises UserError."""
        self.seconds += seconds
        self.tokens += sum(one.tokens for one in written.values())
        self.priced += len(written)
        self.log_weights |= {key: one.log_weight for key, one in written.items() if one.log_weight is not None}
        self.unpriced.difference_update(written)
        self.write()

    def close(self, *, rows: int, accepted: int, **known: Any) -> None:
        """The final account; `known` holds `kl`, `p0` and whatever else there is to tell. Raises UserError."""
        per = self.generations / accepted if accepted else None
        self.document |= {"accepted": accepted, "generations_per_accepted": per, "rows": rows}
        self.document |= {name: value for name, value in known.items() if value is not None}
        self.write()

    def write(self) -> None:
        """Replace the file. Raises UserError."""
        document = (
            marked(
                {
                    "method": self.method,
                    "seconds": round(self.seconds, 3),
                    "load_seconds": round(self.load_seconds, 3),
                    "tokens": self.tokens,
                    "generations": self.generations,
                }
            )
            | self.document
        )
        if self.log_weights:
            document["log_weights"] = {
                occupation: [self.log_weights.get(Key(occupation, i)) for i in range(1, last + 1)]
                for occupation in self.task.names
                if (last := max((key.run_id for key in self.log_weights if key.occupation == occupation), default=0))
            }
        write_file(self.path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _is_account(document: Mapping[str, Any]) -> bool:
    """The shape of an account before records were marked."""
    numbers = ("seconds", "load_seconds", "tokens", "generations")
    return isinstance(document.get("method"), str) and all(isinstance(document.get(n), int | float) for n in numbers)
