"""The reference that `setup_model_and_tokenizer` hands out."""

import torch

from equipoise.policy.reference import reference_of
from tests.tiny import bare_policy, perturb


def test_with_adapters_the_reference_is_the_model_as_it_was_before_they_were_trained() -> None:
    policy = bare_policy(stops=(0,), lora=True)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = policy.model(tokens).logits
        perturb(policy, 0.5)
        reference = reference_of(policy)
        assert torch.equal(reference(tokens).logits, before)
        assert not torch.allclose(policy.model(tokens).logits, before)
    assert reference.config is policy.model.config


def test_with_all_weights_trained_it_is_the_frozen_copy() -> None:
    policy = bare_policy(stops=(0,), lora=False)
    assert reference_of(policy) is policy.reference and policy.reference is not policy.model
