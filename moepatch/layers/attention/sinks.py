"""Sinks around any kernel that returns the log-sum-exp of its scores.

A sink is one more logit in the softmax whose weight is dropped. With ``lse' = logaddexp(lse, sink)`` the result is
``out' = out * exp(lse - lse')``. The kernel's own backward, called with ``out'`` and ``lse'``, is exact: it recomputes the weights as
``exp(scores - lse')`` and takes ``delta = sum(dout' * out')`` from what it is given. What is left is ``dsink = -sum(exp(sink - lse') * delta)``.
A kernel that does all this itself is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...once import once_differentiable
from .kernel import How, Raw
from .sink_kernels import rescale_, sink_gradient


def attend(raw: Raw, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The kernel's forward pass, with ``how.sinks`` if there are any; the log-sum-exp includes them."""
    out, lse, rest = raw.forward(q, k, v, how)
    if how.sinks is None or raw.own_sinks:
        return out, lse, rest
    with_sink = torch.empty_like(lse)
    rescale_(raw.by_head(out), raw.lse_by_head(lse), how.sinks, raw.lse_by_head(with_sink))
    return out, with_sink, rest


def attend_backward(
    raw: Raw, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple, how: How, wants_sinks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and, if asked for, of ``how.sinks``; from what `attend` returned."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    if raw.own_sinks:
        # The log-sum-exp includes them: without their own gradient nothing has to be known about them.
        grads = raw.backward(grad, q, k, v, out, lse, rest, how if wants_sinks else how._replace(sinks=None))
        return grads if wants_sinks else (*grads, None)
    grad_sinks = sink_gradient(raw.by_head(grad), raw.by_head(out), raw.lse_by_head(lse), how.sinks) if wants_sinks else None
    return *raw.backward(grad, q, k, v, out, lse, rest, how), grad_sinks


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, raw: Raw, how: How) -> Tensor:
        out, lse, rest = attend(raw, q, k, v, how)
        ctx.save_for_backward(q, k, v, out, lse, sinks_H, how.cu_seqlens, *rest)
        # Tensors stay with autograd, which knows when to let go of them.
        ctx.raw, ctx.how = raw, how._replace(sinks=None, cu_seqlens=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, sinks_H, cu_seqlens, *rest = ctx.saved_tensors
        how = ctx.how._replace(sinks=sinks_H, cu_seqlens=cu_seqlens)
        return *attend_backward(ctx.raw, grad, q, k, v, out, lse, tuple(rest), how, ctx.needs_input_grad[3]), None, None


def with_sinks(raw: Raw, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """The kernel's attention with ``how.sinks``, in the kernel's own layout; differentiable in q, k, v and the sinks."""
    return _SinkAttention.apply(q, k, v, how.sinks, raw, how)
