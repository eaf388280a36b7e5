"""Heads of multi-head latent attention straight from their projections: one Triton kernel each way.

The reference is `layers.latent_heads.reference_latent`; sizes are named there. The forward turns the rotated part of the queries, in place
where it may, and writes the keys; values stay a view of their projection. The backward writes the gradient of keys and values as one matrix,
and sums that of the key that all heads share in fp32, always in the same order. Arithmetic is fp32 with one rounding at the end.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layers.latent_heads import TURNS, LatentHeads
from .launch import Prepared

try:  # Everything that only asks needs no Triton.
    import triton

    from .latent_jit import backward_kernel, forward_kernel
except ImportError:
    triton = None

#: Rows of a program are so many that the widest part of a head is as many numbers, but not more than this; warps.
_NUMBERS, _MOST_ROWS, _WARPS = 4096, 64, 4


@functools.lru_cache(maxsize=256)
def _rows(spec: LatentHeads) -> int:
    """The rows of a program."""
    return min(max(1, _NUMBERS // triton.next_power_of_2(max(spec.nope, spec.value_dim, spec.rope_dim))), _MOST_ROWS)


@functools.lru_cache(maxsize=256)
def _constants(spec: LatentHeads, step: int) -> dict:
    """What both kernels have in common, for tables whose columns are `step` apart."""
    turn, half = TURNS.get(spec.rope), spec.rope_dim // 2
    return dict(
        HEADS=spec.heads, N=spec.nope, N2=triton.next_power_of_2(spec.nope), V=spec.value_dim, R2=half,
        HALF=max(triton.next_power_of_2(half), 8), STEP=step, SECOND=half * step if turn is not None and turn.whole else 0,
        ROPE=turn is not None, PAIRS_IN=turn is not None and turn.pairs_in, PAIRS_OUT=turn is not None and turn.pairs_out,
        SCALE=spec.q_scale, ROWS=_rows(spec), num_warps=_WARPS,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _forward(spec: LatentHeads, step: int, inplace: bool) -> Prepared:
    return Prepared(forward_kernel, QUERIES=_changes_queries(spec), INPLACE=inplace, **_constants(spec, step))


@functools.lru_cache(maxsize=256)
def _backward(spec: LatentHeads, step: int, queries: bool) -> Prepared:
    widths = dict(HEADS2=triton.next_power_of_2(spec.heads), V2=triton.next_power_of_2(spec.value_dim))
    return Prepared(backward_kernel, QUERIES=queries, **widths, **_constants(spec, step))


def _changes_queries(spec: LatentHeads) -> bool:
    return spec.rope != "none" or spec.q_scale != 1.0


def latent_forward(q: Tensor, kv: Tensor, shared: Tensor, spec: LatentHeads, cos, sin, owned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, S, H, …]``; see `reference_latent`. Values are a view of `kv`, and queries of `q` if it is `owned`."""
    batch, sequence, _ = q.shape
    tokens, heads, dim = batch * sequence, spec.heads, spec.head_dim
    q, kv, shared = q.contiguous(), kv.contiguous(), _even(shared)
    q_out = q if owned or not _changes_queries(spec) else torch.empty_like(q)
    k = torch.empty(batch, sequence, heads, dim, dtype=kv.dtype, device=kv.device)
    if tokens:
        _forward(spec, _step(cos), q_out is q)(
            (-(-tokens * heads // _rows(spec)),),
            q, kv, shared, cos, sin, q_out, k, tokens, sequence, shared.stride(1), *_table_strides(cos, sin),
        )  # fmt: skip
    width = spec.nope + spec.value_dim
    strides = (sequence * heads * width, heads * width, width, 1)
    v = kv.as_strided((batch, sequence, heads, spec.value_dim), strides, kv.storage_offset() + spec.nope)
    return q_out.view(batch, sequence, heads, dim), k, v


def latent_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, spec: LatentHeads, cos, sin, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `kv` and `shared`.

    Args:
        dq, dk, dv: of what `latent_forward` returns, of any strides.
        dtypes: of the results.
    """
    batch, sequence, heads, dim = dq.shape
    tokens = batch * sequence
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    queries = _changes_queries(spec) or not dq.is_contiguous() or dq.dtype is not dtypes[0]
    dkv = torch.empty(batch, sequence, heads * (spec.nope + spec.value_dim), dtype=dtypes[1], device=dq.device)
    dshared = torch.empty(batch, sequence, spec.rope_dim, dtype=dtypes[2], device=dq.device)
    dq_out = torch.empty(batch, sequence, heads * dim, dtype=dtypes[0], device=dq.device) if queries else dq.view(batch, sequence, -1)
    if tokens:
        (q_batch, q_row, q_head, _), (k_batch, k_row, k_head, _), (v_batch, v_row, v_head, _) = dq.stride(), dk.stride(), dv.stride()
        _backward(spec, _step(cos), queries)(
            (tokens + -(-tokens * heads // _rows(spec)),),
            dq, dk, dv, cos, sin, dq_out, dkv, dshared, tokens, sequence, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head,
            v_row, *_table_strides(cos, sin),
        )  # fmt: skip
    return dq_out, dkv, dshared


def _even(x: Tensor) -> Tensor:
    """``[B, S, R]`` whose rows lie evenly, one number beside the other."""
    return x if x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


def _step(table: Tensor | None) -> int:
    return 1 if table is None else table.stride(-1)


def _table_strides(cos, sin) -> tuple[int, int, int, int]:
    if cos is None:
        return 0, 0, 0, 0
    many = cos.shape[0] > 1
    return cos.stride(0) if many else 0, cos.stride(1), sin.stride(0) if many else 0, sin.stride(1)
