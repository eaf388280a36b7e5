"""Attention with torch's own operations: any mask, any dtype, any device, with weights if they are asked for.

It is what every kernel is measured against, and what computes what a kernel does not serve: a cache, odd masks, dropout, fp32, the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...autocast import autocast_dtype
from ...needs import BF16_FP16
from .masks import Mask
from .spec import CAUSAL, FULL


def sdpa_attention(q_BHSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: Tensor | None, *, scale: float, causal: bool, dropout: float) -> Tensor:
    """`scaled_dot_product_attention` with G key heads for H query heads, ``[B, S, H, Dv]``; torch picks the kernel.

    Args:
        q_BHSD, k_BGKD, v_BGKD: S queries, K keys.
        mask: boolean or additive, broadcast to ``[B, H, S, K]``; None with `causal` where S = K, or for one query that sees all. By a boolean one
            a query that sees no key gets 0.
    """
    batch, heads, length, _ = q_BHSD.shape
    groups = heads // k_BGKD.shape[1]
    native = groups > 1 and mask is None and k_BGKD.shape[-1] == v_BGKD.shape[-1] <= 256
    if groups > 1 and not native:
        if length == 1 and (mask is None or mask.shape[1] == 1):
            q_BHSD = q_BHSD.reshape(batch, heads // groups, groups, -1)  # the queries of a key head as if they were positions
        else:
            k_BGKD, v_BGKD = repeat_heads(k_BGKD, groups), repeat_heads(v_BGKD, groups)
    causal = causal and mask is None and length > 1
    if mask is not None and length > 1 and _wants_efficient(q_BHSD, v_BGKD, mask):
        out = _efficient(q_BHSD, k_BGKD, v_BGKD, mask, dropout, scale)
    else:
        out = F.scaled_dot_product_attention(q_BHSD, k_BGKD, v_BGKD, mask, dropout, causal, scale=scale, enable_gqa=native)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous()


def _wants_efficient(q: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether torch would give a masked call to cuDNN, as on Hopper from cuDNN 9.15 on: its gradients were NaN for queries without keys, and others wrong."""
    low = q.is_cuda and q.dtype in BF16_FP16 and torch.version.hip is None and autocast_dtype(q.device) is None
    return low and mask.dtype == torch.bool and q.shape[-1] % 8 == v.shape[-1] % 8 == 0


def _efficient(q_BHSD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor, dropout: float, scale: float) -> Tensor:
    """Torch's memory-efficient attention by its own operator, ``[B, H, S, Dv]``; a choice by `torch.nn.attention.sdpa_kernel` is one for all threads."""
    seeing = mask.any(-1, keepdim=True)
    keys = mask.shape[-1]
    # Rows of the bias lie as far apart as its loads want. A query that sees no key sees all, and its result is dropped.
    bias = q_BHSD.new_zeros(*mask.shape[:-1], -(-keys // 8) * 8)[..., :keys].masked_fill_(~mask & seeing, float("-inf"))
    bias = bias.expand(*q_BHSD.shape[:3], keys)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BHSD, k_BHKD, v_BHKD))
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q_BHSD, k_BHKD, v_BHKD, bias, wanted, dropout, False, scale=scale)[0]
    return out.masked_fill(~seeing, 0)


def plain_attention(
    q_BHSD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Written out: ``dropout(softmax(cap(q k^T * scale) + bias + mask, sink)) v``, the softmax in fp32 or wider.

    Args:
        mask: boolean, or additive; None: every query sees every key. A query that sees none looks at all of them alike, as in `eager`.
        causal: without a mask, a query sees no key after its own position.
        sinks_H: a logit for each head that takes part in the softmax and is dropped after it.

    Returns:
        The result ``[B, S, H, Dv]`` and the weights ``[B, H, S, K]``, as a family's own eager function returns them.
    """
    groups = q_BHSD.shape[1] // k_BGKD.shape[1]
    scores = torch.matmul(q_BHSD, repeat_heads(k_BGKD, groups).transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is None and causal:
        mask = lower_triangle(q_BHSD.shape[2], k_BGKD.shape[2], q_BHSD.device)
    if mask is not None:
        # The least number and not -inf, which would give NaN in rows without any key.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = F.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v_BGKD.dtype)
    weights = weights if sinks_H is None else weights[..., :-1]
    weights = F.dropout(weights, dropout) if dropout else weights
    return torch.matmul(weights, repeat_heads(v_BGKD, groups)).transpose(1, 2).contiguous(), weights


def repeat_heads(x_BGKD: Tensor, times: int) -> Tensor:
    """Every head `times` in a row, ``[B, G*times, K, D]``."""
    if times == 1:
        return x_BGKD
    batch, heads, length, dim = x_BGKD.shape
    return x_BGKD.unsqueeze(2).expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)


def dense_mask(mask: Mask | Tensor | None, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor | None, bool]:
    """What the functions above need: a dense mask or None, and whether causality is left to the kernel.

    Args:
        mask: as an attention function gets it.
        q, k: for their lengths.
        causal: what a module says of itself; used where there is no mask.
    """
    if isinstance(mask, Mask):
        if not mask.packed and mask.window in (CAUSAL, FULL):
            return None, mask.window == CAUSAL
        return mask.dense(), False
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and causal and 1 < queries < keys:
        return lower_triangle(queries, keys, q.device), False
    return mask, mask is None and causal and queries > 1


def lower_triangle(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean ``[1, 1, S, K]``: the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def with_borders(mask: Tensor | None, cu_seqlens: Tensor, length: int, causal: bool) -> Tensor:
    """A mask ``[1, 1, S, S]`` that also keeps sequences apart which lie end to end in one row; no waiting for the device."""
    segment_S = torch.bucketize(torch.arange(length, device=cu_seqlens.device), cu_seqlens[1:], right=True)
    same = (segment_S[:, None] == segment_S[None, :])[None, None]
    return (same.tril() if causal else same) if mask is None else same & mask
