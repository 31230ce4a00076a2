"""Tiny random Llamas: one of two layers over bytes (model, folder, GGUF file), one of one layer over whole words."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.policy.load import Policy
from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, OCCUPATIONS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_model(tie: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE({token: i for i, token in enumerate(TOKENS)}, [("t", "h")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_folder(folder: Path, tie: bool = True, seed: int = 0) -> Path:
    tiny_model(tie, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_gguf(path: Path) -> Path:
    """`tiny_model()` as llama.cpp's converter would write it, in float32."""
    model = tiny_model()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(2) for ours, theirs in parts.items()}
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner not in names:
            assert owner == "lm_head"
            continue
        array = tensor.numpy().astype(np.float32)
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if owner.endswith(part):  # llama.cpp interleaves the two halves of each head's rotary pairs
                array = array.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(heads * 8, 32)
        writer.add_tensor(f"{names[owner]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WORDS = (
    "<unk>",
    "</s>",
    "The",
    "was",
    "and",
    "a",
    "in",
    ".",
    '"',
    "=1+1",
    "naïve",
    "🙂",
    *OCCUPATIONS,
    *AGENTIC,
    *COMMUNAL,
)


def words_folder(
    folder: Path,
    seed: int = 0,
    prompt: str | None = "raw",
    words: Sequence[str] = WORDS,
    chat: bool = False,
    spread: float = 0.5,
) -> Path:
    """A one-layer Llama over whole words, the first two being `<unk>` and `</s>`. `prompt`, if any, is recorded as the
    one it was trained with. `chat`: with a chat template, for prompts with an instruction. `spread`: of the random
    weights; the smaller, the more alike are the words' probabilities."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=spread,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if prompt is not None:
        (folder / "run.json").write_text(json.dumps({"config": {"prompt": prompt, "system": ""}}))
    return folder


def bare_policy(
    vocabulary: int = 5,
    stops: tuple[int, ...] = (0,),
    *,
    lora: bool = False,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Policy:
    """A policy of so few tokens that every sequence can be enumerated. It has no tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if not lora:
        return Policy(model, None, reference=deepcopy(model).requires_grad_(False), stop_ids=stops)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")
    return Policy(get_peft_model(model, adapters, autocast_adapter_dtype=False), None, reference=None, stop_ids=stops)


@torch.no_grad()
def perturb(policy: Policy, scale: float = 0.3, seed: int = 0) -> Policy:
    """Move everything that is trained at random, as training would with a purpose."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trained().values():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return policy


@torch.no_grad()
def next_logprobs(model: nn.Module, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """Log-probability of every token after `tokens`: one row, no cache, no padding, no packing. In double precision."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
    return torch.log_softmax(logits / temperature, dim=-1).tolist()


class PretendGraphs:
    """What `Graphs` is on a GPU, on a CPU: shapes are padded, and a function runs once more when it is first seen."""

    enabled = True

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def has(self, key: Any, *inputs: torch.Tensor) -> bool:
        return (key, *(tuple(x.shape) for x in inputs)) in self.seen

    def record(self, key: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        full_key = (key, *(tuple(x.shape) for x in inputs))
        if not self.has(key, *inputs):
            self.seen.add(full_key)
            function(*(x.clone() for x in inputs))
        return full_key

    def __call__(self, key: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        self.record(key, function, *inputs)
        return function(*inputs)

    def clear(self) -> None:
        self.seen.clear()


def pretend_graphs(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Send the policy's fast paths through `PretendGraphs`."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    policy.graphs = PretendGraphs()  # type: ignore[assignment]
    return policy
