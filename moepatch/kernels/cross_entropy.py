"""Cross-entropy of rows of logits and its gradient in their place: a Triton kernel beside its torch reference.

C rows of a chunk, V vocabulary. The arithmetic is in fp32 whatever the logits are in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .jit import jit
from .launch import launch

try:  # The references need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None

#: A thread has 8 neighbouring numbers of each of so many slices of a step: loads in flight, and one rescaling of its sum for all of them.
_SLICES = 4
_WARPS = 16
#: Rows should begin at multiples of so many numbers.
ALIGNMENT = 16


def cross_entropy_rows(z_CV: Tensor, labels_C: Tensor, loss_C: Tensor, divisor: Tensor | None, formula, *, grads: bool) -> None:
    """Losses of rows into `loss_C`, not divided; gradients in the place of the logits.

    Args:
        z_CV: what the head returned, rows contiguous; overwritten by ``d loss / d z`` if `grads`.
        labels_C: int64. A row whose label is `formula.ignore_index` has loss and gradient 0; any other label outside of V makes it nan.
        loss_C: fp32.
        divisor: a number on the device that gradients are divided by, or None.
        formula: a `layers.loss.chunked.Formula`.
        grads: False leaves `z_CV` as it is.
    """
    if triton is None or not z_CV.is_cuda or z_CV.dtype == torch.float64:
        return cross_entropy_rows_reference(z_CV, labels_C, loss_C, divisor, formula, grads=grads)
    launch_rows(z_CV, labels_C, loss_C, divisor, formula, grads=grads)


def cross_entropy_rows_reference(z_CV: Tensor, labels_C: Tensor, loss_C: Tensor, divisor: Tensor | None, formula, *, grads: bool) -> None:
    """See `cross_entropy_rows`."""
    counts_C = labels_C != formula.ignore_index
    index_C1 = labels_C.where(counts_C, 0).unsqueeze(1)
    y_CV = z_CV.to(loss_C.dtype) * formula.scale
    slope = formula.scale
    if formula.softcap is not None:
        tanh_CV = torch.tanh(y_CV / formula.softcap)
        y_CV, slope = tanh_CV * formula.softcap, (1 - tanh_CV * tanh_CV) * formula.scale
    log_p_CV = torch.log_softmax(y_CV, 1)
    loss_C.copy_(torch.where(counts_C, -log_p_CV.gather(1, index_C1).squeeze(1), 0))
    if grads:
        grad_CV = log_p_CV.exp_()
        grad_CV.scatter_add_(1, index_C1, grad_CV.new_full((), -1).expand_as(index_C1))
        grad_CV = grad_CV * slope if divisor is None else grad_CV * slope / divisor
        z_CV.copy_(torch.where(counts_C.unsqueeze(1), grad_CV, 0))


def launch_rows(z_CV: Tensor, labels_C: Tensor, loss_C: Tensor, divisor: Tensor | None, formula, *, grads: bool) -> None:
    """The kernel, see `cross_entropy_rows`."""
    rows, vocab = z_CV.shape
    if rows == 0:
        return
    block, warps = row_block(vocab)
    # What lies between a row's end and the next row's begin may be overwritten: so vectors need not be taken apart at the end.
    width = min(z_CV.stride(0), -(-vocab // ALIGNMENT) * ALIGNMENT)
    launch(_rows_kernel, (rows,),
        z_CV, labels_C, loss_C, divisor, z_CV.stride(0), formula.ignore_index, float(formula.scale), float(formula.softcap or 1.0),
        V=vocab, WIDTH=width, DIVIDE=divisor is not None, CAP=formula.softcap is not None, GRADS=grads, SLICES=_SLICES, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def row_block(vocab: int) -> tuple[int, int]:
    """Columns of a slice and warps: 16 bytes a thread in bf16, fewer threads where a row is short."""
    warps = _WARPS
    while warps > 4 and warps * 256 * _SLICES > vocab:
        warps //= 2
    return warps * 256, warps


@jit(do_not_specialize=["ignore_index"])
def _rows_kernel(
    z_CV, labels_C, loss_C, divisor, stride, ignore_index, scale, softcap,
    V: tl.constexpr, WIDTH: tl.constexpr, DIVIDE: tl.constexpr, CAP: tl.constexpr, GRADS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    STEP: tl.constexpr = SLICES * BLOCK
    row = tl.program_id(0).to(tl.int64)
    begin = z_CV + row * stride
    column = tl.arange(0, SLICES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    label = tl.load(labels_C + row)
    if label == ignore_index:
        tl.store(loss_C + row, 0.0)
        if GRADS:
            nothing = tl.zeros((SLICES, BLOCK), z_CV.dtype.element_ty)
            for at in range(0, V, STEP):
                tl.store(begin + at + column, nothing, mask=at + column < WIDTH)
        return

    # Logits are held times log2(e), so that exp is exp2. Each lane has its own maximum: a step needs no word from other lanes.
    factor = scale * LOG2E
    mine = (label >= 0) & (label < V)
    y_label = _logit(tl.load(begin + label, mask=mine, other=float("nan")).to(tl.float32), factor, softcap, CAP)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, V, STEP):
        y = _logit(tl.load(begin + at + column, mask=at + column < WIDTH, other=0.0).to(tl.float32), factor, softcap, CAP)
        y = tl.where(at + column < V, y, -1e30)
        higher = tl.maximum(top, tl.max(y, 0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(y - higher[None, :]), 0)
        top = higher
    highest = tl.max(top, 0)
    lse = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    tl.store(loss_C + row, (lse - y_label) / LOG2E)

    if GRADS:
        slope = scale
        if DIVIDE:
            slope = scale / tl.load(divisor).to(tl.float32)
        LAST: tl.constexpr = (V - 1) // STEP * STEP
        for done in range(0, V, STEP):  # from the end, which was read last: it is still in a cache
            at = LAST - done
            here = at + column < WIDTH
            y = _logit(tl.load(begin + at + column, mask=here, other=0.0).to(tl.float32), factor, softcap, CAP)
            grad = (tl.exp2(y - lse) - tl.where(at + column == label, 1.0, 0.0)) * slope
            if CAP:
                tanh = y / (softcap * LOG2E)
                grad = grad * (1 - tanh * tanh)
            if WIDTH != V:
                grad = tl.where(at + column < V, grad, 0.0)
            tl.store(begin + at + column, grad.to(z_CV.dtype.element_ty), mask=here)


@jit()
def _logit(z, factor, softcap, CAP: tl.constexpr):
    """``y·log2(e)``."""
    if CAP:
        y = (1 - 2 / (tl.exp2(z * (2 * factor / softcap)) + 1)) * (softcap * 1.4426950408889634)
    else:
        y = z * factor
    return y


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """``x *= factor``; on CUDA nothing is read or written where the factor is 1 but for rounding, which the host does not know.

    Args:
        x: dense.
        factor: a scalar on the same device.
    """
    if triton is None or not x.is_cuda or not x.is_contiguous():
        x.mul_(factor)
    else:
        launch_scale(x, factor)


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """The kernel, see `scale_in_place`."""
    if x.numel():
        launch(_scale_kernel, (min(triton.cdiv(x.numel(), 4096), 1056),), x, factor, x.numel(), BLOCK=4096, num_warps=8)


@jit()
def _scale_kernel(x, factor, N, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if tl.abs(by - 1) < 1e-6:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK
    while at < N:
        index = at + tl.arange(0, BLOCK)
        value = tl.load(x + index, mask=index < N).to(tl.float32) * by
        tl.store(x + index, value.to(x.dtype.element_ty), mask=index < N)
        at += tl.num_programs(0) * BLOCK
