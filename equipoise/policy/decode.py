"""The sampler's fast path: decoding over a static cache, one CUDA graph per token, nothing read back on the way.

Same contract and same random numbers as `sample.sample`, its plain twin. Prompts are packed as a trie and run once;
each row's share of the keys and values is copied to it. The state of decoding (token, place, who has finished) stays on
the GPU; whether anyone is still writing the host learns of a token while the GPU is at the next.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from equipoise.policy import trie
from equipoise.policy.attention import attention_modules
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import Guide, draw, note_finite
from equipoise.policy.families import window
from equipoise.policy.graphs import on_its_way, round_up, sent
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout

NODES = 64  # prompt nodes are padded to multiples of this


class StaticDecoder:
    """Buffers for B rows of at most `width` prompt tokens and `config.max_new_tokens` new ones.

    Cache per row: 2 × layers × key heads × (width + new tokens) × head size values in the compute dtype.
    """

    def __init__(
        self, policy: Policy, rows: int, width: int, config: SamplingConfig, guide: Guide | None = None
    ) -> None:
        self.guide = guide.open(rows) if guide is not None else None
        self.policy, self.config, self.width = policy, config, width
        device, steps = policy.device, config.max_new_tokens
        self.attention = attention_modules(policy.model)
        text = policy.model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        shape = (2, rows, key_heads, width + steps, size)
        sees = window(policy.model.config)
        self.window = int(sees) if sees < width + steps else 0
        # Zeros: a place that holds nothing is hidden from the softmax, but 0·nan would still be nan.
        self.caches = [torch.zeros(shape, dtype=policy.dtype, device=device) for _ in self.attention]
        self.stops_V = torch.zeros(text.vocab_size, dtype=torch.bool, device=device)
        stops = [i for i in policy.stop_ids if i >= 0]
        self.stops_V[stops] = True
        self.uniform_BT = torch.zeros(rows, steps, dtype=torch.float64, device=device)
        self.logits_BV = torch.zeros(rows, text.vocab_size, dtype=policy.dtype, device=device)
        self.hidden_BL = torch.ones(rows, width + steps, dtype=torch.bool, device=device)
        self.positions_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.tokens_BT = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.finite_B = torch.ones(rows, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], uniform_BT: Tensor) -> tuple[Rollout, bool]:
        """(completions, whether all logits were finite). As many prompts as there are rows."""
        made = trie.build(prompts, [[0]] * len(prompts), self.width)  # the token to be predicted is not yet known
        nodes = round_up(len(made.tokens_M), NODES)
        inputs = [pad(x, (0, nodes - len(x))) for x in (made.tokens_M, made.depths_M, made.places_M)]
        lengths_B = torch.tensor([len(p) for p in prompts])
        *inputs, lengths_B = sent([*inputs, made.paths_RL, made.predictors_N, lengths_B], self.policy.device)
        for module, cache in zip(self.attention, self.caches, strict=True):
            module.kv_cache = cache
        graphs, mine = self.policy.graphs, id(self)
        graphs.record((mine, "token"), self._token)  # which writes into the state, so before the state is set
        (logits_BV,) = graphs((mine, "prompts"), self._prompts, *inputs)
        self.logits_BV.copy_(logits_BV)
        places = torch.arange(self.hidden_BL.shape[1], device=self.policy.device)
        self.hidden_BL.copy_(places[None] >= lengths_B[:, None])
        self.positions_B.copy_(lengths_B)
        self.uniform_BT.copy_(uniform_BT)
        for buffer in (self.tokens_BT, self.lengths_B, self.finished_B, self.step):
            buffer.zero_()
        self.finite_B.fill_(1)
        if self.guide is not None:
            self.guide.start(prompts)
        before: Callable[[], Any] | None = None
        for _ in range(self.config.max_new_tokens):
            graphs((mine, "token"), self._token)
            finished = on_its_way(self.finished_B.all())
            if before is not None and before():
                break
            before = finished
        tokens_BT, lengths_B, finished_B = self.tokens_BT.clone(), self.lengths_B.clone(), self.finished_B.clone()
        report = self.guide.report() if self.guide is not None else {}
        return Rollout([list(p) for p in prompts], tokens_BT, lengths_B, finished_B, report), bool(self.finite_B.all())

    def _prompts(
        self, tokens_M: Tensor, depths_M: Tensor, places_M: Tensor, fill_BP: Tensor, last_B: Tensor
    ) -> tuple[Tensor]:
        """Run the prompts' trie, fill the caches, return the logits after each prompt."""
        logits = self._run(
            input_ids=tokens_M[None],
            position_ids=depths_M[None],
            logits_to_keep=last_B,
            paths_RL=fill_BP,
            places_M=places_M,
            fill_BP=fill_BP,
        )
        return (logits[0],)

    def _token(self) -> tuple[()]:
        """Draw one token for every row, and compute the logits of the next."""

        uniform_B = self.uniform_BT.gather(1, self.step.expand(len(self.uniform_BT), 1)).squeeze(1)
        if self.guide is None:
            token_B = draw(self.logits_BV, uniform_B, self.config, self.finite_B)
        else:
            note_finite(self.logits_BV, self.finite_B)
            token_B = self.guide.draw(self.logits_BV, uniform_B)
        live_B = ~self.finished_B
        token_B = torch.where(live_B, token_B, 0)
        self.tokens_BT.index_copy_(1, self.step, token_B[:, None])
        self.lengths_B += live_B
        self.finished_B |= live_B & self.stops_V[token_B]
        slot = self.step + self.width
        self.hidden_BL.index_fill_(1, slot, False)
        beyond_BL = self._beyond(slot) if self.window else None
        logits = self._run(
            input_ids=token_B[:, None],
            position_ids=self.positions_B[:, None],
            logits_to_keep=1,
            slot=slot,
            hidden_BL=self.hidden_BL,
            beyond_BL=beyond_BL,
        )
        self.logits_BV.copy_(logits[:, -1])
        self.positions_B += 1
        self.step += 1
        return ()

    def _beyond(self, slot: Tensor) -> Tensor:
        """(B, L) True where a place holds nothing for the row, or is beyond the window of the token at `slot`."""
        places_L = torch.arange(self.hidden_BL.shape[1], device=self.policy.device)
        # A prompt begins at place 0, what is written at place `width`: only within each do places count tokens.
        own_B1 = self.positions_B[:, None]
        ages_BL = torch.where(places_L < self.width, own_B1, slot) - places_L
        return self.hidden_BL | (ages_BL >= self.window)

    def _run(self, **inputs: Any) -> Tensor:
        unused = torch.zeros(1, 1, 1, 1, device=self.policy.device)  # keeps transformers from making a mask
        logits: Tensor = self.policy.model(attention_mask=unused, use_cache=False, **inputs).logits
        return logits
