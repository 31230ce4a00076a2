"""Sentences that a model writes under a prompt: the trained policy's, or as a baseline an untrained model's."""

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.methods.completions import Key
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.eightbit import NAMES, ROTATED
from equipoise.policy.load import Policy, eight_bits, load_for_generation, pick_device, pick_dtype
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import render_prompts, sentences_of
from equipoise.policy.sample import sample
from equipoise.policy.saved import read_saved
from equipoise.policy.source import Source, checkpoint_base, load_tokenizer, recorded_task, resolve
from equipoise.policy.verify import settle
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.ranks import ALONE, Ranks

Result = TypeVar("Result")


class Written(NamedTuple):
    """A sentence, and how many tokens its completion took, the stop token counted.

    `log_weight`, of a method that knows it: log-probability under the base model minus that under the method, in nats.
    """

    text: str
    tokens: int
    log_weight: float | None = None


class Prompted:
    """Writes the sentence of any key; which one depends on nothing but the key and `settings`, to rounding.

    Made quickly, with a look at the files only; `load` brings the weights into memory.
    """

    def __init__(
        self,
        config: PolicyConfig,
        *,
        prompt: str | None,
        sampling: SamplingConfig,
        seed: int,
        batch_size: int | None = None,
        task: Task | None = None,
    ) -> None:
        """Of `config` it matters which model it is, and where and in what it computes. `task` None means the one on
        record with the model, the default one where nothing says; `prompt` None the one that the model was trained
        with, the task's first where nothing says. Raises UserError."""
        self.source = resolve(config.model)
        learnt = recorded_task(self.source)
        self.task = task or learnt or PROTOCOL
        self._config = config
        training = training_record(self.source)
        self.training_seconds: float | None = training.get("seconds")
        self.base_model: str | None = training.get("model")
        """The model that this one was trained from here, if it was."""
        self.prompt_spec = prompt or own_prompt(training, self.task)
        """As an option names it, an instruction of one's own included."""
        self.prompt = self.task.prompt(self.prompt_spec)
        self.sampling, self.seed = sampling, seed
        self.name = model_name(self.source)
        self.notices = (*self.source.notices, *self._notices(learnt, training))
        self.device = pick_device(config.device)
        self._batch = batch_size or (1000 if self.device.type == "cuda" else 128)
        self.limit = RowLimit(self._batch)
        self.label = "RLHF" if training else "Prompt-Only"
        system = training.get("system", "") if self.prompt.instruction is not None else ""
        self.prompts, rendered = render_prompts(load_tokenizer(self.source), self.prompt, self.task, system)
        self.policy: Policy | None = None
        self.settings = {
            "weights": fingerprint(self.source),
            "prompt": self.prompt.name,
            "instruction": self.prompt.instruction,
            "system": system,
            **rendered,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": seed,
            "dtype": str(pick_dtype(config.dtype, self.device)).removeprefix("torch."),
            "use_8bit": config.use_8bit,
        }
        if config.use_8bit and (into := eight_bits(config, self.device)) == ROTATED:
            self.settings["base_weights"] = NAMES[into]  # int8 where nothing is said

    def _notices(self, learnt: Task | None, training: Mapping[str, Any]) -> list[str]:
        """What does not go together in the model and the task that it is to write for."""
        lines = []
        if training and (changed := (learnt or PROTOCOL).differences(self.task)):
            lines.append(f"{self.name} was trained on another task ({'; '.join(changed)})")
        trained = training.get("prompt")
        if trained is not None and self.prompt_spec != trained and not _has(self.task, trained):
            lines.append(f"prompt {self.prompt.name}: the task has none that is named {trained!r}, as in training")
        return lines

    @property
    def batch_size(self) -> int:
        """Sentences at a time: fewer once memory did not suffice."""
        return self.limit.rows

    def describe(self) -> str:
        """One line for the person who waits."""
        sampling = f"temperature {self.sampling.temperature:g}, top-p {self.sampling.top_p:g}, seed {self.seed}"
        return (
            f"{self.name} ({self.device}, {self.settings['dtype']}), prompt {self.prompt.name}, {sampling}, at most "
            f"{self.sampling.max_new_tokens} new tokens, {plural(self.batch_size, 'sentence')} at a time"
        )

    def load(self, say: Callable[[str], None] = print, ranks: Ranks = ALONE) -> None:
        """Bring the weights into memory, and find out how they are computed; nothing where a `policy` has been given
        already, another writer's. Each of the ranks loads its own. Raises UserError, on all."""
        ranks.each(lambda: self._load(say))
        policy = self.policy
        assert policy is not None
        policy.ways = ranks.first_does(lambda: policy.ways)  # found by each with its own rounding

    def _load(self, say: Callable[[str], None]) -> None:
        if self.policy is not None:
            return
        self.policy = load_for_generation(self._config, self.prompt)
        settle(self.policy, list(self.prompts.values()), self.sampling.max_new_tokens, say)

    def unload(self) -> None:
        """Give the memory back."""
        self.policy = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, keys: Sequence[Key], say: Callable[[str], None] = print) -> dict[Key, Written]:
        """The sentences of `keys`. Raises NonFiniteLogits; UserError if not even one fits into memory."""
        return dict(zip(keys, self.limit.over(keys, self._write, self.device, say), strict=True))

    def in_batches(
        self,
        keys: Sequence[Key],
        work: Callable[[Sequence[Key]], Sequence[Result]],
        say: Callable[[str], None],
        ranks: Ranks = ALONE,
    ) -> list[Result]:
        """What `work` makes of the keys, in the same batches on all ranks however much memory each has, dealt out to
        them. Raises what `work` raises, on all; UserError if not even one fits into memory."""
        parts = [keys[first : first + self._batch] for first in range(0, len(keys), self._batch)]
        found = ranks.deal(parts, lambda part: self.limit.over(part, work, self.device, say))
        return [result for part in found for result in part]

    def _write(self, keys: Sequence[Key]) -> list[Written]:
        assert self.policy is not None
        rollout = sample(
            self.policy,
            [self.prompts[key.occupation] for key in keys],
            self.sampling,
            uniform_BT=uniforms(self.seed, keys, self.sampling.max_new_tokens),
        )
        texts = sentences_of(self.policy.tokenizer, rollout, [key.occupation for key in keys], self.task)
        return [Written(text, tokens) for text, tokens in zip(texts, rollout.lengths_B.tolist(), strict=True)]


def uniforms(seed: int | str, keys: Sequence[Key], steps: int) -> Tensor:
    """(B, steps) float64 in [0, 1): the random numbers of each key, from the seed and the key alone.

    53 bits of SHAKE-256 each, so no version of any library changes them; asking for more steps keeps the first ones.
    """
    streams = [hashlib.shake_256(f"{seed}/{o}/{run_id}".encode()).digest(8 * steps) for o, run_id in keys]
    bits_BT = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.int64).view(len(keys), steps)
    return (bits_BT >> 11 & (1 << 53) - 1).double() * 2.0**-53


def fingerprint(source: Source) -> str:
    """What tells one model's weights from another's, before they are loaded."""
    if source.packaged is not None:
        return source.packaged.fingerprint
    if source.kind == "shape":
        return f"random weights of the shape {source.path_or_id}"
    if source.kind == "hub":
        # The tokenizer is there by now; its place in the cache names the commit.
        found = (try_to_load_from_cache(source.path_or_id, name) for name in ("tokenizer_config.json", "config.json"))
        return "commit " + next((Path(path).parent.name for path in found if isinstance(path, str)), "unknown")
    if source.kind == "checkpoint":
        saved = read_saved(Path(source.path_or_id))
        return f"checkpoint {saved.weights_sha256} on {fingerprint(checkpoint_base(saved.folder))}"
    total = hashlib.sha256()
    for path in sorted(Path(source.path_or_id).iterdir()):
        part_of_model = path.suffix == ".safetensors" or path.name.startswith(
            ("config.json", "adapter_config", "generation_config", "tokenizer", "chat_template")
        )
        if part_of_model and path.is_file():
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256 {total.hexdigest()}"


def own_prompt(training: Mapping[str, Any], task: Task) -> str:
    """The prompt that a model was trained with, by its `training_record`; the task's first where nothing says, or where
    the task has no such prompt."""
    trained = training.get("prompt")
    return trained if trained is not None and _has(task, trained) else task.default_prompt.name


def _has(task: Task, prompt: str) -> bool:
    """Whether the task knows the prompt, or it brings its own instruction."""
    return "=" in prompt or prompt in (each.name for each in task.prompts)


def model_name(source: Source) -> str:
    """The column Model: a folder's name, or an id."""
    local = source.kind in ("folder", "adapter", "checkpoint")
    return Path(source.path_or_id).resolve().name if local else source.path_or_id


def training_record(source: Source) -> dict[str, Any]:
    """`prompt`, `system` and `model` that the model was trained with here, and the `seconds` that took where they are
    on record; nothing for a model that was not. Raises UserError."""
    if source.kind == "checkpoint":
        config = read_saved(Path(source.path_or_id)).config
        policy, system = config.get("policy", {}), config.get("system", "")
        return {"prompt": config["prompt"], "system": system, "model": policy.get("model")}
    path = Path(source.path_or_id) / "run.json"
    if source.kind not in ("folder", "adapter") or not path.exists():
        return {}
    try:
        record = read_json(path)
        config, seconds = record["config"], record.get("training", {}).get("seconds")
        prompt, system = config["prompt"], config.get("system", "")
        if isinstance(prompt, str) and isinstance(system, str):
            model = config.get("policy", {}).get("model")
            known = {"prompt": prompt, "system": system, "model": model, "seconds": seconds}
            return {name: value for name, value in known.items() if isinstance(value, str | float)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{path} does not say with which prompt the model was trained: restore it, or remove it and give --prompt"
    )
