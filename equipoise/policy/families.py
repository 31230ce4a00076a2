"""Which models can be trained and sampled here: told from the configuration, before any weights are loaded."""

import math

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig

from equipoise.errors import UserError


def check_family(config: PreTrainedConfig, given: str) -> None:
    """Raises UserError, naming the model as it was `given`, unless transformers has its type as a causal language model
    of text alone."""
    kind = config.model_type
    parts = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None]
    if any(sense in name for name in parts for sense in ("vision", "audio", "image")):
        raise UserError(
            f"the model {given!r} ({kind}) reads images or sound beside text, which is not supported: give a "
            "checkpoint of a language model alone"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"the model {given!r} ({kind}) has an encoder and a decoder, which is not supported: give a causal "
            "language model"
        )
    masked = getattr(config, "is_decoder", None) is False and type(config) in AutoModelForMaskedLM._model_mapping
    if type(config) not in AutoModelForCausalLM._model_mapping or not _is_one_model(config) or masked:
        raise UserError(f"transformers does not know {given!r} ({kind}) as a causal LM: upgrade it, or choose another")


def _is_one_model(config: PreTrainedConfig) -> bool:
    try:
        return config.get_text_config() is config
    except ValueError:  # several language models in one
        return False


def position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens that a row may have; None where the model has no such limit."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((n for n in named if isinstance(n, int) and n > 0), None)


def rotary_limit(config: PreTrainedConfig) -> float:
    """Tokens up to which a row is read with one set of rotary frequencies; infinite for most models.

    A longer row is read with other ones from its first token on (longrope, dynamic scaling), so what the model makes of
    a token depends on how many follow it in the same pass.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    limits = []
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        kind = str(each.get("rope_type"))
        if kind == "longrope":
            limits.append(each.get("original_max_position_embeddings"))
        elif "dynamic" in kind:
            limits.append(position_limit(config))
    return min((n for n in limits if isinstance(n, int)), default=math.inf)


def window(config: PreTrainedConfig) -> float:
    """Tokens that the layer which sees least may see; infinite where every layer sees all that went before, 0 where the
    configuration does not tell."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds and all(kind == "full_attention" for kind in kinds):
        return math.inf
    named = {name: n for name, n in text.to_dict().items() if type(n) is int and n > 0 and "layers" not in name}
    # A pattern says which layers have a window, in numbers of layers.
    sizes = [n for name, n in named.items() if ("window" in name or "chunk" in name) and "pattern" not in name]
    return min(sizes, default=0 if kinds else math.inf)
