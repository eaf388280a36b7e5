"""Norms and rotary embedding of query and key heads, straight from the joint projection: one Triton kernel each way.

The reference is `layers.rope.reference_heads`; sizes are named there. A program takes a block of tokens and a group of heads, keeps the
tables in registers and goes from head to head. Arithmetic is fp32, with one rounding at the end and, where the family has it, one before the
norm's weight. Values are not moved by the forward: they stay a view of the projection. The backward writes the gradient of the projection as
one matrix, values and gate included, and partial sums of the weights' gradients that a second small kernel adds up.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.rope import ROPES, HeadsSpec
from .launch import Prepared

try:  # Everything that only asks needs no Triton.
    import triton

    from .rope_jit import backward_kernel, forward_kernel, reduce_kernel
except ImportError:
    triton = None

_PLACES = {"head": 1, "full": 2, "after": 3}
#: Columns of the weights' gradients that one program of the reduction adds up.
_REDUCED = 16


@dataclass(frozen=True)
class _Launch:
    """What is constant for a spec and a width of the tables: the kernels, and how their grids are laid.

    Attributes:
        forward, backward, reduce: the kernels.
        full: whether all heads of a token are normed together.
        groups, backward_groups: of heads, each a program of its own.
        block: tokens of a program.
        weights: sizes of the norms' weights, of queries and keys.
        numbers: of a token's query heads, and of its key heads.
        partials: numbers that a block of tokens leaves for the gradients of the weights.
        q_rows, k_rows: rows of partial gradients for each block.
    """

    forward: Prepared
    backward: Prepared
    reduce: Prepared
    full: bool
    groups: int
    backward_groups: int
    block: int
    weights: tuple[int, int]
    numbers: tuple[int, int]
    partials: int
    q_rows: int
    k_rows: int
    eps: float


@functools.lru_cache(maxsize=256)
def _launch(spec: HeadsSpec, table: int) -> _Launch:
    rope, norm = ROPES.get(spec.rope), spec.norm
    rotated = table * rope.width if rope else spec.head_dim
    half, rest = rotated // 2, spec.head_dim - rotated
    full = norm is not None and norm.place == "full"
    shared = math.gcd(spec.heads, spec.kv_heads)
    per_program = min(4, shared & -shared)
    wide = max(triton.next_power_of_2(max(half, 1)), 16)
    rest2 = triton.next_power_of_2(rest) if rest else 0
    # A head of the block is 16 numbers a thread, 8 of each half: 16 bytes of bf16. A full norm has few programs, so its blocks are small.
    warps = 1 if full else 4
    block = triton.next_power_of_2(triton.cdiv(warps * 32 * 16, 2 * wide + rest2))
    q_groups, k_groups = (1, 1) if full else (spec.heads // per_program, spec.kv_heads // per_program)
    copies = spec.kv_heads // per_program + (spec.heads // per_program if spec.gated else 0)
    constants = dict(
        HQ=spec.heads, HK=spec.kv_heads, D=spec.head_dim, DV=spec.value_dim, Q_STEP=spec.query_step, R2=half, HALF=wide,
        REST=rest, REST2=rest2, ROPE=rope is not None,
        INTERLEAVED=rope is not None and rope.interleaved, STEP=rope.step if rope else 1,
        SECOND=0 if rope is None else half if rope.second is None else rope.second, NORM=_PLACES[norm.place] if norm else 0,
        OFFSET=norm.offset if norm else 0.0, CAST_FIRST=norm is not None and norm.cast_first, BT=block, BH=per_program,
        num_warps=warps,
    )  # fmt: skip
    numbers = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    weights = numbers if full else (spec.head_dim, spec.head_dim)
    return _Launch(
        forward=Prepared(forward_kernel, **constants),
        backward=Prepared(
            backward_kernel, DV2=triton.next_power_of_2(spec.value_dim), D2=triton.next_power_of_2(spec.head_dim), **constants
        ),
        reduce=Prepared(reduce_kernel, COLUMNS=_REDUCED, ROWS=128, num_warps=4),
        full=full,
        groups=q_groups + k_groups,
        backward_groups=q_groups + k_groups + copies,
        block=block,
        weights=weights,
        numbers=numbers,
        partials=0 if norm is None else sum(weights) if full else (q_groups + k_groups) * spec.head_dim,
        q_rows=q_groups,
        k_rows=k_groups,
        eps=norm.eps if norm else 0.0,
    )


def heads_forward(joint: Tensor, spec: HeadsSpec, q_weight, k_weight, cos, sin) -> tuple[Tensor, Tensor]:
    """``q [B, S, Hq, D]`` and ``k [B, S, Hk, D]`` of a joint projection ``[B, S, N]`` whose rows lie evenly; see `reference_heads`."""
    batch, sequence, _ = joint.shape
    tokens = batch * sequence
    laid = _launch(spec, 0 if cos is None else cos.shape[-1])
    queries, keys = laid.numbers
    out = torch.empty(tokens * (queries + keys), dtype=joint.dtype, device=joint.device)
    if tokens:
        laid.forward(
            (-(-tokens // laid.block), laid.groups),
            joint, q_weight, k_weight, cos, sin, out, tokens, sequence, joint.stride(1), *_table_strides(cos, sin), laid.eps,
        )  # fmt: skip
    d = spec.head_dim
    q = out.as_strided((batch, sequence, spec.heads, d), (sequence * queries, queries, d, 1))
    return q, out.as_strided((batch, sequence, spec.kv_heads, d), (sequence * keys, keys, d, 1), tokens * queries)


def heads_backward(
    joint: Tensor | None, spec: HeadsSpec, q_weight, k_weight, cos, sin, grads: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the joint projection and of the two weights.

    Args:
        joint: as in the forward; None without a norm.
        grads: of what `reference_heads` returns, of any strides.
    """
    dq, dk, dv, dgate = grads
    batch, _, sequence, _ = dq.shape
    tokens, laid = batch * sequence, _launch(spec, 0 if cos is None else cos.shape[-1])
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    gate_strides = (0, 0, 0)
    if dgate is not None:
        dgate = dgate if dgate.stride(-1) == 1 else dgate.contiguous()
        gate_strides = (dgate.stride(0), dgate.stride(2), dgate.stride(1))
    djoint = torch.empty(batch, sequence, sum(spec.splits), dtype=dq.dtype, device=dq.device)
    blocks = -(-tokens // laid.block)
    partial = torch.empty(blocks * laid.partials, dtype=torch.float32, device=dq.device)
    if tokens:
        laid.backward(
            (blocks, laid.backward_groups),
            joint, q_weight, k_weight, cos, sin, djoint, partial, dq, dk, dv, dgate, tokens, sequence,
            0 if joint is None else joint.stride(1), *_table_strides(cos, sin), *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            *gate_strides, laid.eps,
        )  # fmt: skip
    if spec.norm is None:
        return djoint, None, None
    return djoint, *_reduced(partial, laid, spec, blocks, q_weight.dtype)


def _reduced(partial: Tensor, laid: _Launch, spec: HeadsSpec, blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of the partial gradients: ``[blocks, Wq + Wk]`` for a full norm, else ``[groups, blocks, D]``."""
    q_width, k_width = laid.weights
    both = torch.empty(q_width + k_width, dtype=dtype, device=partial.device)
    if laid.full:
        stride, q_rows, k_rows, at, column = q_width + k_width, blocks, blocks, 0, q_width
    else:
        q_rows, k_rows = blocks * laid.q_rows, blocks * laid.k_rows
        stride, at, column = spec.head_dim, q_rows, 0
    laid.reduce((-(-max(laid.weights) // _REDUCED), 2), partial, both, stride, q_rows, k_rows, at, column, q_width, k_width)
    return both[:q_width], both[q_width:]


def _table_strides(cos, sin) -> tuple[int, int, int, int]:
    if cos is None:
        return 0, 0, 0, 0
    many = cos.shape[0] > 1
    return cos.stride(0) if many else 0, cos.stride(1), sin.stride(0) if many else 0, sin.stride(1)
