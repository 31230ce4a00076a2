"""What `equipoise bench` counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from equipoise.policy.eightbit import ROTATED, to_eight_bits
from equipoise.policy.load import Policy
from equipoise.ppo.bench import multiplied_weights, step_flop
from equipoise.ppo.config import TrainConfig
from tests.tiny import tiny_model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_weights_in_8_bits_count_as_they_did_before_and_tables_do_not(tie: bool, lora: bool) -> None:
    found = []
    for into in (None, torch.int8, ROTATED):
        model = tiny_model(tie)
        c = model.config
        heads = c.hidden_size // c.num_attention_heads * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        sizes = [m.in_features + m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        by_hand = c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
        by_hand += c.vocab_size * c.hidden_size  # the head
        if lora:
            head = c.hidden_size + c.vocab_size
            by_hand += 4 * (sum(sizes) - head)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        if into:
            to_eight_bits(model, into)
        assert multiplied_weights(model) == by_hand
        policy = Policy(model.requires_grad_(False), None, reference=None, stop_ids=(2,))  # type: ignore[arg-type]
        found.append(step_flop(TrainConfig(), policy, {"nurse": [1] * 10}, 5.0))
    assert found[0] == found[1] == found[2]
    ppo = TrainConfig().ppo
    tokens = (64 * 5 + 10) + 2 * 64 * 15 + 2 * 64 * 15 * ppo.ppo_epochs  # written; scored twice; forward and back
    assert ppo.batch_size == 64 and found[0] == 2 * by_hand * tokens
