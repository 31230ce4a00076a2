"""The plain way, for models that no fast way suits: rows of one length together, without padding, masks or packing.

What a model does with distances, windows or a state is then its own affair: every row is computed as if it stood
alone. In scoring, G rows of L tokens are one pass; in sampling, the prompts of one length are a group that keeps its
length, with the model's own cache or, where that cannot be relied on, a whole pass for every token.
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout

CACHES = ("cache", "cache_params", "past_key_values")
"""What models call what they keep of the tokens before: since transformers 5.24 all of its own the first, until then
recurrent ones the second and others the third, as code of a model's own still does."""


def cache_argument(model: nn.Module) -> str:
    """The name of it among what the model's forward pass takes."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    taken = inspect.signature(plain.forward).parameters
    return next((name for name in CACHES if name in taken), CACHES[-1])


def forward(policy: Policy, model: nn.Module, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(N, V) logits that predict each completion token, row by row, and the (N, H) hidden states before them."""
    # The last token is predicted and never fed in.
    rows = [list(p) + c[:-1] for p, c in zip(rollout.prompts, rollout.completions(), strict=True)]
    logits: list[Tensor | None] = [None] * len(rows)
    hidden: list[Tensor | None] = [None] * len(rows)
    for members in by_length(rows):
        ids_GL = torch.tensor([rows[i] for i in members], device=policy.device)
        logits_GLV, hidden_GLH = policy.forward(model, input_ids=ids_GL)
        for place, i in enumerate(members):
            begin = len(rollout.prompts[i]) - 1
            logits[i], hidden[i] = logits_GLV[place, begin:], hidden_GLH[place, begin:]
    return torch.cat([x for x in logits if x is not None]), torch.cat([x for x in hidden if x is not None])


def by_length(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of the rows, those of one length together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[len(row)].append(i)
    return list(groups.values())


class PlainReader:
    """B rows that have read their prompts, and go on a token at a time; as `sample.SharedReader`, in groups."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], *, cached: bool) -> None:
        self.policy = policy
        groups = by_length(prompts)
        begin: type[_Cached] | type[_Whole] = _Cached if cached else _Whole
        self.groups: list[_Cached | _Whole] = [begin(policy, [list(prompts[i]) for i in members]) for members in groups]
        # Of each row that is still written: its group, and its place there.
        where = {i: (g, place) for g, members in enumerate(groups) for place, i in enumerate(members)}
        pairs = torch.tensor([where[i] for i in range(len(prompts))], device=policy.device)
        self.group_B, self.place_B = pairs.T
        self.logits_BV = self._gathered([group.logits_GV for group in self.groups])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.group_B, self.place_B = self.group_B[rows], self.place_B[rows]

    def read(self, token_B: Tensor) -> Tensor:
        """(B, V) logits after one more token of each row."""
        logits: list[Tensor | None] = []
        for number, group in enumerate(self.groups):
            mine = torch.nonzero(self.group_B == number).squeeze(-1)
            logits.append(group.read(self.place_B[mine], token_B[mine]) if len(mine) else None)
        return self._gathered(logits)

    def _gathered(self, logits: Sequence[Tensor | None]) -> Tensor:
        """(B, V) in the order of the rows, from each group's (G, V)."""
        some = next(x for x in logits if x is not None)
        out_BV = some.new_empty(len(self.group_B), some.shape[1])
        for number, logits_GV in enumerate(logits):
            if logits_GV is not None:
                mine = self.group_B == number
                out_BV[mine] = logits_GV[self.place_B[mine]]
        return out_BV


class _Cached:
    """G prompts of one length, with whatever the model itself keeps of them. Rows that have ended are carried along,
    since not every model's state can be cut."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        self.policy = policy
        self.name, self.cache = "", None
        self.logits_GV = self._run(torch.tensor(prompts, device=policy.device))

    def read(self, places: Tensor, tokens: Tensor) -> Tensor:
        ids_G = torch.zeros(len(self.logits_GV), dtype=torch.long, device=tokens.device)
        ids_G[places] = tokens
        return self._run(ids_G[:, None])

    def _run(self, ids_GL: Tensor) -> Tensor:
        inputs: dict[str, Any] = {self.name: self.cache} if self.name else {}
        out = self.policy.model(input_ids=ids_GL, use_cache=True, **inputs)
        found = next((name for name in CACHES if getattr(out, name, None) is not None), CACHES[-1])
        self.cache = getattr(out, found)
        self.name = cache_argument(self.policy.model) if found == CACHES[0] else found
        logits_GV: Tensor = out.logits[:, -1]
        return logits_GV


class _Whole:
    """G prompts of one length and what has been written after them, run through the model anew for every token."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        self.policy = policy
        self.ids_GL = torch.tensor(prompts, device=policy.device)
        self.logits_GV = self._run(self.ids_GL)

    def read(self, places: Tensor, tokens: Tensor) -> Tensor:
        ids_G1 = torch.zeros_like(self.ids_GL[:, :1])
        ids_G1[places] = tokens[:, None]
        self.ids_GL = torch.cat([self.ids_GL, ids_G1], dim=1)
        running = self._run(self.ids_GL[places])
        out_GV = running.new_zeros(len(self.ids_GL), running.shape[1])
        out_GV[places] = running
        return out_GV

    def _run(self, ids_GL: Tensor) -> Tensor:
        logits_GV: Tensor = self.policy.model(input_ids=ids_GL, use_cache=False).logits[:, -1]
        return logits_GV
