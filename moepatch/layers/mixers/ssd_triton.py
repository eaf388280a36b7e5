"""Mamba-2's convolution and recurrence by Triton kernels, as one function for autograd.

One function, because the gradients of gate, convolution and step sizes are slices of one tensor, the gradient of the input projection's
result: each is written where it belongs, and nothing is concatenated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...gpus import shared_memory
from ...kernels.conv import conv_backward, conv_forward
from ...kernels.ssd import Shape, scan_backward, scan_outputs, scan_states
from ...once import once_differentiable
from .ssd import SSDSpec, SSDWeights


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zxbcdt, conv, conv_bias, a_log, dt_bias, skip, spec, mask_BT):
        inner, end = spec.inner, spec.inner + spec.channels
        shape = Shape(
            zxbcdt.shape[0], zxbcdt.shape[1], spec.heads, spec.head_dim, spec.groups, spec.state, spec.limits, zxbcdt.dtype == torch.float32,
            shared_memory(zxbcdt.device.index),
        )  # fmt: skip
        u_BTC = conv_forward(zxbcdt[..., inner:end], conv, conv_bias, mask_BT)
        dt_BTH = zxbcdt[..., end:]
        states, last = scan_states(u_BTC, dt_BTH, a_log, dt_bias, shape)
        y = scan_outputs(u_BTC, dt_BTH, a_log, dt_bias, skip, states, shape)
        ctx.save_for_backward(zxbcdt, u_BTC, conv, conv_bias, a_log, dt_bias, skip, mask_BT)
        ctx.spec, ctx.shape = spec, shape
        ctx.set_materialize_grads(False)
        return zxbcdt[..., :inner], y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_gate, grad_y, grad_last):
        zxbcdt, u_BTC, conv, conv_bias, a_log, dt_bias, skip, mask_BT = ctx.saved_tensors
        inner, end = ctx.spec.inner, ctx.spec.inner + ctx.spec.channels
        grad = torch.empty_like(zxbcdt)
        if grad_gate is None:
            grad[..., :inner].zero_()
        else:
            grad[..., :inner].copy_(grad_gate)
        grad_y = torch.zeros((*u_BTC.shape[:2], inner), device=u_BTC.device, dtype=torch.float32) if grad_y is None else grad_y.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        grad_u, sums = scan_backward(grad_y, grad_last, u_BTC, zxbcdt[..., end:], a_log, dt_bias, skip, grad[..., end:], ctx.shape)
        into = grad[..., inner:end]
        grad_conv, grad_bias = conv_backward(grad_u, zxbcdt[..., inner:end], conv, conv_bias, mask_BT, into)
        grad_a, grad_dt_bias, grad_skip = sums.unbind(0)
        return grad, grad_conv, grad_bias, grad_a.to(a_log.dtype), grad_dt_bias.to(dt_bias.dtype), grad_skip.to(skip.dtype), None, None


def triton_ssd(zxbcdt: Tensor, weights: SSDWeights, spec: SSDSpec, mask_BT: Tensor | None, with_state: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `moepatch.layers.mixers.ssd.reference_ssd` computes; y is fp32, as in the families."""
    mask_BT = None if mask_BT is None else mask_BT.to(zxbcdt.dtype).contiguous()
    gate, y, last = _SSD.apply(zxbcdt.contiguous(), *weights, spec, mask_BT)
    return gate, y, last if with_state else None
