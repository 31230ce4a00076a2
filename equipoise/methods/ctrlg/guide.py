"""Guidance while sampling: the model's next-token distribution times what the HMM says of the rest, as one tensor
function that a CUDA graph can record.

B rows, V tokens, S symbols (tokens that the HMM does not tell apart are one), H states of the HMM, F automaton states.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import TokenAutomaton
from equipoise.methods.ctrlg.lookahead import layout, look_ahead
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import invert, weights

_CHUNK = 1 << 26  # numbers in one intermediate result
_LEAST = torch.finfo(torch.float32).tiny


class CtrlGuide:
    """q(v) ∝ p(v) · (N_v / D_v)^guidance for every token v after which a valid sentence can still be ended in time.

    N_v = Σ_j a_j P(v | j) W_r[next(f, v), j] and D_v = Σ_j a_j P(v | j), a the HMM's prediction of its next state given
    the tokens so far, W the look-ahead with r tokens left after v (Zhang et al. 2024, equations 3 and 4; theirs has no
    exponent). Whether v is possible at all depends on the automaton alone.
    """

    def __init__(
        self,
        automaton: TokenAutomaton,
        hmm: HMM,
        symbol_V: Tensor,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        guidance: float,
        device: torch.device,
    ) -> None:
        """`symbol_V`: each token's symbol; tokens of one symbol must be of one class. `prompts`: token ids of the HMM's
        prompts, in its order; a prompt that is not among them starts from their mean."""
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
        self.exceptions_FK = torch.from_numpy(arranged.exceptions_FK).to(device)
        self.class_V = torch.from_numpy(automaton.class_V).long().to(device)
        self.next_FC = torch.from_numpy(automaton.next_FC).to(device)
        self.need_F = torch.from_numpy(automaton.need_F).to(device)
        self.transition_HH = hmm.transition_HH
        emission_SH = hmm.emission_SH[order_S.to(device)]
        self.emission_S1H = torch.cat([emission_SH, torch.zeros_like(emission_SH[:1])])
        self.initial_PH = torch.cat([hmm.initial_PH, hmm.initial_PH.mean(0, keepdim=True)])
        self.number = {tuple(prompt): i for i, prompt in enumerate(prompts)}
        steps = sampling.max_new_tokens
        look_TFH = look_ahead(
            automaton, HMM(self.initial_PH, hmm.transition_HH, emission_SH), self.class_S1[:-1], steps
        )
        self.look = look_TFH.view(-1, look_TFH.shape[-1])
        self._states: dict[int, _State] = {}

    def open(self, rows: int) -> "_State":
        if rows not in self._states:
            self._states[rows] = _State(self, rows)
        return self._states[rows]

    def initial(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(B, H) the HMM's first state after each prompt."""
        unknown = len(self.number)
        return self.initial_PH[[self.number.get(tuple(p), unknown) for p in prompts]]

    def bonus(self, belief_BH: Tensor, state_B: Tensor, left: Tensor) -> Tensor:
        """(B, S) log of what each symbol's probability is multiplied with; −inf where it must not come. left: (1,)."""
        next_BC = self.next_FC[state_B]
        possible_BC = self.need_F[next_BC] <= left
        if self.guidance == 0:
            return torch.where(possible_BC, 0.0, -torch.inf)[:, self.class_S1[:-1]]
        first = left * len(self.need_F)  # the row of `look` where W_left begins
        emission_SH = self.emission_S1H[:-1]
        predicted_BS = belief_BH @ emission_SH.T
        valid_BS1 = torch.zeros(len(state_B), len(self.emission_S1H), device=self.device)
        begin = 0
        for group, size in enumerate(self.sizes):
            ahead_BH = self.look[first + next_BC[:, self.class_G[group]]]
            valid_BS1[:, begin : begin + size] = (belief_BH * ahead_BH) @ emission_SH[begin : begin + size].T
            begin += size
        width = self.exceptions_FK.shape[1]
        rows = max(1, _CHUNK // (width * belief_BH.shape[1]))
        for begin in range(0, len(state_B), rows):
            part = slice(begin, begin + rows)
            place_BK = self.exceptions_FK[state_B[part]].long()
            target_BK = next_BC[part].gather(1, self.class_S1[place_BK])
            joint_BKH = self.look[first + target_BK] * self.emission_S1H[place_BK]
            valid_BK = torch.bmm(joint_BKH, belief_BH[part].unsqueeze(-1)).squeeze(-1)
            valid_BS1[part].scatter_(1, place_BK, valid_BK)
        # Too small for a float is no reason to forbid: that is the automaton's business.
        ratio_BS = valid_BS1[:, :-1].clamp(min=_LEAST) / predicted_BS.clamp(min=_LEAST)
        bonus_BS = self.guidance * ratio_BS.clamp(min=_LEAST).log()
        return torch.where(possible_BC[:, self.class_S1[:-1]], bonus_BS, -torch.inf)


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
        self.belief_BH.copy_(self.guide.initial(prompts))
        self.state_B.fill_(self.guide.automaton.start)
        self.log_weight_B.zero_()
        self.left.fill_(self.guide.sampling.max_new_tokens - 1)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, rows: Tensor | None = None) -> Tensor:
        guide = self.guide
        belief_BH = self.belief_BH if rows is None else self.belief_BH[rows]
        state_B = self.state_B if rows is None else self.state_B[rows]
        scores_BV = logits_BV.float() / guide.sampling.temperature
        total_B = torch.logsumexp(scores_BV, dim=-1)
        bonus_BS = guide.bonus(belief_BH, state_B, self.left)
        guided_BV = scores_BV + bonus_BS.index_select(1, guide.place_V)
        weights_BV = weights(guided_BV, SamplingConfig(top_p=guide.sampling.top_p))
        token_B = invert(weights_BV, uniform_B)
        model_B = scores_BV.gather(1, token_B[:, None]).squeeze(1) - total_B
        guided_B = weights_BV.gather(1, token_B[:, None]).squeeze(1).log()
        if guide.sampling.top_p < 1:
            guided_B = guided_B - weights_BV.sum(-1).log()
        gain_B = (model_B - guided_B).double()
        live_B = state_B != guide.automaton.done
        place_B, class_B = guide.place_V[token_B], guide.class_V[token_B]
        joint_BH = belief_BH * guide.emission_S1H[place_B]
        belief_BH = (joint_BH / joint_BH.sum(-1, keepdim=True).clamp(min=_LEAST)) @ guide.transition_HH
        state_B = guide.next_FC[state_B, class_B].long()
        gain_B = torch.where(live_B, gain_B, 0.0)
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
        return {"log_weight": self.log_weight_B.clone(), "valid": self.state_B == self.guide.automaton.done}
