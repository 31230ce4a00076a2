"""Makes what `equipoise demo` shows: the record of a training run and a small hidden Markov model, as package data.

    python benchmarks/demo_record.py run FOLDER      the records in the output folder of a finished run of `bundled-cpu`
    python benchmarks/demo_record.py hmm FILE        an HMM that Ctrl-G has put into the cache, for the bundled model

The HMM of the demo: `equipoise sample --method ctrlg --hidden-states 64 --distil-sentences 5000` makes it.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import lift
from equipoise.methods.ctrlg.writer import PACKAGED
from equipoise.policy.prompt import stop_ids
from equipoise.policy.source import load_config, load_tokenizer, resolve
from equipoise.ppo.replay import RECORDED, read_recorded
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.console import MAX_SAMPLES

SYMBOLS = 5000
"""Symbols of their own in the packaged HMM: with more the file is larger than a megabyte."""


def pack_run(folder: Path) -> None:
    """The records but for the model, and of the samples those that the console showed."""
    RECORDED.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "training_metrics.csv", "eval.jsonl", "events.jsonl", "final_sentences.jsonl"):
        shutil.copyfile(folder / name, RECORDED / name)
    for name in ("run.json", "summary.json"):
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        (RECORDED / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    task = read_recorded(RECORDED).task
    shown: dict[int, dict[str, str]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        about = next(o for o in task.names if row["text"].startswith(task.prefix(o)))
        shown.setdefault(row["step"], {}).setdefault(about, line)
    lines = [line + "\n" for rows in shown.values() for line in list(rows.values())[:MAX_SAMPLES]]
    (RECORDED / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def tied(model: HMM, symbol_V: Tensor, class_V: Tensor) -> tuple[HMM, Tensor]:
    """The HMM over fewer symbols: those that are least probable on the whole are added up, class by class. Its
    distribution over what is left to tell apart stays the same."""
    state_H = model.initial_PH.mean(0)
    mass_S = torch.zeros(len(model.emission_SH))
    for _ in range(20):  # places of a sentence
        mass_S += model.emission_SH @ state_H
        state_H = state_H @ model.transition_HH
    rare_S = mass_S < mass_S.sort(descending=True).values[SYMBOLS]
    key_V = torch.where(rare_S[symbol_V], class_V.long(), int(class_V.max()) + 1 + symbol_V)
    new_V = torch.unique(key_V, return_inverse=True)[1]
    emission_SH = torch.zeros(int(new_V.max()) + 1, model.emission_SH.shape[1])
    first_S = torch.full((len(mass_S),), -1).scatter(0, symbol_V, new_V)
    emission_SH.index_add_(0, first_S, model.emission_SH)
    return HMM(model.initial_PH, model.transition_HH, emission_SH), new_V


def pack_hmm(path: Path) -> None:
    """In 16 bits, over fewer symbols."""
    model, metadata, more = HMM.load(path)
    source = resolve("bundled")
    tokenizer, size = load_tokenizer(source), load_config(source).get_text_config().vocab_size
    stops = stop_ids(tokenizer, None, PROTOCOL.default_prompt)
    class_V = lift(tokenizer, stops, CtrlGConfig(), PROTOCOL, max_new_tokens=32, vocabulary=size).class_V
    assert json.loads(metadata["distillation"])["classes"] == hashlib.sha256(class_V.tobytes()).hexdigest()
    model, symbol_V = tied(model, more["symbols"], torch.from_numpy(class_V))
    PACKAGED.parent.mkdir(exist_ok=True)
    small = HMM(*(x.bfloat16() for x in (model.initial_PH, model.transition_HH, model.emission_SH)))
    small.save(PACKAGED, metadata, symbols=symbol_V.short())
    print(f"{PACKAGED}: {PACKAGED.stat().st_size:,} bytes, {len(model.emission_SH):,} symbols")


if __name__ == "__main__":
    {"run": pack_run, "hmm": pack_hmm}[sys.argv[1]](Path(sys.argv[2]))
