"""What was sampled: prompts and completions of one batch, with real lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """B completions of at most T tokens.

    prompts: B lists of token ids. tokens_BT: (B, T) sampled ids, 0 beyond the length. lengths_B: (B,) real tokens, the
    stop token counted. finished_B: (B,) True where the last real token is a stop token, False where the limit cut it.
    report: what a guide has to say of each completion, by name: (B, …).
    """

    prompts: Sequence[Sequence[int]]
    tokens_BT: Tensor
    lengths_B: Tensor
    finished_B: Tensor
    report: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mask_BT(self) -> Tensor:
        """(B, T) True at real tokens. From lengths alone: a pad id may be a stop id, and a stop token is an action."""
        steps = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        return steps[None, :] < self.lengths_B[:, None]

    @property
    def tokens_N(self) -> Tensor:
        """(N,) the real tokens, row by row."""
        return self.tokens_BT[self.mask_BT]

    def completions(self) -> list[list[int]]:
        lengths = self.lengths_B.tolist()
        return [row[:n] for row, n in zip(self.tokens_BT.tolist(), lengths, strict=True)]

    def select(self, rows: Tensor) -> "Rollout":
        """The given rows, in the given order."""
        prompts = [self.prompts[i] for i in rows.tolist()]
        report = {name: x[rows] for name, x in self.report.items()}
        return Rollout(prompts, self.tokens_BT[rows], self.lengths_B[rows], self.finished_B[rows], report)

    def cpu(self) -> "Rollout":
        report = {name: x.cpu() for name, x in self.report.items()}
        return Rollout(self.prompts, self.tokens_BT.cpu(), self.lengths_B.cpu(), self.finished_B.cpu(), report)

    def __len__(self) -> int:
        return len(self.prompts)


def rollout_of(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Rollout:
    """Given completions, each after its prompt, as if they had been sampled and had ended."""
    width = max(map(len, completions))
    tokens_BT = torch.tensor([[*c, *[0] * (width - len(c))] for c in completions])
    lengths_B = torch.tensor([len(c) for c in completions])
    return Rollout(prompts, tokens_BT, lengths_B, torch.ones(len(completions), dtype=torch.bool))
