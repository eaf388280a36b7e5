"""Sinks around any kernel that returns the log-sum-exp of its scores.

A sink is one more logit in the softmax whose weight is dropped. With ``lse' = logaddexp(lse, sink)`` the result is
``out' = out * exp(lse - lse')``. The kernel's own backward, called with ``out'`` and ``lse'``, is exact: it recomputes the weights as
``exp(scores - lse')`` and takes ``delta = sum(dout' * out')`` from what it is given. What is left is ``dsink = -sum(exp(sink - lse') * delta)``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import How
from .sink_kernels import rescale_, sink_gradient


class Raw(Protocol):
    """A kernel's two passes, without autograd."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """The result, the log-sum-exp and what else the backward pass needs."""

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple, how: How) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""

    def by_head(self, out: Tensor) -> Tensor:
        """A view ``[B, H, S, D]`` of a result, whatever the kernel's layout."""

    def lse_by_head(self, lse: Tensor) -> Tensor:
        """A view ``[B, H, S]`` of a log-sum-exp."""


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, raw: Raw, how: How) -> Tensor:
        out, lse, rest = raw.forward(q, k, v, how)
        with_sink = torch.empty_like(lse)
        rescale_(raw.by_head(out), raw.lse_by_head(lse), sinks_H, raw.lse_by_head(with_sink))
        ctx.save_for_backward(q, k, v, out, with_sink, sinks_H, how.cu_seqlens, *rest)
        # Tensors stay with autograd, which knows when to let go of them.
        ctx.raw, ctx.how = raw, how._replace(sinks=None, cu_seqlens=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, sinks_H, cu_seqlens, *rest = ctx.saved_tensors
        raw, how = ctx.raw, ctx.how._replace(cu_seqlens=cu_seqlens)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            grad_sinks = sink_gradient(raw.by_head(grad), raw.by_head(out), raw.lse_by_head(lse), sinks_H)
        return *raw.backward(grad, q, k, v, out, lse, tuple(rest), how), grad_sinks, None, None


def with_sinks(raw: Raw, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """The kernel's attention with ``how.sinks``, in the kernel's own layout; differentiable in q, k, v and the sinks."""
    return _SinkAttention.apply(q, k, v, how.sinks, raw, how)
