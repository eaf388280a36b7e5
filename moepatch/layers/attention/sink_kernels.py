"""The pass over an attention's result that sinks cost, forward and backward: Triton kernels, each beside its torch reference.

B batch, H heads, S positions, D head dim. Results are ``[B, H, S, D]`` with any strides but 1 along D, for kernels lay them out differently;
the two log-sum-exps ``[B, H, S]`` have the same strides.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...kernels.launch import Prepared

try:  # The references need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_ROWS = 64


def rescale_(out_BHSD: Tensor, lse_BHS: Tensor, sinks_H: Tensor, with_sink_BHS: Tensor) -> None:
    """Lets sinks take their share: ``with_sink := logaddexp(lse, sink)``, and in place ``out := out * exp(lse - with_sink)``."""
    (rescale_on_device if out_BHSD.is_cuda else _rescale_reference)(out_BHSD, lse_BHS, sinks_H, with_sink_BHS)


def sink_gradient(grad_BHSD: Tensor, out_BHSD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """The gradient of the sinks, from the rescaled result and log-sum-exp. Sums in a fixed order."""
    return (gradient_on_device if out_BHSD.is_cuda else _gradient_reference)(grad_BHSD, out_BHSD, lse_BHS, sinks_H)


@functools.cache
def _prepared(backward: bool, dim: int) -> Prepared:
    return Prepared(_gradient_kernel if backward else _rescale_kernel, D=dim, DIM=triton.next_power_of_2(dim), ROWS=_ROWS, num_warps=4)


def rescale_on_device(out_BHSD: Tensor, lse_BHS: Tensor, sinks_H: Tensor, with_sink_BHS: Tensor) -> None:
    """`rescale_` in Triton."""
    batch, heads, length, dim = out_BHSD.shape
    grid = -(-length // _ROWS), heads, batch
    _prepared(False, dim)(grid, out_BHSD, lse_BHS, sinks_H, with_sink_BHS, length, *out_BHSD.stride()[:3], *lse_BHS.stride())


def gradient_on_device(grad_BHSD: Tensor, out_BHSD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """`sink_gradient` in Triton."""
    batch, heads, length, dim = out_BHSD.shape
    blocks = -(-length // _ROWS)
    parts_HN = torch.empty(heads, batch * blocks, device=out_BHSD.device, dtype=torch.float32)
    strides = *grad_BHSD.stride()[:3], *out_BHSD.stride()[:3], *lse_BHS.stride()
    _prepared(True, dim)((blocks, heads, batch), grad_BHSD, out_BHSD, lse_BHS, sinks_H, parts_HN, length, *strides)
    return parts_HN.sum(1).to(sinks_H.dtype)


def _rescale_reference(out_BHSD: Tensor, lse_BHS: Tensor, sinks_H: Tensor, with_sink_BHS: Tensor) -> None:
    with_sink_BHS.copy_(torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[None, :, None]))
    out_BHSD.copy_(out_BHSD * (lse_BHS - with_sink_BHS).exp().unsqueeze(-1))


def _gradient_reference(grad_BHSD: Tensor, out_BHSD: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    delta_BHS = (grad_BHSD.to(lse_BHS.dtype) * out_BHSD.to(lse_BHS.dtype)).sum(-1)
    weight_BHS = (sinks_H.to(lse_BHS.dtype)[None, :, None] - lse_BHS).exp()
    return -(weight_BHS * delta_BHS).sum((0, 2)).to(sinks_H.dtype)


if triton is not None:

    @triton.jit
    def _rescale_kernel(
        out_BHSD, lse_BHS, sinks_H, with_sink_BHS, length,
        out_b, out_h, out_s, lse_b, lse_h, lse_s,
        D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        dims = tl.arange(0, DIM)
        sink = tl.load(sinks_H + head).to(tl.float32)
        lse_at = batch * lse_b + head * lse_h + rows * lse_s
        lse = tl.load(lse_BHS + lse_at, mask=rows < length, other=0.0)
        # softplus(sink - lse), which does not overflow; its exponential is the share that the keys keep.
        over = sink - lse
        shift = tl.maximum(over, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(over)))
        # Not in place: several threads load the same element, and one of them may be late.
        tl.store(with_sink_BHS + lse_at, lse + shift, mask=rows < length)
        at = out_BHSD + batch * out_b + head * out_h + rows.to(tl.int64)[:, None] * out_s + dims[None, :]
        inside = (rows[:, None] < length) & (dims[None, :] < D)
        out = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (out * tl.exp(-shift)[:, None]).to(out_BHSD.dtype.element_ty), mask=inside)

    @triton.jit
    def _gradient_kernel(
        grad_BHSD, out_BHSD, lse_BHS, sinks_H, parts_HN, length,
        grad_b, grad_h, grad_s, out_b, out_h, out_s, lse_b, lse_h, lse_s,
        D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        dims = tl.arange(0, DIM)
        wide = rows.to(tl.int64)[:, None]
        inside = (rows[:, None] < length) & (dims[None, :] < D)
        grad = tl.load(grad_BHSD + batch * grad_b + head * grad_h + wide * grad_s + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        out = tl.load(out_BHSD + batch * out_b + head * out_h + wide * out_s + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        lse = tl.load(lse_BHS + batch * lse_b + head * lse_h + rows * lse_s, mask=rows < length, other=float("inf"))
        weight = tl.exp(tl.load(sinks_H + head).to(tl.float32) - lse)
        part = -tl.sum(weight * tl.sum(grad * out, axis=1))
        blocks = tl.num_programs(0)
        tl.store(parts_HN + (head * tl.num_programs(2) + tl.program_id(2)) * blocks + tl.program_id(0), part)
