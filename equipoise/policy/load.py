"""The policy in memory: a causal LM, its frozen reference, and a value head on the same trunk."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from equipoise.errors import UserError
from equipoise.policy.adapters import with_adapters
from equipoise.policy.attention import PLAIN_ATTENTION, TRIE_ATTENTION
from equipoise.policy.config import PolicyConfig, check_device
from equipoise.policy.eightbit import format_for, left_out, to_eight_bits
from equipoise.policy.graphs import Graphs
from equipoise.policy.hosted import keep_embedding_on_host
from equipoise.policy.joined import adjacent_order
from equipoise.policy.prompt import Tokenizer, stop_ids
from equipoise.policy.rooms import Rooms
from equipoise.policy.slices import Cut, check_cut, cut_layers
from equipoise.policy.source import Source, load_config, load_tokenizer, resolve
from equipoise.policy.ways import Ways
from equipoise.policy.weights import load_model
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import Prompt
from equipoise.runs.ranks import ALONE, Ranks


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA GPU, else the CPU. Raises UserError for a device this machine does not have."""
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # a number that no device can have
        raise UserError(f"unknown device {name!r}: use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and device.index and 0 < torch.cuda.device_count() <= device.index:
        last = torch.cuda.device_count() - 1
        raise UserError(f"device {name!r} is not there: the last GPU that PyTorch sees is cuda:{last}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device {name!r} was asked for but PyTorch sees no CUDA GPU: use --device cpu, or fix the driver"
        )
    return device


def own_device(name: str, ranks: Ranks) -> str:
    """The device of this rank, `name` being what was asked for. Raises UserError."""
    if ranks.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"device {name!r} is one, and {ranks.size} processes have one each: leave --device out")
    count = torch.cuda.device_count()
    if ranks.local >= count:
        raise UserError(f"{plural(count, 'GPU')} cannot be shared by more processes: start one for each GPU")
    return f"cuda:{ranks.local}"


def _used(device: torch.device) -> torch.device:
    """Kernels of our own and CUDA graphs run on the current device: a GPU that was asked for by number becomes it."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, on a CPU with AMX, and on an AMD one with bfloat16 in AVX-512 (not
    measured); else float32. With that alone, as where a hypervisor hides AMX, a Xeon multiplies matrices at 150 to 170
    GFLOP/s (float32: 230 to 310), and took 79 s for the first training step (float32: 50)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = _cpuinfo()
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags)
    return torch.bfloat16 if fast else torch.float32


def former_dtype(device: torch.device) -> torch.dtype:
    """What `auto` was before Intel CPUs needed AMX for bfloat16: runs of that time go on in it."""
    if device.type == "cpu" and "avx512_bf16" in _cpuinfo():
        return torch.bfloat16
    return pick_dtype("auto", device)


def _cpuinfo() -> str:
    """Vendor and flags of the processors, as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


class _UnitSiLU(nn.Module):
    """SiLU over the square root of the width, so that what comes of it is of one length at any width. One step of Adam,
    which moves every weight alike, still moves values by the more the wider the layer is: twice as far at four times
    the width."""

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = nn.functional.silu(x) * x.shape[-1] ** -0.5
        return scaled


class Policy:
    """A causal LM to train. `model` is the transformers model, wrapped by peft for LoRA."""

    ways = Ways()
    """How it may be computed; `verify.settle` finds out."""
    together: Ranks = ALONE
    """The processes that its layers are cut over, all of which compute the same."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        reference: Any | None,
        stop_ids: tuple[int, ...],
        source: Source | None = None,
        cuda_graphs: bool = False,
        value_head: bool = True,
        value_hidden: int = 0,
    ) -> None:
        trains = any(parameter.requires_grad for parameter in model.parameters())
        has_reference = reference is not None or isinstance(model, PeftModel)
        assert has_reference or not trains, "a fully trained model needs a frozen copy"
        self.model = model
        self.tokenizer = tokenizer
        self.reference = reference
        self.stop_ids = stop_ids
        self.source = source
        self.recompute = False
        self.unproven = False
        """Whether our own attention is on trial in this model; `verify.settle` keeps it or gives back the model's."""
        self.notices: tuple[str, ...] = ()
        """Lines that the user should see."""
        self.decoders: dict[Any, Any] = {}  # `sample.sample_static` keeps its buffers here
        self.device = next(model.parameters()).device
        self.graphs = Graphs(self.device, enabled=cuda_graphs)
        self.rooms = Rooms(sum(t.numel() for t in (*model.parameters(), *model.buffers())))
        self.dtype = _compute_dtype(model)
        self.value_head = self._new_value_head(value_hidden) if value_head else None
        _no_dropout(model)

    def _new_value_head(self, hidden: int) -> nn.Module:
        """The last layer is all zeros: the first values are 0, not noise that the first advantages would be measured
        against. The hidden one, where there is one, starts as features of length 1 want it: of spread 1."""
        width = self.model.config.get_text_config().hidden_size
        width = getattr(self.model.get_output_embeddings(), "in_features", width)
        last = nn.Linear(hidden or width, 1, device=self.device)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if not hidden:
            return last
        first = nn.Linear(width, hidden, device=self.device)
        nn.init.normal_(first.weight)
        nn.init.zeros_(first.bias)
        return nn.Sequential(first, _UnitSiLU(), last)

    @contextmanager
    def as_reference(self, reference: bool = True) -> Iterator[nn.Module]:
        """The model to run: the frozen reference, or with False the policy itself."""
        if not reference:
            yield self.model
        elif self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield self.model

    def forward(self, model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits and the hidden states they were computed from, both for the positions in `logits_to_keep`.

        The hidden states are what reaches the output embedding, caught by a hook: any model's forward stays as it is,
        with whatever it does to its logits afterwards.

        Training mode lasts no longer than a pass that needs it: transformers recomputes activations only there, and
        there drops the key-value cache with no more than a warning, so that the sampler would see one token at a time.
        """
        caught: list[Tensor] = []
        head = model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
        if self.recompute and torch.is_grad_enabled():
            model.train()
        try:
            logits = model(use_cache=False, **inputs).logits
        finally:
            hook.remove()
            if self.recompute:
                model.eval()
        return logits, caught[0]

    def value(self, hidden: Tensor) -> Tensor:
        """Predicted return for each hidden state: (..., H) → (...), float32; zeros where there is no value head.

        The trunk gets no gradient from it. Its features tell how far a sentence has come; letting the value loss
        rewrite them would move the policy for reasons other than the reward. The features are normalised to length 1,
        since models' hidden states are of very different scales. Of features f the value is w·f + b, or with m hidden
        units w·silu(Vf + c)/√m + b.
        """
        if self.value_head is None:
            return torch.zeros(hidden.shape[:-1], device=hidden.device)
        width = hidden.shape[-1]
        features = nn.functional.layer_norm(hidden.detach().float(), (width,)) * width**-0.5
        return self.value_head(features).squeeze(-1)  # type: ignore[no-any-return]

    def give_back_attention(self) -> None:
        """Have the model compute attention as it does itself, from now on and for good, and nothing recorded: that may
        look at values on the host."""
        for part in (self.model, self.reference):
            if part is not None:
                plain = part.get_base_model() if isinstance(part, PeftModel) else part
                plain.set_attn_implementation("sdpa")
        self.forget_recordings()
        self.graphs.enabled = False
        self.unproven = False

    def forget_recordings(self) -> None:
        """Drop recorded graphs and the decoders' buffers: they read the weights where a new optimizer, which moves the
        weights, no longer keeps them, and they hold memory."""
        self.graphs.clear()
        self.rooms.clear()
        self.decoders.clear()

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter the optimizer owns, by name; the value head's begin with `value_head.`"""
        named = adjacent_order({n: p for n, p in self.model.named_parameters() if p.requires_grad})
        head = self.value_head.named_parameters() if self.value_head is not None else ()
        return named | {f"value_head.{n}": p for n, p in head}


def load_policy(
    config: PolicyConfig, prompt: Prompt, ranks: Ranks = ALONE, *, value_head: bool = True, value_hidden: int = 0
) -> Policy:
    """Load what `config` names, ready to train, on the device of this rank. Its value head, if it gets one, has a
    hidden layer of `value_hidden` units, or with 0 none. Raises UserError for anything the user can mend."""
    device = _used(pick_device(own_device(config.device, ranks)))
    dtype = pick_dtype(config.dtype, device)
    source = resolve(config.model)
    attention, known = _attention(source)
    into = eight_bits(config, device)
    cut = _cut(config, source, ranks)
    model = load_model(source, dtype=dtype, device=device, attn_implementation=attention, eight_bits=into, cut=cut)
    tokenizer = load_tokenizer(source)
    reference, note = None, None
    if config.tuning == "full":
        reference = load_model(source, dtype=dtype, device=device, attn_implementation=attention)
        reference.eval().requires_grad_(False)
    else:
        model, note = with_adapters(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # some models keep a few weights in float32; one dtype is trained
            parameter.data = parameter.data.to(dtype)
    unrounded = None
    if into is not None:
        to_eight_bits(model, into)
        unrounded = left_out(model)
        keep_embedding_on_host(model)
    slower = None
    if cut is not None:
        cut_layers(model, cut)
    else:
        slower = _fuse(model, config, attention)
        if reference is not None:
            _fuse(reference, config, attention)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        # Nothing is random in a pass, and reading the generator's state could not be recorded in a CUDA graph.
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )
    stops = stop_ids(tokenizer, model.generation_config, prompt)
    graphs = _recordable(config, attention)
    policy = Policy(
        model,
        tokenizer,
        reference=reference,
        stop_ids=stops,
        source=source,
        cuda_graphs=graphs,
        value_head=value_head,
        value_hidden=value_hidden,
    )
    policy.recompute = config.gradient_checkpointing
    policy.unproven = attention is not None and not known
    policy.notices = tuple(line for line in (note, unrounded, slower) if line)
    policy.together = ranks if cut is not None else ALONE
    model.eval()
    # What has been loaded stays: out of the garbage collector's rounds, which would look through all of it every few
    # steps.
    gc.collect()
    gc.freeze()
    return policy


def load_for_generation(config: PolicyConfig, prompt: Prompt) -> Policy:
    """Load what `config` names to sample from it and nothing else: no adapter, no reference, no parameter trainable."""
    if config.tensor_parallel > 1:
        raise UserError(f"--tensor-parallel {config.tensor_parallel} is for training: leave it out, or give --use-8bit")
    device = _used(pick_device(config.device))
    source = resolve(config.model)
    attention, known = _attention(source)
    into = eight_bits(config, device)
    dtype = pick_dtype(config.dtype, device)
    model = load_model(source, dtype=dtype, device=device, attn_implementation=attention, eight_bits=into)
    model.eval().requires_grad_(False)
    unrounded = None
    if into is not None:
        to_eight_bits(model, into)
        unrounded = left_out(model)
        keep_embedding_on_host(model)
    slower = _fuse(model, config, attention)
    tokenizer = load_tokenizer(source)
    stops = stop_ids(tokenizer, model.generation_config, prompt)
    graphs = _recordable(config, attention)
    policy = Policy(model, tokenizer, reference=None, stop_ids=stops, source=source, cuda_graphs=graphs)
    policy.unproven = attention is not None and not known
    policy.notices = tuple(line for line in (unrounded, slower) if line)
    return policy


def _fuse(model: Any, config: PolicyConfig, attention: str | None) -> str | None:
    """Fewer, larger kernels on a GPU; a line that says why, where they are not the largest. The modules that do it need
    Triton, which PyTorch brings along for GPUs only."""
    if not config.fused or model.device.type != "cuda":
        return None
    from equipoise.policy import fused, llama

    reason, kind = llama.not_covered(model), model.config.model_type
    if reason is None and attention is not None:
        llama.fuse_layers(model)
        return None
    if attention is not None:
        fused.fuse(model, known=kind in PLAIN_ATTENTION)
    return f"{kind} models take the slow path on a GPU: the fast layer does not cover {reason or 'their attention'}"


def _recordable(config: PolicyConfig, attention: str | None) -> bool:
    """Whether the model's passes can be CUDA graphs: not where its attention is its own, which may look at values on
    the host."""
    return config.cuda_graphs and attention is not None and config.tensor_parallel == 1


def _cut(config: PolicyConfig, source: Source, ranks: Ranks) -> Cut | None:
    """How the layers are cut over the processes, if they are. Raises UserError."""
    if config.tensor_parallel == 1:
        return None
    if config.tensor_parallel != ranks.size:
        raise UserError(
            f"--tensor-parallel {config.tensor_parallel} needs as many processes, and "
            f"{plural(ranks.size, 'process', 'processes')} was started: give --gpus {config.tensor_parallel}"
        )
    check_cut(load_config(source), config.tensor_parallel)
    return Cut(ranks)


def _attention(source: Source) -> tuple[str | None, bool]:
    """(our own attention where the model may take it, else None, whether it is known to be the model's own). On trial
    where it is not known: `verify.settle` decides."""
    config = load_config(source)
    if config.model_type in PLAIN_ATTENTION:
        return TRIE_ATTENTION, True
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # What our own leaves to sdpa must be what the model itself would compute: sinks and the like are not.
    ours = all(k._supports_attention_backend and k._supports_sdpa for k in kinds)
    return (TRIE_ATTENTION if ours else None), False


def eight_bits(config: PolicyConfig, device: torch.device) -> torch.dtype | None:
    """What the frozen weights are rounded to, None where they are not. Raises UserError."""
    if not config.use_8bit:
        return None
    if device.type != "cuda":
        raise UserError("--use-8bit needs a CUDA GPU: leave it out on a CPU (in train_rlhf.py: use_8bit=False)")
    return format_for(device, pick_dtype(config.dtype, device))


def _compute_dtype(model: Any) -> torch.dtype:
    """The dtype of the activations: the input embedding's, which is never quantised."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def _no_dropout(model: nn.Module) -> None:
    """Sampler and update must see one policy, so every dropout is off, in training mode too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
