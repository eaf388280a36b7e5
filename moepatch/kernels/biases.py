"""The biases of experts over rows sorted by expert: Triton kernels, each beside its torch reference.

T tokens, R rows, E experts, B a width. Rows from ``ends[E]`` on are nobody's: they are neither read nor written. Sums are in fp32 (or wider).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import block_of, wide
from .launch import launch
from .jit import jit
from .routes import Routing, launches, most_programs, wide_type

try:  # The references and everything that only asks need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def add_bias_(y_RB: Tensor, bias_EB: Tensor, routing: Routing) -> Tensor:
    """Adds to each row its expert's bias, in place."""
    rows, width = y_RB.shape
    if rows == 0 or not launches(y_RB):
        return add_bias_reference_(y_RB, bias_EB, routing)
    launch(
        _bias_kernel, (min(rows, most_programs(y_RB.device)),),
        y_RB, bias_EB.contiguous(), routing.expert_R, routing.ends,
        WIDE=wide(y_RB), E=routing.ends.numel() - 1, B=width, BLOCK=block_of(width), num_warps=4,
    )  # fmt: skip
    return y_RB


def add_bias_reference_(y_RB: Tensor, bias_EB: Tensor, routing: Routing) -> Tensor:
    """See `add_bias_`."""
    return y_RB.add_(bias_EB.index_select(0, routing.expert_R.clamp(max=bias_EB.shape[0] - 1)))


@jit()
def _bias_kernel(y_RB, bias_EB, expert_R, ends, WIDE: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.load(ends + E)
    row = tl.program_id(0)
    while row < rows:
        expert = tl.load(expert_R + row).to(tl.int64)
        at = tl.multiple_of(row.to(tl.int64) * B, 16 if B % 16 == 0 else 1)
        for b in range(0, B, BLOCK):
            column = b + tl.arange(0, BLOCK)
            y = tl.load(y_RB + at + column, mask=column < B, other=0).to(WIDE)
            y += tl.load(bias_EB + expert * B + column, mask=column < B, other=0).to(WIDE)
            tl.store(y_RB + at + column, y.to(y_RB.dtype.element_ty), mask=column < B)
        row += tl.num_programs(0)


def sum_groups(g: Tensor, routing: Routing, *, of_tokens: bool, scaled: bool, dtype: torch.dtype) -> Tensor:
    """``[E, B]``: for each expert the sum over its rows, 0 without any: a bias gradient.

    Args:
        g: rows ``[R, B]``, or tokens ``[T, B]`` whose rows are meant.
        of_tokens: which of the two.
        scaled: each row counts times its routing weight.
        dtype: of the result.
    """
    experts, width = routing.ends.numel() - 1, g.shape[1]
    if routing.token_R.numel() == 0 or not launches(g):
        return sum_groups_reference(g, routing, of_tokens=of_tokens, scaled=scaled, dtype=dtype)
    sums_EB = g.new_empty(experts, width, dtype=dtype)
    launch(
        _sums_kernel, (experts, triton.cdiv(width, 128)),
        g.contiguous(), routing.token_R, routing.weights_R, routing.ends, sums_EB,
        INDEXED=of_tokens, SCALED=scaled, WIDE=wide(g), B=width, ROWS=32, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return sums_EB


def sum_groups_reference(g: Tensor, routing: Routing, *, of_tokens: bool, scaled: bool, dtype: torch.dtype) -> Tensor:
    """See `sum_groups`."""
    g_RB = (g.index_select(0, routing.token_R) if of_tokens else g).to(wide_type(g.dtype))
    if scaled:
        g_RB = g_RB * routing.weights_R.unsqueeze(1)
    sums = g_RB.new_zeros(routing.ends.numel(), g.shape[1])  # the last for sentinels
    return sums.index_add_(0, routing.expert_R, g_RB)[:-1].to(dtype)


@jit()
def _sums_kernel(
    g, token_R, weights_R, ends, sums_EB,
    INDEXED: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, end = tl.load(ends + expert), tl.load(ends + expert + 1)
    total = tl.zeros([ROWS, BLOCK], dtype=WIDE)
    while at < end:
        row = at + tl.arange(0, ROWS)
        source = row.to(tl.int64)
        if INDEXED:
            source = tl.load(token_R + row, mask=row < end, other=0).to(tl.int64)
        x = tl.load(g + source[:, None] * B + column[None, :], mask=(row < end)[:, None] & (column < B)[None, :], other=0).to(WIDE)
        if SCALED:
            x *= tl.load(weights_R + row, mask=row < end, other=0).to(WIDE)[:, None]
        total += x
        at += ROWS
    tl.store(sums_EB + expert.to(tl.int64) * B + column, tl.sum(total, 0).to(sums_EB.dtype.element_ty), mask=column < B)
