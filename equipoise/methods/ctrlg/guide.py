"""Guidance while sampling: the model's next-token distribution times what the HMM says of the rest, as one tensor
function that a CUDA graph can record.

B rows, V tokens, C classes of tokens, S symbols (tokens that the HMM does not tell apart are one), H states of the HMM,
F automaton states, R rows of the look-ahead, A automaton states words aside (`TokenAutomaton` calls them B).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import TokenAutomaton
from equipoise.methods.ctrlg.lookahead import LEAST, layout, look_ahead, tiles
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import invert, weights

_CHUNK = 1 << 26  # numbers in one intermediate result


class CtrlGuide:
    """q(v) ∝ p(v) · (N_v / D_v)^guidance for every token v after which a valid sentence can still be ended in time.

    N_v = Σ_j a_j P(v | j) W_r[next(f, v), j] and D_v = Σ_j a_j P(v | j), a the HMM's prediction of its next state given
    the tokens so far, W the look-ahead with r tokens left after v (Zhang et al. 2024, equations 3 and 4; theirs has no
    exponent). Whether v is possible at all depends on the automaton alone. Within a character, W is that of where the
    character most likely leads.
    """

    def __init__(
        self,
        automaton: TokenAutomaton,
        hmm: HMM,
        symbol_V: Tensor,
        prompts: Mapping[str, Sequence[int]],
        sampling: SamplingConfig,
        guidance: float,
        device: torch.device,
    ) -> None:
        """`symbol_V`: each token's symbol; tokens of one symbol must be of one class. `prompts`: for each occupation
        the token ids of its prompt, in the HMM's order; no other prompts can be guided."""
        self.automaton, self.sampling, self.guidance, self.device = automaton, sampling, guidance, device
        hmm = hmm.to(device)
        class_S = np.zeros(len(hmm.emission_SH), dtype=np.int64)
        class_S[symbol_V.cpu().numpy()] = automaton.class_V
        assert (class_S[symbol_V.cpu().numpy()] == automaton.class_V).all()
        arranged = layout(automaton, class_S)
        order_S = torch.from_numpy(arranged.order_S)
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(len(order_S))
        self.sizes = arranged.sizes_G
        self.place_V = place_S[symbol_V.cpu()].to(device)
        classes = torch.from_numpy(class_S)[order_S]
        self.class_S1 = torch.cat([classes, classes.new_zeros(1)]).to(device)
        self.class_G = (
            arranged.class_G.tolist()
        )  # numbers: a tensor as an index would be read, which a CUDA graph forbids
        self.exceptions_AK = torch.from_numpy(arranged.exceptions_AK).to(device)
        self.class_V = torch.from_numpy(automaton.class_V).long().to(device)
        self.next_AC = torch.from_numpy(automaton.next_BC).to(device)
        self.words_AC = torch.from_numpy(automaton.words_BC).to(device)
        self.need_F = torch.from_numpy(automaton.need_F).to(device)
        self.row_F = torch.from_numpy(automaton.row_F).long().to(device)
        self.rows, self.done = len(automaton.next_RC), len(automaton.next_BC) - 2
        self.transition_HH = hmm.transition_HH
        emission_SH = hmm.emission_SH[order_S.to(device)]
        self.emission_S1H = torch.cat([emission_SH, torch.zeros_like(emission_SH[:1])])
        self.initial_PH = hmm.initial_PH
        self.number = {tuple(prompt): i for i, prompt in enumerate(prompts.values())}
        self.start_P = torch.tensor([automaton.starts[occupation] for occupation in prompts], device=device)
        steps = sampling.max_new_tokens
        look_TRH = look_ahead(automaton, HMM(hmm.initial_PH, hmm.transition_HH, emission_SH), self.class_S1[:-1], steps)
        self.look = look_TRH.view(-1, look_TRH.shape[-1])
        self.tiles = tuple(column_N.to(device) for column_N in tiles(arranged))
        self._states: dict[int, _State] = {}

    def open(self, rows: int) -> "_State":
        if rows not in self._states:
            self._states[rows] = _State(self, rows)
        return self._states[rows]

    def initial(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(B, H) the HMM's first state after each prompt, (B,) the automaton's."""
        rows = [self.number[tuple(p)] for p in prompts]
        return self.initial_PH[rows], self.start_P[rows]

    def follow(self, state_B: Tensor, class_B: Tensor | None = None) -> Tensor:
        """(B, C) the state after each class of tokens, or (B,) after the one given."""
        levels = self.automaton.levels
        base_B, level_B = state_B // levels, state_B % levels
        if class_B is None:
            next_X, level_X = self.next_AC[base_B].long(), level_B[:, None] + self.words_AC[base_B]
        else:
            next_X, level_X = self.next_AC[base_B, class_B].long(), level_B + self.words_AC[base_B, class_B]
        return torch.where(level_X < levels, next_X * levels + level_X, self.automaton.dead)

    def bonus(self, belief_BH: Tensor, state_B: Tensor, left: Tensor) -> Tensor:
        """(B, S) log of what each symbol's probability is multiplied with; −inf where it must not come. left: (1,)."""
        next_BC = self.follow(state_B)
        possible_BC = self.need_F[next_BC] <= left
        if self.guidance == 0:
            return torch.where(possible_BC, 0.0, -torch.inf)[:, self.class_S1[:-1]]
        row_BC = self.row_F[next_BC] + left * self.rows  # W_left begins there in `look`
        base_B = state_B // self.automaton.levels
        emission_SH = self.emission_S1H[:-1]
        predicted_BS = belief_BH @ emission_SH.T
        valid_BS1 = torch.zeros(len(state_B), len(self.emission_S1H), device=self.device)
        begin = 0
        for group, size in enumerate(self.sizes):
            ahead_BH = self.look[row_BC[:, self.class_G[group]]]
            valid_BS1[:, begin : begin + size] = (belief_BH * ahead_BH) @ emission_SH[begin : begin + size].T
            begin += size
        width = self.exceptions_AK.shape[1]
        rows = max(1, _CHUNK // (width * belief_BH.shape[1]))
        for begin in range(0, len(state_B), rows):
            part = slice(begin, begin + rows)
            place_BK = self.exceptions_AK[base_B[part]].long()
            target_BK = row_BC[part].gather(1, self.class_S1[place_BK])
            joint_BKH = self.look[target_BK] * self.emission_S1H[place_BK]
            valid_BK = torch.bmm(joint_BKH, belief_BH[part].unsqueeze(-1)).squeeze(-1)
            valid_BS1[part].scatter_(1, place_BK, valid_BK)
        # Too small for a float is no reason to forbid: that is the automaton's business.
        ratio_BS = valid_BS1[:, :-1].clamp(min=LEAST) / predicted_BS.clamp(min=LEAST)
        bonus_BS = self.guidance * ratio_BS.clamp(min=LEAST).log()
        return torch.where(possible_BC[:, self.class_S1[:-1]], bonus_BS, -torch.inf)

    def step(
        self, logits_BV: Tensor, uniform_B: Tensor, belief_BH: Tensor, state_B: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B,) tokens, (B,) float64 log p − log q of each, (B, H) the HMM's prediction and (B,) the states after them.
        left: (1,) tokens that may follow. The plain twin of `kernels.step`, which a GPU takes."""
        scores_BV = logits_BV.float() / self.sampling.temperature
        total_B = torch.logsumexp(scores_BV, dim=-1)
        bonus_BS = self.bonus(belief_BH, state_B, left)
        guided_BV = scores_BV + bonus_BS.index_select(1, self.place_V)
        weights_BV = weights(guided_BV, SamplingConfig(top_p=self.sampling.top_p))
        token_B = invert(weights_BV, uniform_B)
        model_B = scores_BV.gather(1, token_B[:, None]).squeeze(1) - total_B
        guided_B = weights_BV.gather(1, token_B[:, None]).squeeze(1).log()
        if self.sampling.top_p < 1:
            guided_B = guided_B - weights_BV.sum(-1).log()
        gain_B = (model_B - guided_B).double()
        live_B = state_B // self.automaton.levels != self.done
        place_B, class_B = self.place_V[token_B], self.class_V[token_B]
        joint_BH = belief_BH * self.emission_S1H[place_B]
        belief_BH = (joint_BH / joint_BH.sum(-1, keepdim=True).clamp(min=LEAST)) @ self.transition_HH
        state_B = self.follow(state_B, class_B)
        return token_B, torch.where(live_B, gain_B, 0.0), belief_BH, state_B


class _State:
    """Guidance of B completions: the HMM's prediction, the automaton's state, the weight so far."""

    def __init__(self, guide: CtrlGuide, rows: int) -> None:
        self.guide = guide
        device, hidden = guide.device, len(guide.transition_HH)
        self.belief_BH = torch.full((rows, hidden), 1 / hidden, device=device)
        self.state_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.log_weight_B = torch.zeros(rows, dtype=torch.float64, device=device)
        self.left = torch.zeros(1, dtype=torch.long, device=device)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        belief_BH, state_B = self.guide.initial(prompts)
        self.belief_BH.copy_(belief_BH)
        self.state_B.copy_(state_B)
        self.log_weight_B.zero_()
        self.left.fill_(self.guide.sampling.max_new_tokens - 1)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, rows: Tensor | None = None) -> Tensor:
        belief_BH = self.belief_BH if rows is None else self.belief_BH[rows]
        state_B = self.state_B if rows is None else self.state_B[rows]
        if logits_BV.is_cuda:
            from equipoise.methods.ctrlg import kernels

            found = kernels.step(self.guide, logits_BV, uniform_B, belief_BH, state_B, self.left)
        else:
            found = self.guide.step(logits_BV, uniform_B, belief_BH, state_B, self.left)
        token_B, gain_B, belief_BH, state_B = found
        if rows is None:
            self.belief_BH.copy_(belief_BH)
            self.state_B.copy_(state_B)
            self.log_weight_B += gain_B
        else:
            self.belief_BH[rows], self.state_B[rows] = belief_BH, state_B
            self.log_weight_B[rows] += gain_B
        self.left.sub_(1).clamp_(min=0)
        return token_B

    def report(self) -> Mapping[str, Tensor]:
        """log_weight: Σ log p − log q over a completion's tokens, in nats. valid: whether the automaton accepts it."""
        return {"log_weight": self.log_weight_B.clone(), "valid": self.guide.need_F[self.state_B] == 0}
