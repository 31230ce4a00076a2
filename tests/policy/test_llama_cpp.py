"""An export in llama.cpp: converted by its own script, read by its own code, the same tokens and next words."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.policy.card import ModelCard
from equipoise.policy.config import PolicyConfig
from equipoise.policy.export import export
from equipoise.policy.load import load_policy
from equipoise.policy.prompt import prompt_text
from equipoise.protocol.task import PROTOCOL
from tests.tiny import perturb

INTERPRETER = os.environ.get("EQUIPOISE_LLAMA", "")
"""A Python with llama-cpp-python, its source package unpacked beside; `make test-slow` makes one."""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_LLAMA: make test-slow")]

READ = """
import json, sys
from llama_cpp import Llama
llm = Llama(model_path=sys.argv[1], n_ctx=256, logits_all=True, verbose=False, n_threads=1)
tokens = llm.tokenize(sys.argv[2].encode(), add_bos=False, special=True)
llm.eval(tokens)
print("READ", json.dumps([tokens, [float(x) for x in llm.scores[len(tokens) - 1]]]))
"""


def call(*arguments: str) -> str:
    done = subprocess.run([INTERPRETER, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_llama_cpp_reads_the_same_tokens_and_expects_the_same_words(tmp_path: Path) -> None:
    policy = perturb(load_policy(PolicyConfig("bundled", dtype="float32", device="cpu")), scale=0.01)
    folder = tmp_path / "model"
    card = ModelCard("PPO, 2 steps", "describe")
    export(policy.model, policy.tokenizer, folder, card=card, source=policy.source, stop_ids=policy.stop_ids)
    (script,) = (Path(INTERPRETER).parents[1] / "source").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    call(str(script), str(folder), "--outfile", str(tmp_path / "model.gguf"), "--outtype", "f32")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = prompt_text(tokenizer, PROTOCOL.prompt("describe"), "nurse", PROTOCOL, "")
    (line,) = [x for x in call("-c", READ, str(tmp_path / "model.gguf"), text).splitlines() if x.startswith("READ ")]
    tokens, scores = json.loads(line.removeprefix("READ "))
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    found = torch.tensor(scores).log_softmax(-1)
    assert found.topk(20).indices[:5].tolist() == expected.topk(20).indices[:5].tolist()
    assert (found - expected).abs()[expected.topk(1000).indices].max() < 0.05
