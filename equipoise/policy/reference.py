"""The reference model as an object of its own, for those who want to hold it in their hands."""

from typing import Any

from equipoise.policy.load import Policy


class AdaptersOff:
    """The policy's model with its adapters off: the weights that training began with, in no memory of their own.

    Called and asked to `generate` as the model is; every other attribute is the model's.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **named: Any) -> Any:
        with self._model.disable_adapter():
            return self._model(*args, **named)

    def generate(self, *args: Any, **named: Any) -> Any:
        with self._model.disable_adapter():
            return self._model.generate(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def reference_of(policy: Policy) -> Any:
    """What KL is measured against: the frozen copy where all weights are trained, else the model with adapters off."""
    return policy.reference if policy.reference is not None else AdaptersOff(policy.model)
