"""The Mamba-2 recurrence in torch: chunks of matrix products, no intermediate larger than a chunk's scores of each head.

B sequences, T tokens, H heads of width P, G groups of heads that share B and C, N state, c chunks of Q tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_scan(
    x_BTHP: Tensor, dt_BTH: Tensor, a_log_H: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, d_H: Tensor, dt_bias_H: Tensor,
    limits: tuple[float, float], *, chunk: int = 64, factors: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``state ← exp(dt·A) state + dt B xᵀ`` and ``y = C·state + D x``, token by token in effect.

    Args:
        x_BTHP: the input.
        dt_BTH: step sizes before bias and softplus.
        a_log_H: ``A = -exp(a_log)``.
        b_BTGN, c_BTGN: into and out of the state.
        d_H: the skip.
        dt_bias_H: added to `dt` in its precision, as the families do.
        limits: what dt is clamped to after softplus.
        chunk: Q.
        factors: the dtype of the factors of matrix products; None: fp32. Sums over tokens and decays are fp32 or wider.

    Returns:
        y ``[B, T, H, P]`` in fp32 or wider, the state after the last token ``[B, H, P, N]``.
    """
    batch, tokens, heads, width = x_BTHP.shape
    groups, state = b_BTGN.shape[2:]
    wide = torch.promote_types(x_BTHP.dtype, torch.float32)
    factors = factors or wide
    dt_BTH = F.softplus(dt_BTH + dt_bias_H.to(dt_BTH.dtype)).clamp(*limits).to(wide)
    skip = x_BTHP.to(wide) * d_H.to(wide)[:, None]

    chunk = min(chunk, tokens)
    chunks, rest = -(-tokens // chunk), -tokens % chunk

    def cut(rows: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[B, c, …, Q]`` with time last; what is past the end is 0 and changes nothing."""
        rows = F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, rest))
        return rows.unflatten(1, (chunks, chunk)).movedim(2, -1)

    dt_cHQ = cut(dt_BTH)
    decay_cHQ = dt_cHQ * -torch.exp(a_log_H.to(wide))[:, None]
    pairs_cHQQ = segment_sums(decay_cHQ).exp()
    to_end_cHQ = pairs_cHQQ[..., -1, :]
    run_cHQ = decay_cHQ.cumsum(-1)

    # Heads of a group lie side by side, so that B and C are not repeated for each of them.
    x_cHPQ = cut(x_BTHP).to(wide) * dt_cHQ[..., None, :]
    b_cGNQ, c_cGNQ = cut(b_BTGN).to(factors), cut(c_BTGN).to(factors)
    scores_cGQQ = c_cGNQ.transpose(-1, -2) @ b_cGNQ
    mixed_cHQQ = (scores_cGQQ.to(wide)[:, :, :, None] * pairs_cHQQ.unflatten(2, (groups, -1))).flatten(2, 3)
    y_cHPQ = x_cHPQ.to(factors) @ mixed_cHQQ.to(factors).transpose(-1, -2)

    into_cGPQ = (x_cHPQ * to_end_cHQ[..., None, :]).to(factors).unflatten(2, (groups, -1)).flatten(3, 4)
    added_cHPN = (into_cGPQ @ b_cGNQ.transpose(-1, -2)).to(wide).view(batch, chunks, heads, width, state)
    before_cHPN, last_HPN = _hand_on(added_cHPN, run_cHQ[..., -1])
    seen_cGPQ = before_cHPN.to(factors).unflatten(2, (groups, -1)).flatten(3, 4) @ c_cGNQ
    y_cHPQ = y_cHPQ.to(wide) + seen_cGPQ.view(batch, chunks, heads, width, chunk).to(wide) * run_cHQ.exp()[..., None, :]
    return y_cHPQ.movedim(-1, 2).flatten(1, 2)[:, :tokens] + skip, last_HPN


def segment_sums(values: Tensor) -> Tensor:
    """``[…, Q]`` to ``[…, i, j]``: the sum of values j+1 … i, -inf for j > i. Summed up directly: differences of running sums lose bits."""
    size = values.shape[-1]
    below = torch.ones(size, size, device=values.device, dtype=torch.bool).tril(-1)
    sums = values[..., None].expand(*values.shape, size).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(below.transpose(0, 1), -torch.inf)


def _hand_on(added_cHPN: Tensor, decay_cH: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk and after the last one: chunk i gets what chunk j < i added, decayed by the chunks in between."""
    steps_Hc = F.pad(decay_cH.transpose(1, 2), (1, 0))
    decays_Hcc = segment_sums(steps_Hc).exp()
    start = torch.zeros_like(added_cHPN[:, :1])
    states_HcS = torch.cat([start, added_cHPN], 1).transpose(1, 2).flatten(3)
    after = (decays_Hcc @ states_HcS).unflatten(-1, added_cHPN.shape[-2:]).transpose(1, 2)
    return after[:, :-1], after[:, -1]
