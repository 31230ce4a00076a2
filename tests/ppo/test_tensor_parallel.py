"""Layers cut over several processes, against the same model in one."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import cli
from equipoise.errors import UserError
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.load import load_for_generation, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.sample import sample_dealt
from equipoise.policy.score import score
from equipoise.policy.slices import SlicedLinear, check_cut, matrix_weights
from equipoise.policy.source import resolve
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.experience import Experience
from equipoise.ppo.machine import Work, need
from equipoise.ppo.train import train
from equipoise.ppo.training import new_optimizer
from equipoise.ppo.update import Update
from equipoise.runs.ranks import ALONE, Ranks
from tests.default import PROMPTS
from tests.ranked import together, with_ranks

from .small import checkpoints, rows, small_config

ROWS = [[1, 2, 3], [4], [1, 2, 3], [2, 2], [4], [1, 2], [3], [1, 2, 3]]


def computed(model: Path, ranks: Ranks, packed: bool = True) -> dict[str, Tensor]:
    """Tokens, scores of policy and reference, and the adapters' gradients after one mini-batch."""
    config = PolicyConfig(str(model), device="cpu", dtype="float32", lora_rank=4, tensor_parallel=ranks.size)
    ranks = ranks.sharing_layers(ranks.size)
    torch.manual_seed(0)
    policy = load_policy(config, PROMPTS["raw"], ranks)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    optimizer = new_optimizer(TrainConfig(policy=config), policy, ranks)
    rollout = sample_dealt(policy, ROWS, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(2), ranks)
    with torch.no_grad():
        own = score(policy, rollout, 1.0, packed=packed)
        reference = score(policy, rollout, 1.0, packed=packed, reference=True)
    old = torch.zeros(rollout.mask_BT.shape)
    old[rollout.mask_BT] = own.logprobs
    noise = torch.where(rollout.mask_BT, torch.randn(old.shape, generator=generator), 0.0)
    ppo = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=1)
    limit = RowLimit(5)  # two micro-batches
    experience = Experience(rollout, old, torch.zeros_like(old), noise, noise)
    update = Update(policy, optimizer, experience, [torch.arange(8)], ppo, 1.0, packed, limit, ranks)
    update.launch()
    gradients = {
        f"gradient.{kind}.{name}": x.clone()
        for kind, group in optimizer.groups.items()
        for name, x in group.split(group.total()).items()
    }
    scores = {"logprobs": own.logprobs, "values": own.values, "reference": reference.logprobs}
    return {"tokens": rollout.tokens_BT, "stats": update._launched[0][:5], **scores, **gradients}


@pytest.mark.parametrize("packed", [True, False])
def test_two_processes_with_half_of_each_layer_compute_what_one_does(model: Path, tmp_path: Path, packed: bool) -> None:
    expected = computed(model, ALONE, packed)
    assert float(expected["gradient.value.value_head.weight"].norm()) > 0
    assert (expected["logprobs"] - expected["reference"]).abs().max() > 0.01  # the adapters do something

    def work(ranks: Ranks) -> None:
        found = computed(model, ranks, packed)
        save_file({name: x.contiguous() for name, x in found.items()}, tmp_path / f"{ranks.rank}.safetensors")

    with_ranks(2, work)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first["tokens"], expected["tokens"])
    for name, x in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], x, atol=1e-5, rtol=1e-5, msg=name)


def run(config: TrainConfig) -> Callable[[], int]:
    def work() -> int:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        return train(config).exit_code

    return lambda: cli.run_command(lambda _: work(), [])


def near(found: Path, expected: Path) -> None:
    """Whether two runs are the same but for rounding."""
    for one, other in zip(rows(found), rows(expected), strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], abs=1e-4, rel=1e-3, nan_ok=True), key
    ours, theirs = (load_file(where / "out" / "model.safetensors") for where in (found, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_a_run_is_that_of_one_process_to_rounding_and_goes_on_with_any_number(model: Path, tmp_path: Path) -> None:
    """The warm start, an evaluation and the exported model among what is compared."""
    changes: dict[str, Any] = {
        "steps": 3, "save_every": 2, "eval_sentences": 8, "average_weights": 0.9, "warm_start": "forced",
        "warm_start_sentences": 16, "warm_start_epochs": 1, "micro_batch_size": 2,
    }  # fmt: skip
    assert together(1, run(small_config(model, tmp_path / "1", **changes))) == [0]
    cut = small_config(model, tmp_path / "2", **changes, tensor_parallel=2)
    assert together(2, run(replace(cut, steps=2))) == [0, 0]
    assert together(2, run(cut)) == [0, 0]
    near(tmp_path / "2", tmp_path / "1")
    assert checkpoints(tmp_path / "2") == [0, 2, 3]
    AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "out")
    record = json.loads((tmp_path / "2" / "out" / "run.json").read_text())["config"]
    assert record["policy"]["tensor_parallel"] == 2 and record["ppo"]["pieces"] == 1
    # The checkpoint has no trace of it.
    whole = small_config(model, tmp_path / "2", **changes | {"steps": 4})
    assert together(1, run(whole)) == [0]
    assert together(1, run(small_config(model, tmp_path / "1", **changes | {"steps": 4}))) == [0]
    near(tmp_path / "2", tmp_path / "1")


def test_what_is_not_finite_is_looked_into_by_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Update.finish

    def spoilt(self: Update) -> Any:
        if self.optimizer.groups["policy"].grads.any() and not spoilt.done:
            spoilt.done = True
            self._launched[0][0] = torch.nan
        return plain(self)

    spoilt.done = False  # type: ignore[attr-defined]
    monkeypatch.setattr(Update, "finish", spoilt)
    config = small_config(model, tmp_path, steps=3, eval_sentences=0, tensor_parallel=2)
    assert together(2, run(config)) == [0, 0]
    assert list((tmp_path / "checkpoints" / "nonfinite").glob("step-1.json"))


def test_each_process_holds_its_part_alone(model: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model)

    def work(ranks: Ranks) -> None:
        config = PolicyConfig(str(model), device="cpu", dtype="float32", tensor_parallel=2)
        policy = load_policy(config, PROMPTS["raw"], ranks)
        sliced = {name: m for name, m in policy.model.named_modules() if isinstance(m, SlicedLinear)}
        assert len(sliced) == 7 * whole.config.num_hidden_layers
        for name, layer in sliced.items():
            place = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            original = whole.get_submodule(place).weight
            half = original.shape[0] // 2 if layer.outputs else original.shape[1] // 2
            rows, columns = slice(ranks.rank * half, (ranks.rank + 1) * half), slice(None)
            expected = original[rows] if layer.outputs else original[columns, rows]
            assert torch.equal(layer.weight, expected)
            assert layer.weight.untyped_storage().nbytes() == original.nbytes // 2
        linear = sum(m.weight.numel() for m in map(whole.get_submodule, _names(whole)))
        assert matrix_weights(policy.model) == linear
        held = sum(p.nbytes for p in policy.model.parameters()) + sum(m.weight.nbytes for m in sliced.values())
        assert need(config, resolve(str(model)), Work(4, 8, 8, 8)).weights == held

    with_ranks(2, work)


def _names(model: Any) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]


def test_what_it_does_not_go_with_is_refused_in_one_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for changes, fault in (
        ({"tuning": "full"}, "--tensor-parallel 2 does not go with --tuning full"),
        ({"use_8bit": True}, "--tensor-parallel 2 does not go with --use-8bit"),
        ({"tensor_parallel": 0}, "tensor-parallel 0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=fault):
            PolicyConfig(**{"tensor_parallel": 2} | changes)  # type: ignore[arg-type]
    config = PolicyConfig(str(model), device="cpu", tensor_parallel=2)
    with pytest.raises(UserError, match="--tensor-parallel 2 is for training"):
        load_for_generation(config, PROMPTS["raw"])
    with pytest.raises(UserError, match=r"needs as many processes, and 1 process was started: give --gpus 2"):
        load_policy(config, PROMPTS["raw"])
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64}
    check_cut(SimpleNamespace(model_type="llama", **sizes), 2)
    with pytest.raises(UserError, match="--tensor-parallel 4 does not divide the model's 2 key-value heads"):
        check_cut(SimpleNamespace(model_type="llama", **sizes), 4)
    with pytest.raises(UserError, match="--tensor-parallel 2 cannot cut a olmo2 model, only llama"):
        check_cut(SimpleNamespace(model_type="olmo2", **sizes), 2)
    for size, count in ((2, 3), (1, 2)):
        capfd.readouterr()
        wrong = small_config(model, tmp_path, steps=1, tensor_parallel=count)
        assert together(size, run(wrong)) == [2, 0][:size]
        error = capfd.readouterr().err
        assert error.count("equipoise:") == 1 and f"--tensor-parallel {count} needs {count} processes" in error
    assert not list(tmp_path.iterdir())


def test_a_process_without_memory_ends_and_does_not_try_fewer_by_itself() -> None:
    def attempt(rows: int) -> None:
        raise torch.OutOfMemoryError

    policy: Any = SimpleNamespace(together=Ranks(0, 2))
    with pytest.raises(UserError, match=r"too little memory for 8 completions .* share layers .* --micro-batch-size"):
        RowLimit(8).run(policy, attempt)
