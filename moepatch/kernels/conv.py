"""The short causal convolution of state-space and linear-attention layers, with its SiLU: each channel by itself, over time.

``y[t] = silu(bias + Σ_k weight[k] · x[t - K + 1 + k])``, and 0 where the mask is. B sequences of T tokens, C channels, K taps. The rows of
`x` may lie apart (a slice of a wider projection), so nothing is copied or transposed first. Each kernel beside its torch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

try:  # The reference needs no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from ..once import once_differentiable
from .jit import jit

_ROWS, _CHANNELS = 32, 128


def reference_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, mask_BT: Tensor | None = None) -> Tensor:
    """The same in torch, differentiable: `F.conv1d` in the weight's precision, then SiLU.

    Args:
        x_BTC: the input.
        weight_CK: the taps of each channel, the last for the token itself.
        bias_C: or None.
        mask_BT: multiplies what comes out, 0 for padding; None without padding.
    """
    channels, taps = weight_CK.shape
    x_BCT = x_BTC.transpose(1, 2).to(weight_CK.dtype)
    y_BCT = F.silu(F.conv1d(x_BCT, weight_CK.unsqueeze(1), bias_C, padding=taps - 1, groups=channels)[..., : x_BTC.shape[1]])
    y_BTC = y_BCT.transpose(1, 2).to(x_BTC.dtype)
    return y_BTC if mask_BT is None else y_BTC * mask_BT[..., None]


def conv_forward(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, mask_BT: Tensor | None) -> Tensor:
    """What `reference_conv` computes, contiguous, in one launch. No gradients of its own."""
    batch, tokens, channels = x_BTC.shape
    y_BTC = torch.empty((batch, tokens, channels), dtype=x_BTC.dtype, device=x_BTC.device)
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(tokens, _ROWS), batch)
    _forward_kernel[grid](
        x_BTC, weight_CK, bias_C, mask_BT, y_BTC, tokens, channels, x_BTC.stride(0), x_BTC.stride(1), weight_CK.stride(0),
        K=weight_CK.shape[1], BIAS=bias_C is not None, MASK=mask_BT is not None, ROWS=_ROWS, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return y_BTC


def conv_backward(
    grad_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, mask_BT: Tensor | None, into_BTC: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `conv_forward`; the pre-activation is computed again.

    Args:
        grad_BTC: contiguous.
        x_BTC, weight_CK, bias_C, mask_BT: as in the forward.
        into_BTC: receives the gradient of `x_BTC`; its rows may lie apart.

    Returns:
        The gradients of weight and bias, in their dtypes.
    """
    batch, tokens, channels = x_BTC.shape
    taps = weight_CK.shape[1]
    blocks = triton.cdiv(tokens, _ROWS)
    # One partial sum per block of rows, added up afterwards in a fixed order: taps first, the bias last.
    partial = torch.empty((batch * blocks, taps + 1, channels), dtype=torch.float32, device=x_BTC.device)
    _backward_kernel[triton.cdiv(channels, _CHANNELS), blocks, batch](
        grad_BTC, x_BTC, weight_CK, bias_C, mask_BT, into_BTC, partial, tokens, channels,
        x_BTC.stride(0), x_BTC.stride(1), weight_CK.stride(0), into_BTC.stride(0), into_BTC.stride(1),
        K=taps, BIAS=bias_C is not None, MASK=mask_BT is not None, ROWS=_ROWS, CHANNELS=_CHANNELS,
    )  # fmt: skip
    sums = partial.sum(0)
    return sums[:taps].t().to(weight_CK.dtype), None if bias_C is None else sums[taps].to(bias_C.dtype)


class CausalConv(torch.autograd.Function):
    """`conv_forward` with its gradients."""

    @staticmethod
    def forward(ctx, x_BTC, weight_CK, bias_C, mask_BT):
        """See `conv_forward`."""
        ctx.save_for_backward(x_BTC, weight_CK, bias_C, mask_BT)
        return conv_forward(x_BTC, weight_CK, bias_C, mask_BT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTC):
        """See `conv_backward`."""
        x_BTC, weight_CK, bias_C, mask_BT = ctx.saved_tensors
        grad_x_BTC = torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
        grad_weight, grad_bias = conv_backward(grad_BTC.contiguous(), x_BTC, weight_CK, bias_C, mask_BT, grad_x_BTC)
        return grad_x_BTC, grad_weight, grad_bias, None


def causal_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, mask_BT: Tensor | None = None) -> Tensor:
    """`reference_conv` by Triton kernels, differentiable."""
    return CausalConv.apply(x_BTC, weight_CK, bias_C, mask_BT)


@jit()
def _pre(x, weight, bias, t, c, tokens, live, stride_t, stride_w, K: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The convolution before its activation for rows `t` and channels `c`; `x` points to the sequence."""
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    if BIAS:
        acc += tl.load(bias + c, mask=live, other=0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        row = t - (K - 1) + k
        inside = ((row >= 0) & (row < tokens))[:, None] & live[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * stride_t + c[None, :], mask=inside, other=0).to(tl.float32)
        acc += value * tl.load(weight + c * stride_w + k, mask=live, other=0).to(tl.float32)[None, :]
    return acc


@jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x, weight, bias, mask, y, tokens, channels, stride_b, stride_t, stride_w,
    K: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    live = c < channels
    pre = _pre(x + b * stride_b, weight, bias, t, c, tokens, live, stride_t, stride_w, K, BIAS, ROWS, CHANNELS)
    out = pre / (1 + tl.exp(-pre))
    if MASK:
        out *= tl.load(mask + b * tokens + t, mask=t < tokens, other=0).to(tl.float32)[:, None]
    at = (b * tokens + t)[:, None] * channels + c[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & live[None, :])


@jit(do_not_specialize=["tokens"])
def _backward_kernel(
    grad, x, weight, bias, mask, into, partial, tokens, channels, stride_b, stride_t, stride_w, stride_into_b, stride_into_t,
    K: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    live = c < channels
    x += b * stride_b
    sums = partial + (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * channels + c
    into_acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    # Token t feeds the outputs of tokens t … t+K-1; the taps of those are computed again rather than stored.
    for ahead in tl.static_range(K):
        row = t + ahead
        inside = (row < tokens)[:, None] & live[None, :]
        pre = _pre(x, weight, bias, row, c, tokens, live, stride_t, stride_w, K, BIAS, ROWS, CHANNELS)
        up = tl.load(grad + (b * tokens + row)[:, None] * channels + c[None, :], mask=inside, other=0).to(tl.float32)
        if MASK:
            up *= tl.load(mask + b * tokens + row, mask=row < tokens, other=0).to(tl.float32)[:, None]
        gate = 1 / (1 + tl.exp(-pre))
        up *= gate * (1 + pre * (1 - gate))
        into_acc += up * tl.load(weight + c * stride_w + (K - 1 - ahead), mask=live, other=0).to(tl.float32)[None, :]
        if ahead == 0:
            tl.store(sums + K * channels, tl.sum(up, 0), mask=live)
            for k in tl.static_range(K):
                tap = t - (K - 1) + k
                seen = ((tap >= 0) & (tap < tokens))[:, None] & live[None, :]
                value = tl.load(x + tap[:, None].to(tl.int64) * stride_t + c[None, :], mask=seen, other=0).to(tl.float32)
                tl.store(sums + k * channels, tl.sum(up * value, 0), mask=live)
    at = into + b * stride_into_b + t[:, None].to(tl.int64) * stride_into_t + c[None, :]
    tl.store(at, into_acc.to(into.dtype.element_ty), mask=(t < tokens)[:, None] & live[None, :])
