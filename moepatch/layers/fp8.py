"""What FP8 costs in accuracy, in plain torch: linear layers whose operands are rounded as an FP8 GEMM rounds them.

Every operand of a GEMM gets one scale, that of its largest number: E4M3 for tokens and weights, E5M2 for gradients. Sums are exact. A
backend that computes in FP8 is compared with the family's own code over such layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..once import once_differentiable
from ..surgery import InjectClass, Patched


def rounded(x: Tensor, fp8: torch.dtype) -> Tensor:
    """The numbers of `x` as FP8 keeps them with one scale, in the dtype of `x`.

    >>> rounded(torch.tensor([448.0, 17.2]), torch.float8_e4m3fn).tolist()
    [448.0, 18.0]
    """
    scale = torch.finfo(fp8).max / x.detach().abs().amax().float().clamp(min=1e-30)
    return (x.float().mul(scale).to(fp8).float() / scale).to(x.dtype)


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with the rounding of three FP8 GEMMs: the product and both of its gradients."""
    return _RoundedLinear.apply(x, weight, bias)


def round_linear_layers(module: nn.Module) -> nn.Module:
    """Makes every ``nn.Linear`` in a copy of a module (or the copy itself) compute as `rounded_linear`. Returns the copy."""
    for child in list(module.modules()):
        if type(child) is nn.Linear:
            InjectClass(child, _Rounded, RoundedState()).do()
    return module


@dataclass(frozen=True)
class RoundedState:
    """Of a module whose products are rounded; there is nothing to know."""

    def __str__(self) -> str:
        return "rounded to FP8"


class _Rounded(Patched):
    def forward(self, x):
        return rounded_linear(x, self.weight, self.bias)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        d_bias = dy.flatten(0, -2).sum(0) if ctx.biased else None
        dy = rounded(dy, torch.float8_e5m2)
        return dy @ weight, dy.flatten(0, -2).t() @ x.flatten(0, -2), d_bias
