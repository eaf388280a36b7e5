"""Moving rows between tokens and experts: Triton kernels, each beside its torch reference.

T tokens, K experts per token, R rows sorted by expert, E experts, H or B a width. Rows from ``ends[E]`` on are nobody's: they are neither
read nor written, so what a function returns for them is undefined. Sums are in fp32 (or wider) and rounded once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import launch
from .jit import jit
from .routes import Routing, launches, most_programs, wide_type

try:  # The references and everything that only asks need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@functools.cache
def block_of(width: int) -> int:
    """Columns per step: those that leave the shortest tail, of which 4 warps move 16 or 32 bytes a thread."""
    return min((2048, 1024), key=lambda block: -(-width // block) * block) if width > 1024 else triton.next_power_of_2(width)


def wide(x: Tensor):
    """Triton's fp32, or wider if `x` is."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


# --- gather --------------------------------------------------------------------------------------------------------------------------


def gather_tokens(x_TH: Tensor, routing: Routing, scaled: bool = False) -> Tensor:
    """``x_RH``: each row's token; times the row's routing weight if `scaled`."""
    rows, width = routing.token_R.numel(), x_TH.shape[1]
    if rows == 0 or not launches(x_TH):
        return gather_tokens_reference(x_TH, routing, scaled)
    x_TH = x_TH.contiguous()
    x_RH = x_TH.new_empty(rows, width)
    launch(
        _gather_kernel, (min(rows, most_programs(x_TH.device)),),
        x_TH, routing.token_R, routing.weights_R, routing.ends, x_RH,
        SCALED=scaled, E=routing.ends.numel() - 1, H=width, BLOCK=block_of(width), num_warps=4,
    )  # fmt: skip
    return x_RH


def gather_tokens_reference(x_TH: Tensor, routing: Routing, scaled: bool = False) -> Tensor:
    """See `gather_tokens`."""
    x_RH = x_TH.index_select(0, routing.token_R)
    return (x_RH * routing.weights_R.unsqueeze(1)).to(x_TH.dtype) if scaled else x_RH


@jit()
def _gather_kernel(
    x_TH, token_R, weights_R, ends, x_RH, SCALED: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.load(ends + E)
    row = tl.program_id(0)
    while row < rows:  # a range would be plain integers in Triton's interpreter
        token = tl.load(token_R + row).to(tl.int64)
        read, write = tl.multiple_of(token * H, 16 if H % 16 == 0 else 1), tl.multiple_of(row.to(tl.int64) * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            x = tl.load(x_TH + read + column, mask=column < H, other=0)
            if SCALED:
                weight = tl.load(weights_R + row)
                x = (x.to(weight.dtype) * weight).to(x_RH.dtype.element_ty)
            tl.store(x_RH + write + column, x, mask=column < H)
        row += tl.num_programs(0)


# --- combine -------------------------------------------------------------------------------------------------------------------------


def combine_rows(
    y_RH: Tensor,
    routing: Routing,
    *,
    scaled: bool = False,
    bias_EH: Tensor | None = None,
    numbers_R: Tensor | None = None,
    numbers_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y_TH``: for each token the sum of its rows, and ``numbers_TK``: for each slot its row's number, 0 for a sentinel.

    Args:
        y_RH: the rows.
        scaled: each row counts times its routing weight.
        bias_EH: if given, each row's expert adds its bias, times the row's routing weight.
        numbers_R: if given, one number for each row; or ``[R, P]``, the parts of one.
        numbers_dtype: of ``numbers_TK``.
    """
    top_k, width = routing.top_k, y_RH.shape[1]
    tokens = routing.row_S.numel() // top_k
    if y_RH.shape[0] == 0 or not launches(y_RH):
        return combine_rows_reference(y_RH, routing, scaled=scaled, bias_EH=bias_EH, numbers_R=numbers_R, numbers_dtype=numbers_dtype)
    y_TH = y_RH.new_empty(tokens, width)
    numbers_TK = None if numbers_R is None else y_RH.new_empty(tokens, top_k, dtype=numbers_dtype)
    launch(
        _combine_kernel, (min(tokens, most_programs(y_RH.device)),),
        y_RH, routing.row_S, routing.ends, routing.weights_R, routing.expert_R, bias_EH, numbers_R, y_TH, numbers_TK, tokens,
        SCALED=scaled, BIAS=bias_EH is not None, WIDE=wide(y_RH),
        PARTS=0 if numbers_R is None else numbers_R.numel() // y_RH.shape[0],
        E=routing.ends.numel() - 1, H=width, K=top_k, BLOCK=block_of(width), num_warps=4,
    )  # fmt: skip
    return y_TH, numbers_TK


def combine_rows_reference(
    y_RH: Tensor,
    routing: Routing,
    *,
    scaled: bool = False,
    bias_EH: Tensor | None = None,
    numbers_R: Tensor | None = None,
    numbers_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `combine_rows`."""
    shape = (routing.row_S.numel() // routing.top_k, routing.top_k)
    if y_RH.shape[0] == 0:
        return y_RH.new_zeros(shape[0], y_RH.shape[1]), None if numbers_R is None else y_RH.new_zeros(shape, dtype=numbers_dtype)
    row_S, nobody_S = routing.row_S.clamp(max=y_RH.shape[0] - 1), routing.row_S >= routing.ends[-1]
    y_SH = y_RH.index_select(0, row_S).to(wide_type(y_RH.dtype))
    weights_S1 = routing.weights_R.index_select(0, row_S).unsqueeze(1)
    if scaled:
        y_SH = y_SH * weights_S1
    if bias_EH is not None:
        expert_S = routing.expert_R.index_select(0, row_S).clamp(max=bias_EH.shape[0] - 1)
        y_SH = y_SH + bias_EH.index_select(0, expert_S) * weights_S1
    y_TH = y_SH.masked_fill(nobody_S.unsqueeze(1), 0).view(*shape, -1).sum(1).to(y_RH.dtype)
    if numbers_R is None:
        return y_TH, None
    numbers_S = numbers_R.view(y_RH.shape[0], -1).sum(1).index_select(0, row_S)
    return y_TH, numbers_S.masked_fill(nobody_S, 0).view(shape).to(numbers_dtype)


@jit(do_not_specialize=["tokens"])
def _combine_kernel(
    y_RH, row_S, ends, weights_R, expert_R, bias_EH, numbers_R, y_TH, numbers_TK, tokens,
    SCALED: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.load(ends + E)
    token = tl.program_id(0)
    while token < tokens:
        slot = token.to(tl.int64) * K
        write = tl.multiple_of(token.to(tl.int64) * H, 16 if H % 16 == 0 else 1)
        if PARTS:
            for k in tl.static_range(K):
                row = tl.load(row_S + slot + k)
                number = tl.load(numbers_R + row.to(tl.int64) * PARTS, mask=row < rows, other=0)
                for part in tl.static_range(1, PARTS):
                    number += tl.load(numbers_R + row.to(tl.int64) * PARTS + part, mask=row < rows, other=0)
                tl.store(numbers_TK + slot + k, number.to(numbers_TK.dtype.element_ty))
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], dtype=WIDE)
            for k in tl.static_range(K):
                row = tl.load(row_S + slot + k)
                here = (column < H) & (row < rows)
                read = tl.multiple_of(row.to(tl.int64) * H, 16 if H % 16 == 0 else 1)
                y = tl.load(y_RH + read + column, mask=here, other=0).to(WIDE)
                if SCALED or BIAS:
                    weight = tl.load(weights_R + row, mask=row < rows, other=0).to(WIDE)
                if SCALED:
                    y *= weight
                if BIAS:
                    expert = tl.load(expert_R + row, mask=row < rows, other=0).to(tl.int64)
                    y += weight * tl.load(bias_EH + expert * H + column, mask=here, other=0).to(WIDE)
                total += y
            tl.store(y_TH + write + column, total.to(y_TH.dtype.element_ty), mask=column < H)
        token += tl.num_programs(0)


# --- dots ----------------------------------------------------------------------------------------------------------------------------


def row_dots(a: Tensor, a_row_R: Tensor | None, b: Tensor, b_row_R: Tensor, routing: Routing) -> Tensor:
    """``dot_R``: for each row the product of a row of `a` and a row of `b`, in fp32.

    Args:
        a, b: matrices of one width.
        a_row_R, b_row_R: which of their rows; None for the row itself.
    """
    if routing.token_R.numel() == 0 or not launches(a):
        return row_dots_reference(a, a_row_R, b, b_row_R, routing)
    a, b, (rows, width) = a.contiguous(), b.contiguous(), (routing.token_R.numel(), a.shape[1])
    dot_R = a.new_empty(rows, dtype=wide_type(a.dtype))
    launch(
        _dots_kernel, (min(rows, most_programs(a.device)),),
        a, a_row_R, b, b_row_R, routing.ends, dot_R,
        INDEXED=a_row_R is not None, WIDE=wide(a), E=routing.ends.numel() - 1, H=width, BLOCK=block_of(width), num_warps=4,
    )  # fmt: skip
    return dot_R


def row_dots_reference(a: Tensor, a_row_R: Tensor | None, b: Tensor, b_row_R: Tensor, routing: Routing) -> Tensor:
    """See `row_dots`."""
    rows = a if a_row_R is None else a.index_select(0, a_row_R)
    others = b.index_select(0, b_row_R.clamp(max=b.shape[0] - 1))  # a sentinel's expert is E
    return (rows.to(wide_type(a.dtype)) * others.to(wide_type(a.dtype))).sum(1)


@jit()
def _dots_kernel(
    a, a_row_R, b, b_row_R, ends, dot_R, INDEXED: tl.constexpr, WIDE: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.load(ends + E)
    row = tl.program_id(0)
    while row < rows:
        a_row = row.to(tl.int64)
        if INDEXED:
            a_row = tl.load(a_row_R + row).to(tl.int64)
        b_row = tl.load(b_row_R + row).to(tl.int64)
        total = tl.zeros([BLOCK], dtype=WIDE)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            x = tl.load(a + a_row * H + column, mask=column < H, other=0).to(WIDE)
            total += x * tl.load(b + b_row * H + column, mask=column < H, other=0).to(WIDE)
        tl.store(dot_R + row, tl.sum(total, 0))
        row += tl.num_programs(0)
