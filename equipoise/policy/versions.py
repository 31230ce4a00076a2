"""What transformers 4 reads of a model's folder, written beside what transformers 5 reads.

Version 5 keeps a rotary embedding's numbers in `rope_parameters`; version 4 knows no such key and takes its default
theta of 10,000 without a word. Some types have another name for the number of experts in version 5, which also names a
class of tokenizers that version 4 does not have. Both read the older spelling, which is taken back wherever version 5
would then load anything else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from equipoise.documents import parse_json

VERSIONS = ("4.57", "5")
"""The versions of transformers that an export is tested with."""
TESTED = ("gemma3_text", "gpt2", "gpt_neox", "granitemoehybrid", "llama", "mixtral", "olmoe", "phi3",
          "qwen3_moe", "stablelm")  # fmt: skip
"""The types of models of which an export gave the same logits and tokens in all of them."""

# Per layer type (Gemma 3): version 4 scales the first kind and has a base of its own for the second.
_NESTED = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
# As models with names of their own call theta and the rotated share.
_OWN_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# As version 4 alone calls the kinds of layers of models of one type; version 5 reads both names.
_LAYERS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
# Version 4 takes these three keys of Phi-3 and no other, and all else from their places beside it.
_PHI3 = ("type", "short_factor", "long_factor")


def for_both(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add to the configurations in an exported folder what version 4 needs."""
    if (folder / "config.json").exists():  # an adapter has none
        _rewrite(folder / "config.json", _older, lambda: AutoConfig.from_pretrained(folder).to_dict())
    if (folder / "tokenizer.json").exists():
        names = list(tokenizer.model_input_names)
        _rewrite(folder / "tokenizer_config.json", lambda old: _older_class(old, names), lambda: _facts(folder))


def _rewrite(path: Path, change: Any, read: Any) -> None:
    """Change a JSON file, unless what is then read from its folder differs."""
    before, text = read(), path.read_text(encoding="utf-8")
    document = parse_json(text)
    if (changed := change(document)) == document:
        return
    path.write_text(json.dumps(changed, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    if _settled(read()) != _settled(before):
        path.write_text(text, encoding="utf-8")


def _settled(facts: Any) -> str:
    """For comparison, without the keys that only version 4 reads."""
    older = {"rope_theta", "rope_scaling", "partial_rotary_factor", *_NESTED.values()}
    older |= {name for names in _OWN_NAMES.values() for name in names.values()} | {"original_max_position_embeddings"}

    def without(value: Any, inside: bool) -> Any:
        if not isinstance(value, Mapping):
            return value
        if inside and value.get("factor") is not None:
            value = _with_attention_factor(value)
        older_here = {"type"} if inside else older | set(_experts(value))
        return {k: without(v, inside or k == "rope_parameters") for k, v in value.items() if k not in older_here}

    return json.dumps(without(facts, False) if isinstance(facts, Mapping) else facts, sort_keys=True, default=str)


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, and those within it, with theta, scaling and the number of experts in their older places."""
    out = {key: _older(value) if isinstance(value, dict) else value for key, value in config.items()}
    out = _experts(config) | out
    if isinstance(layers := config.get("layer_types"), list):
        older_names = _LAYERS.get(str(config.get("model_type")), {})
        out["layer_types"] = [older_names.get(layer, layer) for layer in layers]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        nested = {kind: rope[kind] for kind in _NESTED if isinstance(rope.get(kind), dict)}
        main = nested.get("full_attention", rope)
        if main is rope and rope.get("factor") is not None:
            main = out["rope_parameters"] = _with_attention_factor(rope)
        older: dict[str, Any] = {"rope_theta": main.get("rope_theta"), "rope_scaling": _scaling(config, main)}
        if main.get("rope_type") == "longrope":
            older["original_max_position_embeddings"] = main.get("original_max_position_embeddings")
        older["partial_rotary_factor"] = main.get("partial_rotary_factor")
        if "sliding_attention" in nested:
            older[_NESTED["sliding_attention"]] = nested["sliding_attention"].get("rope_theta")
        own = _OWN_NAMES.get(str(config.get("model_type")), {})
        out = {own.get(key, key): value for key, value in older.items() if value is not None} | out
        if older["rope_scaling"] is None and _scales_by_itself(config):
            out["rope_scaling"] = None
    return out


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of experts under the other names that version 5 has for it, which are version 4's own."""
    kind = str(config.get("model_type"))
    names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    return {older: config[name] for older, name in names.items() if "experts" in older and name in config}


def _scales_by_itself(config: Mapping[str, Any]) -> bool:
    """Whether the model's type scales its rotary embedding where the configuration does not say."""
    kind = str(config.get("model_type"))
    rope = getattr(CONFIG_MAPPING[kind](), "rope_parameters", None) if kind in CONFIG_MAPPING else None
    return isinstance(rope, dict) and rope.get("rope_type", "default") != "default"


def _with_attention_factor(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Longrope's numbers with the factor of attention that version 5 makes of `factor`: version 4 would make it of the
    ratio of two lengths, which may be another."""
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") != "longrope" or rope.get("attention_factor") is not None or not original:
        return dict(rope)
    factor = float(rope["factor"])
    return {**rope, "attention_factor": math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0}


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    if config.get("model_type") == "phi3" and not {"factor", "attention_factor"} & set(rope):
        return {key: rope["rope_type"] if key == "type" else rope.get(key) for key in _PHI3}
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}


def _older_class(config: dict[str, Any], input_names: list[str]) -> dict[str, Any]:
    """tokenizer.json is all that makes the tokenizer, so the class that reads nothing else will do in both versions."""
    out = {key: value for key, value in config.items() if key != "backend"}
    # Version 4 takes extra_special_tokens for a mapping, and its class would ask for token types.
    if isinstance(extra := out.pop("extra_special_tokens", None), list):
        out["additional_special_tokens"] = extra
    elif extra is not None:
        out["extra_special_tokens"] = extra
    return out | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": input_names}


def _facts(folder: Path) -> list[Any]:
    """What a tokenizer does to text, as it is loaded."""
    loaded: Any = AutoTokenizer.from_pretrained(folder)
    backend = loaded.backend_tokenizer.to_str() if hasattr(loaded, "backend_tokenizer") else None
    names = sorted(loaded.all_special_tokens), loaded.special_tokens_map, loaded.model_input_names
    sides = loaded.padding_side, loaded.truncation_side, getattr(loaded, "clean_up_tokenization_spaces", None)
    return [backend, *names, *sides, loaded.chat_template]
