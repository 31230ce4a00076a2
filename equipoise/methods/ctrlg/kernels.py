"""A guided token on a GPU in five kernels; `guide.CtrlGuide`, whose tables they read, has their plain twin.

Letters as in `guide`; B rows, K places of a row's exceptions at the most. Tables of the HMM are read where they lie: no
number of a row and a symbol's states is ever written out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.methods.ctrlg.lookahead import LEAST, TILE
from equipoise.policy.kernels import vocabulary

ROWS, INNER, STAGES, WARPS = 64, 32, 3, 8
PLACES, WIDTH = 16, 256
"""Of the exceptions: how many at a time, and how many states of the HMM."""
BLOCK = 4096


@triton.jit
def _follow(state, class_, next_AC, words_AC, C, levels, dead):
    """The state after a class of tokens."""
    base = state // levels
    to = tl.load(next_AC + base * C + class_).to(tl.int64)
    level = state % levels + tl.load(words_AC + base * C + class_).to(tl.int64)
    return tl.where(level < levels, to * levels + level, dead)


@triton.jit(do_not_specialize=["B"])
def _ahead_kernel(
    state, left, next_AC, words_AC, need_F, row_F, out, B, C, levels, dead, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each class leads: the row of the look-ahead with so many tokens left, −1 where the class must not come."""
    row = tl.program_id(1).to(tl.int64)
    class_ = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = class_ < C
    class_ = tl.where(inside, class_, 0)
    after = _follow(tl.load(state + row), class_, next_AC, words_AC, C, levels, dead)
    tokens = tl.load(left)
    to = tl.load(row_F + after) + tokens * rows
    tl.store(out + row * C + class_, tl.where(tl.load(need_F + after) <= tokens, to, -1).to(tl.int32), inside)


@triton.jit
def _log_ratio(valid, predicted, guidance, least):
    # Too small for a float is no reason to forbid: that is the automaton's business.
    ratio = tl.maximum(valid, least) / tl.maximum(predicted, least)
    return guidance * tl.log(tl.maximum(ratio, least))


@triton.jit(do_not_specialize=["B"])
def _bonus_kernel(
    belief, emission, look, ahead, class_S, begin, end, class_of, bonus, B, C, S, H, guidance, least,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All symbols of a tile by their group's look-ahead: two products that share what they read."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    tile = tl.program_id(1)
    columns = tl.load(begin + tile) + tl.arange(0, BN)
    real, inside = rows < B, columns < tl.load(end + tile)
    to = tl.load(ahead + rows.to(tl.int64) * C + tl.load(class_of + tile), real, -1).to(tl.int64)
    valid = tl.zeros((BM, BN), tl.float32)
    predicted = tl.zeros((BM, BN), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        within = (k < H)[None]
        a = tl.load(belief + rows[:, None] * H + k[None], real[:, None] & within, 0.0)
        w = tl.load(look + to[:, None] * H + k[None], (to >= 0)[:, None] & within, 0.0).to(tl.float32)
        e = tl.load(emission + columns[:, None] * H + k[None], inside[:, None] & within, 0.0)
        turned = tl.trans(e)
        predicted = tl.dot(a.to(e.dtype), turned, predicted, input_precision=PRECISION)
        valid = tl.dot((a * w).to(e.dtype), turned, valid, input_precision=PRECISION)
    both = real[:, None] & inside[None]
    class_ = tl.load(class_S + columns, inside, 0)
    may = tl.load(ahead + rows[:, None].to(tl.int64) * C + class_[None], both, -1) >= 0
    found = tl.where(may, _log_ratio(valid, predicted, guidance, least), float("-inf"))
    tl.store(bonus + rows[:, None].to(tl.int64) * S + columns[None], found, both)


@triton.jit
def _exceptions_kernel(
    state, belief, emission, look, ahead, class_S, exceptions, bonus, C, S, H, K, levels, guidance, least,
    PLACES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The symbols that a row's state sends elsewhere than their group goes, one by one."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    listed = exceptions + tl.load(state + row) // levels * K
    if tl.load(listed + tl.program_id(1) * PLACES) < S:  # lists are filled up at their end
        place = tl.load(listed + number, number < K, S)
        real = place < S
        to = tl.load(ahead + row * C + tl.load(class_S + place, real, 0), real, -1).to(tl.int64)
        may = to >= 0
        valid = tl.zeros((PLACES,), tl.float32)
        predicted = tl.zeros((PLACES,), tl.float32)
        for start in range(0, H, WIDTH):
            k = start + tl.arange(0, WIDTH)
            a = tl.load(belief + row * H + k, k < H, 0.0)
            w = tl.load(look + to[:, None] * H + k[None], may[:, None] & (k < H)[None], 0.0).to(tl.float32)
            e = tl.load(emission + place[:, None] * H + k[None], may[:, None] & (k < H)[None], 0.0).to(tl.float32)
            joint = a[None] * e
            predicted += tl.sum(joint, 1)
            valid += tl.sum(joint * w, 1)
        found = tl.where(may, _log_ratio(valid, predicted, guidance, least), float("-inf"))
        tl.store(bonus + row * S + place, found, real)


@triton.jit
def _guided_kernel(logits, bonus, place_V, guided, lse, V, S, inverse, BLOCK: tl.constexpr):
    """The scores with the bonus of each token's symbol, and log Σ exp of those without."""
    row = tl.program_id(0).to(tl.int64)
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(logits + row * V + columns, inside, float("-inf")).to(tl.float32) * inverse
        place = tl.load(place_V + columns, inside, 0)
        tl.store(guided + row * V + columns, z + tl.load(bonus + row * S + place, inside, 0.0), inside)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    tl.store(lse + row, top + tl.log(total))


@triton.jit
def _advance_kernel(
    logits, token, lse, logprob, state, belief, emission, place_V, class_V, next_AC, words_AC, after, gain, joint,
    V, C, H, levels, dead, done, inverse, least, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row's automaton after its token, what the token adds to the log weight, and the HMM's state that emitted
    it."""
    row = tl.program_id(0).to(tl.int64)
    drawn = tl.load(token + row)
    before = tl.load(state + row)
    model = tl.load(logits + row * V + drawn).to(tl.float32) * inverse - tl.load(lse + row)
    more = (model - tl.load(logprob + row)).to(tl.float64)
    tl.store(gain + row, tl.where(before // levels != done, more, 0.0))
    tl.store(after + row, _follow(before, tl.load(class_V + drawn), next_AC, words_AC, C, levels, dead))
    k = tl.arange(0, BLOCK)
    e = tl.load(emission + tl.load(place_V + drawn).to(tl.int64) * H + k, k < H, 0.0).to(tl.float32)
    found = tl.load(belief + row * H + k, k < H, 0.0) * e
    tl.store(joint + row * H + k, found / tl.maximum(tl.sum(found, 0), least), k < H)


def ahead(guide: Any, state_B: Tensor, left: Tensor) -> Tensor:
    """(B, C) int32: the row of the look-ahead after each class, −1 where it must not come. left: (1,) int64."""
    rows, classes = len(state_B), guide.next_AC.shape[1]
    out = torch.empty(rows, classes, dtype=torch.int32, device=state_B.device)
    _ahead_kernel[(triton.cdiv(classes, 1024), rows)](
        state_B, left, guide.next_AC, guide.words_AC, guide.need_F, guide.row_F, out, rows, classes,
        guide.automaton.levels, guide.automaton.dead, guide.rows, BLOCK=1024,
    )  # fmt: skip
    return out


def bonus(guide: Any, belief_BH: Tensor, state_B: Tensor, left: Tensor) -> Tensor:
    """(B, S) float32, as `CtrlGuide.bonus`. Factors of products have TF32's ten bits, sums and exceptions are
    float32."""
    ahead_BC = ahead(guide, state_B, left)
    if guide.guidance == 0:
        return torch.where(ahead_BC >= 0, 0.0, -torch.inf)[:, guide.class_S1[:-1]]
    rows, hidden = belief_BH.shape
    count, classes, width = len(guide.emission_S1H) - 1, ahead_BC.shape[1], guide.exceptions_AK.shape[1]
    out = torch.empty(rows, count, dtype=torch.float32, device=belief_BH.device)
    begin, end, class_of = guide.tiles
    _bonus_kernel[(triton.cdiv(rows, ROWS), len(begin))](
        belief_BH, guide.emission_S1H, guide.look, ahead_BC, guide.class_S1, begin, end, class_of, out, rows, classes,
        count, hidden, guide.guidance, LEAST, BM=ROWS, BN=TILE, BK=INNER, PRECISION="tf32", num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    _exceptions_kernel[(rows, triton.cdiv(width, PLACES))](
        state_B, belief_BH, guide.emission_S1H, guide.look, ahead_BC, guide.class_S1, guide.exceptions_AK, out, classes,
        count, hidden, width, guide.automaton.levels, guide.guidance, LEAST, PLACES=PLACES, WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    return out


def step(
    guide: Any, logits_BV: Tensor, uniform_B: Tensor, belief_BH: Tensor, state_B: Tensor, left: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) tokens, (B,) float64 log p − log q of each, (B, H) the HMM's prediction and (B,) the states after them."""
    logits_BV = logits_BV.contiguous()
    (rows, size), hidden, device = logits_BV.shape, belief_BH.shape[1], logits_BV.device
    bonus_BS = bonus(guide, belief_BH, state_B, left)
    guided_BV = torch.empty(rows, size, dtype=torch.float32, device=device)
    lse_B, logprob_B = torch.empty(2, rows, dtype=torch.float32, device=device)
    inverse = 1.0 / guide.sampling.temperature
    _guided_kernel[(rows,)](
        logits_BV, bonus_BS, guide.place_V, guided_BV, lse_B, size, bonus_BS.shape[1], inverse, BLOCK=BLOCK, num_warps=8
    )
    token_B = vocabulary.draw(guided_BV, uniform_B, 1.0, guide.sampling.top_p, logprob_B=logprob_B)
    joint_BH, after_B = torch.empty_like(belief_BH), torch.empty_like(state_B)
    gain_B = torch.empty(rows, dtype=torch.float64, device=device)
    _advance_kernel[(rows,)](
        logits_BV, token_B, lse_B, logprob_B, state_B, belief_BH, guide.emission_S1H, guide.place_V, guide.class_V,
        guide.next_AC, guide.words_AC, after_B, gain_B, joint_BH, size, guide.next_AC.shape[1], hidden,
        guide.automaton.levels, guide.automaton.dead, guide.done, inverse, LEAST, BLOCK=triton.next_power_of_2(hidden),
    )  # fmt: skip
    return token_B, gain_B, joint_BH @ guide.transition_HH, after_B
