"""The gated delta rule in torch: each token first fades the state, then corrects what the state holds for its key.

B sequences, T tokens, H value heads, K and V the widths of keys and values, c chunks of Q tokens. Inside a chunk the corrections of all
tokens are one triangular system; only the state ``[K, V]`` goes from chunk to chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ssd_scan import segment_sums

#: What the families add to a squared norm before its root.
NORM_EPS = 1e-6


def reference_delta_scan(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """``S ← exp(g) S;  S ← S + k βᵀ(v - Sᵀk);  o = Sᵀ q / √K``, with keys and queries of unit length.

    Args:
        q_BTGK, k_BTGK: each of the G heads serves H/G value heads that lie side by side.
        v_BTHV: the values.
        g_BTH: log decay, at most 0.
        beta_BTH: how much of the correction is made.
        chunk: Q.

    Returns:
        o ``[B, T, H, V]`` in the dtype of `q`, the last state ``[B, H, K, V]`` in fp32 or wider.
    """
    tokens, heads = v_BTHV.shape[1:3]
    wide = torch.promote_types(q_BTGK.dtype, torch.float32)
    chunk = min(chunk, tokens)
    chunks, rest = -(-tokens // chunk), -tokens % chunk

    def cut(rows: Tensor) -> Tensor:
        """``[B, T, heads, …]`` to ``[B, heads, c, Q, …]``; what is past the end is 0 and changes nothing."""
        rows = F.pad(rows.to(wide), (0, 0) * (rows.ndim - 2) + (0, rest))
        return rows.unflatten(1, (chunks, chunk)).movedim(3, 1)

    q, k = (_unit(cut(rows)).repeat_interleave(heads // rows.shape[2], dim=1) for rows in (q_BTGK, k_BTGK))
    v, g, beta = cut(v_BTHV), cut(g_BTH), cut(beta_BTH)[..., None]
    q = q * q.shape[-1] ** -0.5
    run = g.cumsum(-1)[..., None].exp()
    pairs = segment_sums(g).exp()
    left = pairs[..., -1, :, None]

    system = (k * beta @ k.transpose(-1, -2)) * pairs
    solved = torch.linalg.solve_triangular(system, torch.cat([v * beta, k * (beta * run)], -1), upper=False, unitriangular=True)
    values, reads = solved.split([v.shape[-1], k.shape[-1]], -1)

    into = (k * left).transpose(-1, -2)
    state, before, written = torch.zeros_like(into[:, :, 0] @ values[:, :, 0]), [], []
    for i in range(chunks):
        before.append(state)
        written.append(values[:, :, i] - (reads[:, :, i] @ state))
        state = state * run[:, :, i, -1:] + (into[:, :, i] @ written[-1])
    o = (q * run @ torch.stack(before, 2)) + ((q @ k.transpose(-1, -2)) * pairs) @ torch.stack(written, 2)
    return o.movedim(1, 3).flatten(1, 2)[:, :tokens].to(q_BTGK.dtype), state


def _unit(rows: Tensor) -> Tensor:
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + NORM_EPS)
