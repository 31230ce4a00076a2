"""A completions file in parts, for jobs that do not know of each other, and the file that one process had written.

Rows are always computed in the same batches. Part i of n has the i-th batch and every n-th after it, so its sentences
are those of the whole file; `join` puts them together.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.methods.completions import COLUMNS, COMPARED, Completions, Key, all_keys, read_record
from equipoise.methods.costs import Costs
from equipoise.protocol.difference import apart
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.records import task_on_record

_PART = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
_NAME = re.compile(r"(.+)\.part-([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})", re.DOTALL)


class Part(NamedTuple):
    """The `number`-th, counted from 1, of `of` parts of a file."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def path(self, output: Path) -> Path:
        """Where this part of the file `output` is written: `NAME.part-3-of-8.csv`."""
        return output.with_name(f"{output.stem}.part-{self.number}-of-{self.of}{output.suffix}")

    def keys(self, keys: Sequence[Key], batch_size: int) -> list[Key]:
        """Those of `keys` that are this part's: whole batches, in the order in which they are computed."""
        step = self.of * batch_size
        starts = range((self.number - 1) * batch_size, len(keys), step)
        return [key for first in starts for key in keys[first : first + batch_size]]

    def document(self, n: int, batch_size: int) -> dict[str, int]:
        """What a part's record says beside the settings, which are those of the whole file."""
        return {"number": self.number, "of": self.of, "n": n, "batch_size": batch_size}


def read_part(given: str) -> Part:
    """From `3/8`. Raises UserError."""
    found = _PART.fullmatch(given)
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"--part {given!r:.40} is no part of a file: give its number and how many there are, as in 3/8")
    return Part(int(found[1]), int(found[2]))


class Joined(NamedTuple):
    output: Path
    texts: dict[Key, str]
    task: Task
    method: str | None
    """Of a file for a comparison, which has an account of what it cost."""


def join(name: Path, say: Callable[[str], None] = print) -> Joined:
    """Put the parts of the file `name` together: the rows, their order and the settings on record of one process.

    The parts stay. Raises UserError, with nothing written, where a part is missing, not finished, made with other
    settings or not as it was written, and where `name` is there with other sentences.
    """
    output, parts = _find(name)
    records = {part: _record(part, output) for part in parts}
    first = parts[0]
    settings, made = records[first]["settings"], records[first]["part"]
    for part in parts[1:]:
        _compare(part, first, output, records)
    task = task_on_record(settings, str(first.path(output)))
    columns = COMPARED if "Method" in settings else COLUMNS
    keys = all_keys(made["n"], task.names)
    own = {name: value for name, value in settings.items() if name != "task"}
    rows: dict[Part, dict[Key, str]] = {}
    with contextlib.ExitStack() as stack:
        for part in parts:
            wanted = part.keys(keys, made["batch_size"])
            document = part.document(made["n"], made["batch_size"])
            file = Completions(part.path(output), own, task, made["n"], columns=columns, part=document)
            rows[part] = _complete(part, stack.enter_context(file), wanted)
        method = settings.get("Method")
        accounts = [_account(part, output, settings, task, rows[part]) for part in parts] if method else []
        texts = {key: text for part in parts for key, text in rows[part].items()}
        whole = stack.enter_context(Completions(output, own, task, made["n"], columns=columns))
        _write(whole, {key: texts[key] for key in keys}, [entry for p in parts for entry in records[p]["made_with"]])
        if method:
            _add_up(whole, accounts, str(method))
    say(f"{output} is complete: {plural(len(keys), 'row')} from {plural(len(parts), 'part')}")
    return Joined(output, whole.texts, task, method)


def _find(name: Path) -> tuple[Path, list[Part]]:
    """The file that is meant and its parts, all of which are there. Raises UserError."""
    if mine := _NAME.fullmatch(name.stem):  # the name of one of them
        name = name.with_name(mine[1] + name.suffix)
    found = []
    with contextlib.suppress(OSError):
        for path in name.parent.iterdir():
            part = _NAME.fullmatch(path.stem)
            if part and part[1] == name.stem and path.suffix == name.suffix:
                found.append(Part(int(part[2]), int(part[3])))
    if not found:
        raise UserError(
            f"{name} has no parts beside it, such as {Part(1, 2).path(name).name}: give the name that --output gave"
        )
    if len(counts := sorted({part.of for part in found})) > 1:
        raise UserError(
            f"{name} has parts of {' and parts of '.join(map(str, counts))} beside it: move those away that are not "
            "meant"
        )
    of = counts[0]
    if missing := sorted(set(range(1, of + 1)) - {part.number for part in found}):
        listed = ", ".join(f"{index}/{of}" for index in missing[:10]) + (", …" if len(missing) > 10 else "")
        raise UserError(
            f"{plural(len(missing), 'part')} of {name} {'is' if len(missing) == 1 else 'are'} missing ({listed}): run "
            f"the command that wrote the others with --part {missing[0]}/{of}"
        )
    return name, sorted(found)


def _record(part: Part, output: Path) -> dict[str, Any]:
    path = part.path(output)
    record = read_record(path)
    made = record.get("part") if record else None
    if record is None or made is None or not _is_part(made):
        raise UserError(
            f"{path} is no part that --part wrote, as the record {path.name}.json beside it "
            f"{'says' if record else 'is missing'}: restore it, or move it away and run the command again with "
            f"--part {part}"
        )
    if (made["number"], made["of"]) != part:
        raise UserError(f"{path} was written as part {made['number']}/{made['of']}: give it that name again")
    return record


def _is_part(made: Any) -> bool:
    names = {"number", "of", "n", "batch_size"}
    return isinstance(made, dict) and set(made) == names and all(type(v) is int and v > 0 for v in made.values())


def _compare(part: Part, first: Part, output: Path, records: Mapping[Part, Mapping[str, Any]]) -> None:
    """Raises UserError where two parts are not of one file."""
    old, new = (
        {**records[p]["settings"], "--n": records[p]["part"]["n"], "--batch-size": records[p]["part"]["batch_size"]}
        for p in (first, part)
    )
    changed = [f"{k}: {apart(str(old.get(k)), str(new.get(k)))}" for k in old | new if old.get(k) != new.get(k)]
    if changed:
        raise UserError(
            f"{part.path(output)} was made with other settings than {first.path(output).name} "
            f"({'; '.join(changed)}): write both with the same ones"
        )


def _complete(part: Part, file: Completions, wanted: Sequence[Key]) -> dict[Key, str]:
    """The part's rows, each of which is wanted and there. Raises UserError."""
    if foreign := sorted(file.texts.keys() - set(wanted)):
        raise UserError(
            f"{file.path} holds rows of another part ({foreign[0].occupation} {foreign[0].run_id}): delete them, or "
            f"write it anew with --part {part} --overwrite"
        )
    if missing := len(wanted) - len(file.texts):
        raise UserError(
            f"{file.path} lacks {missing} of its {plural(len(wanted), 'row')}: the same command with --part {part} "
            "continues"
        )
    return file.texts


def _account(part: Part, output: Path, settings: Mapping[str, Any], task: Task, rows: Mapping[Key, str]) -> Costs:
    """What the part cost. Raises UserError where that is not on record for each of its rows."""
    path, method = part.path(output), str(settings["Method"])
    costs = Costs(path, method, task, rows, int(settings["candidates"]) if method == "ctrlg" else 1)
    if costs.unpriced:
        raise UserError(
            f"{costs.path} does not say what all rows of {path.name} cost: the same command with --part {part} counts "
            "them again"
        )
    return costs


def _write(file: Completions, texts: Mapping[Key, str], made_with: Sequence[Mapping[str, Any]]) -> None:
    """All rows, where they are not there already. Raises UserError for a file with other sentences."""
    if other := [key for key, text in file.texts.items() if text != texts[key]]:
        raise UserError(
            f"{file.path} is there with another sentence for {other[0].occupation} {other[0].run_id}: move it away"
        )
    missing = {key: text for key, text in texts.items() if key not in file.texts}
    if missing:
        for entry in made_with:
            file.start(entry)
        file.append(missing)
    file.finish()


def _add_up(file: Completions, accounts: Sequence[Costs], method: str) -> None:
    """The account of the whole file, unless it is there: it may know more by now."""
    costs = Costs(file.path, method, file.task, file.texts)
    if costs.closed and costs.generations == sum(account.generations for account in accounts):
        return
    costs = Costs(file.path, method, file.task, {})
    for account in accounts:
        costs.seconds += account.seconds
        costs.load_seconds += account.load_seconds
        costs.tokens += account.tokens
        costs.priced += account.generations
        costs.log_weights |= account.log_weights
    accepted = sum(file.task.complies(text, "both") for text in file.texts.values())
    costs.close(rows=len(file.texts), accepted=accepted)
