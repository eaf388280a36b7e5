"""Norms and rotary embedding of query and key heads, straight from the joint projection: one Triton kernel each way.

The reference is `layers.rope.reference_heads`; sizes are named there. A program takes a block of tokens and a group of heads, keeps the
tables in registers and goes from head to head. Arithmetic is fp32, with one rounding at the end and, where the family has it, one before the
norm's weight. Values are not moved by the forward: they stay a view of the projection. The backward writes the gradient of the projection as
one matrix, values and gate included, and partial sums of the weights' gradients that a second small kernel adds up. The usual heads have a
backward kernel of their own, of fewer programs that load ahead; see `rope_rows_jit`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.rope import ROPES, HeadsSpec
from .launch import Prepared
from .norm import multiprocessors

try:  # Everything that only asks needs no Triton.
    import triton

    from .rope_jit import backward_kernel, forward_kernel, reduce_kernel
    from .rope_rows_jit import backward_rows_kernel
except ImportError:
    triton = None

_PLACES = {"head": 1, "full": 2, "after": 3}
#: Columns of the weights' gradients that one program of the reduction adds up, rows that it loads at once, and its warps.
_REDUCED, _REDUCED_ROWS, _REDUCED_WARPS = 8, 2048, 16
#: The backward pass of the usual heads: numbers of a tile, warps, programs per multiprocessor, and steps whose loads are under way at a time.
_TILE = (4096, 8, 2, 3)
#: Offsets from here on need 64 bits.
_FAR = 2**31


@dataclass(frozen=True)
class _Launch:
    """What is constant for a spec and a width of the tables: the kernels, and how their grids are laid.

    Attributes:
        forward, turn, backward, reduce: the kernels; `turn` is the forward without a norm, in place.
        full: whether all heads of a token are normed together.
        groups, backward_groups: of heads, each a program of its own.
        block: tokens of a program.
        weights: sizes of the norms' weights, of queries and keys.
        numbers: of a token's query heads, and of its key heads.
        partials: numbers that a block of tokens leaves for the gradients of the weights.
        q_rows, k_rows: rows of partial gradients for each block.
    """

    forward: Prepared
    turn: Prepared
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
        forward=Prepared(forward_kernel, IN_PLACE=False, **constants),
        turn=Prepared(forward_kernel, IN_PLACE=True, **{**constants, "REST": 0, "REST2": 0}),
        backward=Prepared(
            backward_kernel, DV2=triton.next_power_of_2(spec.value_dim), D2=triton.next_power_of_2(spec.head_dim), **constants
        ),
        reduce=Prepared(reduce_kernel, COLUMNS=_REDUCED, ROWS=_REDUCED_ROWS, num_warps=_REDUCED_WARPS),
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


def turn_heads(joint: Tensor, spec: HeadsSpec, cos: Tensor, sin: Tensor) -> None:
    """Rotates the query and key heads of a joint projection ``[B, S, N]``, of heads without a norm, where they are."""
    batch, sequence, _ = joint.shape
    tokens = batch * sequence
    laid = _launch(spec, cos.shape[-1])
    if tokens:
        laid.turn(
            (-(-tokens // laid.block), laid.groups),
            joint, None, None, cos, sin, joint, tokens, sequence, joint.stride(1), *_table_strides(cos, sin), laid.eps,
        )  # fmt: skip


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
    if tokens and _is_usual(spec, cos):
        return djoint, *_backward_rows(joint, spec, q_weight, k_weight, cos, sin, djoint, dq, dk, dv)
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
    q_width, k_width = laid.weights
    if laid.full:
        rows = q_width + k_width, blocks, blocks, 0, q_width
    else:
        rows = spec.head_dim, blocks * laid.q_rows, blocks * laid.k_rows, blocks * laid.q_rows, 0
    return djoint, *_reduced(laid.reduce, partial, rows, laid.weights, q_weight.dtype)


def _reduced(reduce: Prepared, partial: Tensor, rows: tuple[int, ...], weights: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights' gradients from partial ones; `rows` are their stride, how many queries and keys have, and where keys' begin (row, column)."""
    q_width, k_width = weights
    both = torch.empty(q_width + k_width, dtype=dtype, device=partial.device)
    reduce((-(-max(weights) // _REDUCED), 2), partial, both, *rows, q_width, k_width)
    return both[:q_width], both[q_width:]


# --- the usual heads -----------------------------------------------------------------------------------------------------------------


def _is_usual(spec: HeadsSpec, cos: Tensor | None) -> bool:
    """Whether `rope_rows_jit` serves: each head has a norm, and all its dims are rotated after that, as two halves."""
    rope, d = ROPES.get(spec.rope), spec.head_dim
    return (
        spec.norm is not None and spec.norm.place == "head" and rope is not None and not rope.interleaved and not spec.gated
        and cos.shape[-1] * rope.width == d and d & (d - 1) == 0 and 16 <= d <= 256
    )  # fmt: skip


def _backward_rows(joint, spec: HeadsSpec, q_weight, k_weight, cos, sin, djoint, dq, dk, dv) -> tuple[Tensor, Tensor]:
    """Fills `djoint`, and returns the gradients of the weights."""
    batch, _, sequence, _ = dq.shape
    tokens, d = batch * sequence, spec.head_dim
    q_programs, k_programs, v_programs = _shares(tokens, spec, _TILE[0] // d, _TILE[2] * multiprocessors(dq.device.index))
    tables, joint_row = _table_strides(cos, sin), joint.stride(1)
    (q_batch, q_head, q_row, _), (k_batch, k_head, k_row, _), (v_batch, v_head, v_row, _) = dq.stride(), dk.stride(), dv.stride()
    # No offset from a tensor's first element is larger than this.
    reach = batch * max(q_batch, k_batch, v_batch, *tables) + sequence * max(q_row, k_row, v_row, *tables) + spec.heads * max(q_head, k_head, v_head)
    long = max(reach, tokens * joint_row) >= _FAR
    kernel, reduce = _prepared_rows(spec, batch == 1, long, _TILE, triton.next_power_of_2(q_programs))
    partial = torch.empty((q_programs + k_programs) * d, dtype=torch.float32, device=dq.device)
    kernel(
        (q_programs + k_programs + v_programs,),
        joint, q_weight, k_weight, cos, sin, djoint, partial, dq, dk, dv, tokens, sequence, q_programs, k_programs, joint_row, *tables,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, spec.norm.eps,
    )  # fmt: skip
    return _reduced(reduce, partial, (d, q_programs, k_programs, q_programs, 0), (d, d), q_weight.dtype)


@functools.lru_cache(maxsize=256)
def _prepared_rows(spec: HeadsSpec, single: bool, long: bool, tile: tuple[int, ...], reduced: int) -> tuple[Prepared, Prepared]:
    """The kernel for a tile as `_TILE`, and the one that adds up at most `reduced` rows of gradients."""
    numbers, warps, _, stages = tile
    rope, norm, d = ROPES[spec.rope], spec.norm, spec.head_dim
    kernel = Prepared(
        backward_rows_kernel, SINGLE=single, LONG=long, HQ=spec.heads, HK=spec.kv_heads, D=d, DV=spec.value_dim,
        DV2=triton.next_power_of_2(spec.value_dim), SECOND=d // 2 if rope.second is None else rope.second, OFFSET=norm.offset,
        CAST_FIRST=norm.cast_first, ROWS=numbers // d, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return kernel, Prepared(reduce_kernel, COLUMNS=_REDUCED, ROWS=reduced, num_warps=8)


@functools.lru_cache(maxsize=4096)
def _shares(tokens: int, spec: HeadsSpec, rows: int, most: int) -> tuple[int, int, int]:
    """Programs for queries, keys and values, at most `most` with tiles of `rows`: by the bytes that they move, so that all end at one time."""
    most = max(most, 4)
    queries, keys = (-(-tokens * heads // rows) for heads in (spec.heads, spec.kv_heads))
    treated, copied = 3 * spec.head_dim, 2 * spec.value_dim
    steps = max(1, (queries * treated + keys * (treated + copied)) // (treated * most))
    while True:
        programs = -(-queries // steps), -(-keys // steps), -(-keys // max(1, steps * treated // copied))
        if sum(programs) <= most:
            return programs
        steps += 1


def _table_strides(cos, sin) -> tuple[int, int, int, int]:
    if cos is None:
        return 0, 0, 0, 0
    many = cos.shape[0] > 1
    return cos.stride(0) if many else 0, cos.stride(1), sin.stride(0) if many else 0, sin.stride(1)
