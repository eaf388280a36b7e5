"""The three grouped products of an expert layer, on torch's grouped GEMM where it serves and a loop where it does not.

Rows are sorted by expert and ``offs_E`` (int32) holds the end of each group. Rows past ``offs_E[-1]`` belong to no expert: they are
neither read nor written, so their results are undefined and callers must not use them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..gpus import capability_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16  # bytes, of torch's grouped GEMM


@functools.cache
def why_not_grouped(dtype: torch.dtype, widths: tuple[int, ...], device: torch.device) -> str | None:
    """None if torch's grouped GEMM takes these matrices, else the reason in words.

    Args:
        dtype: of activations and weights.
        widths: every matrix width that becomes a stride (H, I, 2I).
        device: where it would run.
    """
    name = str(dtype).removeprefix("torch.")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm (2.10 or newer has)"
    if dtype not in _DTYPES:
        return f"torch's grouped GEMM has no {name}"
    odd = [w for w in widths if w * dtype.itemsize % _ALIGNMENT]
    if odd:
        return f"torch's grouped GEMM wants widths divisible by {_ALIGNMENT // dtype.itemsize} in {name}, this has {odd[0]}"
    if device.type == "cuda" and (here := capability_of(device)) < (8, 0):
        major, minor = here
        return f"torch's grouped GEMM needs compute capability 8.0, this is {major}.{minor}"
    return None


def rows_times(x_RA: Tensor, w_EBA: Tensor, offs_E: Tensor) -> Tensor:
    """``y_RB``: each row times its expert's matrix, ``y_r = W_e @ x_r``.

    Args:
        x_RA: rows ``[R, A]``.
        w_EBA: matrices ``[E, B, A]``; a transposed view costs nothing.
        offs_E: group ends.
    """
    if _grouped(x_RA, w_EBA):
        return torch.nn.functional.grouped_mm(x_RA, w_EBA.transpose(1, 2), offs=offs_E)
    return _rows_times_loop(x_RA, w_EBA, offs_E)


def outer_sums(y_RB: Tensor, x_RA: Tensor, offs_E: Tensor) -> Tensor:
    """``g_EBA``: for each expert the sum of ``y_r x_r^T`` over its rows: a weight gradient. Exactly 0 for an expert without rows."""
    if _grouped(y_RB, x_RA):
        return torch.nn.functional.grouped_mm(y_RB.T, x_RA, offs=offs_E)
    return _outer_sums_loop(y_RB, x_RA, offs_E)


def weight_gradient(grad_RB: Tensor, x_RA: Tensor, weight_EBA: Tensor, offs_E: Tensor) -> Tensor:
    """``dL/dW [E, B, A]`` with the memory order of the weight, so that autograd keeps it without a copy."""
    if weight_EBA.stride(-1) == 1:
        return outer_sums(grad_RB, x_RA, offs_E)
    return outer_sums(x_RA, grad_RB, offs_E).transpose(1, 2)


def _grouped(a: Tensor, b: Tensor) -> bool:
    # Without rows there is nothing to multiply, and the kernels do not agree on empty operands.
    # What torch.compile knows of the grouped GEMM is its bf16 form alone.
    return (
        a.shape[0] > 0
        and (a.dtype == torch.bfloat16 or not torch.compiler.is_compiling())
        and why_not_grouped(a.dtype, (a.shape[-1], *b.shape[1:]), a.device) is None
    )


# The loops wait for the device. They are custom operators so that torch.compile can step over them.


@torch.library.custom_op("moepatch::rows_times_loop", mutates_args=())
def _rows_times_loop(x_RA: Tensor, w_EBA: Tensor, offs_E: Tensor) -> Tensor:
    y_RB = x_RA.new_zeros(x_RA.shape[0], w_EBA.shape[1])
    for expert, start, end in _groups(offs_E):
        y_RB[start:end] = x_RA[start:end] @ w_EBA[expert].T
    return y_RB


@_rows_times_loop.register_fake
def _(x_RA, w_EBA, offs_E):
    return x_RA.new_empty(x_RA.shape[0], w_EBA.shape[1])


@torch.library.custom_op("moepatch::outer_sums_loop", mutates_args=())
def _outer_sums_loop(y_RB: Tensor, x_RA: Tensor, offs_E: Tensor) -> Tensor:
    g_EBA = x_RA.new_zeros(offs_E.numel(), y_RB.shape[1], x_RA.shape[1])
    for expert, start, end in _groups(offs_E):
        g_EBA[expert] = y_RB[start:end].T @ x_RA[start:end]
    return g_EBA


@_outer_sums_loop.register_fake
def _(y_RB, x_RA, offs_E):
    return x_RA.new_empty(offs_E.numel(), y_RB.shape[1], x_RA.shape[1])


def _groups(offs_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert that has rows, with its range."""
    start = 0
    for expert, end in enumerate(offs_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end
