"""Which of the 8-bit formats is taken, and where it is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from equipoise.errors import UserError
from equipoise.policy import eightbit, load, verify
from equipoise.policy.alike import _kept, digest
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.eightbit import ROTATED, to_eight_bits
from equipoise.policy.load import Policy
from equipoise.policy.source import resolve
from equipoise.policy.verify import _settle_in_float32
from equipoise.policy.weights import load_model
from tests.families import family_folder
from tests.policy.eight_bits import FORMATS
from tests.tiny import tiny_model, words_folder


@pytest.mark.parametrize(("name", "share"), [("llama3.2", None), ("gpt2", None), ("qwen3-moe", "25%")])
def test_one_line_says_where_most_of_a_model_is_not_rounded(tmp_path: Path, name: str, share: str | None) -> None:
    model = load_model(resolve(str(family_folder(name, tmp_path))), dtype=torch.bfloat16, device="cpu")
    to_eight_bits(model.requires_grad_(False))
    line = eightbit.left_out(model)
    assert line is None if share is None else line is not None and f"rounds {share} of this qwen3_moe" in line


def test_a_model_without_any_linear_layer_is_said_to_have_none_rounded() -> None:
    model = nn.Module()
    model.table, model.config = nn.Linear(8, 8).requires_grad_(False), LlamaConfig()
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    assert "rounds 0% of this llama model's matrices" in str(eightbit.left_out(model))


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 6), torch.bfloat16, torch.int8),  # RTX 3090
        ((8, 9), torch.bfloat16, ROTATED),  # RTX 4090
        ((9, 0), torch.bfloat16, ROTATED),  # H100
        ((12, 0), torch.bfloat16, ROTATED),  # RTX 5090
        ((9, 0), torch.float32, torch.int8),
    ],
)
def test_rotated_int8_is_taken_where_the_card_multiplies_fp8_unless_it_is_refused(
    capability: tuple[int, int], dtype: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setenv(eightbit.ASKED, "0")
    assert eightbit.format_for(torch.device("cuda"), dtype) == torch.int8
    monkeypatch.delenv(eightbit.ASKED)
    name = str(dtype).removeprefix("torch.")
    config = PolicyConfig("nowhere", use_8bit=True, dtype=name)  # type: ignore[arg-type]
    assert eightbit.format_for(torch.device("cuda"), dtype) == expected
    assert load.eight_bits(config, torch.device("cuda")) == expected
    assert load.eight_bits(replace(config, use_8bit=False), torch.device("cuda")) is None
    with pytest.raises(UserError, match="--use-8bit needs a CUDA GPU"):
        load.eight_bits(config, torch.device("cpu"))


def test_records_and_first_lines_say_which_format_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from equipoise.methods import prompted
    from equipoise.ppo import preflight
    from tests.ppo.small import small_config

    config = PolicyConfig(str(words_folder(tmp_path / "model")), use_8bit=True, device="cpu", dtype="float32")
    for into in (torch.int8, ROTATED):
        for module in (prompted, preflight):
            monkeypatch.setattr(module, "eight_bits", lambda *_, into=into: into)
        writer = prompted.Prompted(config, prompt="raw", sampling=SamplingConfig(), seed=0)
        # Files that were begun before there were two formats hold sentences of int8.
        assert writer.settings.get("base_weights") == (None if into == torch.int8 else "rotated int8")
        _, lines = preflight.preflight(small_config(tmp_path / "model", tmp_path, use_8bit=True))
        assert f"compute   cpu, float32, base weights in {eightbit.NAMES[into]}" in lines


def test_both_formats_are_told_apart_on_several_hosts_and_are_not_made_float32_to_try_them() -> None:
    for into in FORMATS:
        model, other = tiny_model().bfloat16(), tiny_model().bfloat16()
        to_eight_bits(model, into)
        to_eight_bits(other, into)
        digests = []
        for each in (model, other):
            policy = Policy(each.requires_grad_(False), None, reference=None, stop_ids=(2,))  # type: ignore[arg-type]
            digests.append(digest(_kept(policy)))
            assert not _settle_in_float32(policy, [[5, 6]], 2)
            each.model.layers[1].mlp.up_proj.q.view(torch.uint8)[3, 4] ^= 1  # type: ignore[index,union-attr]
        digests.append(digest(_kept(policy)))
        assert digests[0] == digests[1] != digests[2]


def test_rounding_that_goes_wrong_in_one_way_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=1).bfloat16()
    to_eight_bits(model, ROTATED)
    policy = Policy(model.requires_grad_(False), None, reference=None, stop_ids=(2,))  # type: ignore[arg-type]
    said: list[str] = []
    verify.settle(policy, [[5, 6, 7], [5, 9]], 8, said.append)
    assert policy.ways.fast and not said
    plain = verify.score

    def wrong(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        return found if eightbit.as_they_are else found._replace(logprobs=1.5 * found.logprobs)

    monkeypatch.setattr(verify, "score", wrong)
    verify.settle(policy, [[5, 6, 7], [5, 9]], 8, said.append)
    assert not policy.ways.packed and not policy.ways.shared and "the plain way is taken" in "".join(said)
