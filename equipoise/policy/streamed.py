"""Weights rounded to 8 bits one tensor at a time, while transformers reads them: never more than one as it was.

transformers calls a quantizer for each tensor as soon as it is on the device, and reads the next one only then.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from equipoise.policy.eightbit import goes_into_eight_bits, put_aside
from equipoise.policy.slices import Cut

METHOD = "equipoise-8bit"


@register_quantization_config(METHOD)
class Streamed(QuantizationConfigMixin):  # type: ignore[misc]
    """For `from_pretrained(quantization_config=…)`; the model that comes back has its matrices put aside for
    `eightbit.to_eight_bits` (`into`: one of `eightbit.MOST`), or with a `cut` for `slices.cut_layers`, and no trace of
    a quantizer."""

    def __init__(self, into: torch.dtype | None, cut: Cut | None = None) -> None:
        self.quant_method: Any = METHOD
        self.into, self.cut = into, cut

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class OutOfMemory(BaseException):
    """Memory gave out while a tensor was rounded. No `Exception`: those transformers notes, and reads on."""


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    is_trainable = True

    def is_serializable(self, **_: Any) -> bool:
        return False

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of each value: transformers reserves that much memory before it begins."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        cut = self.quantization_config.cut
        return 1 if cut is None else param.element_size() / cut.ranks.size

    def param_needs_quantization(self, model: Any, param_name: str, **__: Any) -> bool:
        """Whether it is the matrix of a layer that `to_eight_bits` would take. Matrices that are used twice, and those
        that stay in a dtype of their own, wait for it as they are."""
        path, _, last = param_name.rpartition(".")
        if last != "weight" or param_name in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
            return False
        layer, owner = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
        own = getattr(layer, "weight", None) is not None and layer.weight.dtype != model.dtype
        return not own and goes_into_eight_bits(owner, layer, model.get_output_embeddings())

    def get_quantize_ops(self) -> ConversionOps:
        return _PutAside(self)

    def postprocess_model(self, model: Any, **_: Any) -> Any:
        self.remove_quantization_config(model)
        return model


class _PutAside(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, model: Any, **__: Any) -> dict[str, Any]:
        """The tensors of `input_dict`, each by its name in the model, or what stands for them."""
        out: dict[str, Any] = {}
        for name, found in input_dict.items():
            tensor = found[0] if isinstance(found, list) else found
            if not self.quantizer.param_needs_quantization(model, name):
                out[name] = tensor
                continue
            layer = model.get_submodule(name.rpartition(".")[0])
            cut = self.quantizer.quantization_config.cut
            try:
                out[name] = (
                    put_aside(layer, name, tensor, self.quantizer.quantization_config.into)
                    if cut is None
                    else cut.put_aside(name.removesuffix(".weight"), layer, tensor)
                )
            except torch.OutOfMemoryError as error:
                raise OutOfMemory from error
        return out


def fits_its_configuration(model: Any) -> bool:
    """Whether every tensor has the shape that the configuration asks for, which transformers does not see to where
    there is a quantizer."""
    with torch.device("meta"):
        wanted = type(model)(deepcopy(model.config)).state_dict()
    return {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in wanted.items()}
