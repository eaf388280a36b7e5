"""Transformer Engine's RMS norm as a backend."""

from __future__ import annotations

import torch
import transformer_engine.pytorch  # noqa: F401  (loads the extension)
import transformer_engine_torch as te
from transformer_engine.pytorch.constants import TE_DType

from ..once import once_differentiable
from .norm import NormSpec


def te_norm(x: torch.Tensor, weight: torch.Tensor, spec: NormSpec, gate: None = None) -> torch.Tensor:
    """As `reference_norm`, for norms with a weight and without gate; everything in fp32, rounded once at the end."""
    return _Norm.apply(x, weight, spec)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, spec):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # The library wants one dtype.
        y, _, rstd = te.rmsnorm_fwd(rows, weight.to(x.dtype), spec.eps, None, None, TE_DType[x.dtype], 0, bool(spec.offset))
        ctx.spec = spec
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, rstd = ctx.saved_tensors
        dx, dw = te.rmsnorm_bwd(dy.reshape(rows.shape).contiguous(), rows, rstd, weight.to(rows.dtype), 0, bool(ctx.spec.offset))
        return dx.view(dy.shape), dw.to(weight.dtype), None
