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
"""A Python with xllamacpp, and llama.cpp's converter unpacked in `source` beside; `make test-slow` makes one."""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_LLAMA: make test-slow")]

# llama.cpp's own server on this machine: the tokens of a text, and the log-probabilities of the next one.
READ = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.port, params.hostnames = 256, 1, 0, ["127.0.0.1"]
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
def ask(path, **given):
    asked = urllib.request.Request(server.listening_address + path, json.dumps(given).encode())
    return json.loads(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked).read())
tokens = ask("/tokenize", content=sys.argv[2], add_special=False, parse_special=True)["tokens"]
found = ask("/completion", prompt=tokens, n_predict=1, n_probs=1000, temperature=0)
following = {each["id"]: each["logprob"] for each in found["completion_probabilities"][0]["top_logprobs"]}
print("\\nREAD", json.dumps([tokens, list(following), list(following.values())]), flush=True)
"""


def call(*arguments: str) -> str:
    done = subprocess.run([INTERPRETER, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_llama_cpp_reads_the_same_tokens_and_expects_the_same_words(tmp_path: Path) -> None:
    config = PolicyConfig("bundled", dtype="float32", device="cpu")
    policy = perturb(load_policy(config, PROTOCOL.prompt("describe")), scale=0.01)
    folder = tmp_path / "model"
    card = ModelCard("PPO, 2 steps", "describe")
    export(policy.model, policy.tokenizer, folder, card=card, source=policy.source, stop_ids=policy.stop_ids)
    (script,) = (Path(INTERPRETER).parents[1] / "source").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    call(str(script), str(folder), "--outfile", str(tmp_path / "model.gguf"), "--outtype", "f32")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = prompt_text(tokenizer, PROTOCOL.prompt("describe"), "nurse", PROTOCOL, "")
    (line,) = [x for x in call("-c", READ, str(tmp_path / "model.gguf"), text).splitlines() if x.startswith("READ ")]
    tokens, likeliest, log_probs = json.loads(line.removeprefix("READ "))
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    assert len(likeliest) == 1000 and likeliest[:5] == expected.topk(5).indices.tolist()
    assert (torch.tensor(log_probs) - expected[likeliest]).abs().max() < 0.05
