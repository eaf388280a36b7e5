"""What FP8 costs an expert layer in accuracy, in plain torch: the family's own forward pass, its products rounded as FP8 GEMMs round them.

Families loop over their experts, so each product has one expert's tokens and one expert's matrix, whose scales are those of a grouped
FP8 GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..layers.fp8 import RoundedState, rounded_linear
from ..surgery import InjectClass, Patched
from ..trial import eager_forward

_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)


def round_products(module: nn.Module) -> nn.Module:
    """Makes a copy of a family's experts module multiply as `layers.fp8.rounded_linear` does. Returns the copy."""
    InjectClass(module, _Rounded, RoundedState()).do()
    return module


class _Rounded(Patched):
    def forward(self, *args, **kwargs):
        with _RoundedProducts():
            return eager_forward(self)(self, *args, **kwargs)


class _RoundedProducts(TorchFunctionMode):
    """While this is entered, ``F.linear`` and products of matrices round their operands."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not (func is F.linear or func in _PRODUCTS) or args[0].numel() == 0:  # an expert without tokens has no scale
            return func(*args, **kwargs)
        if func is F.linear:
            return rounded_linear(*args, **kwargs)
        x, matrix = args
        if matrix.ndim == 2:
            return rounded_linear(x, matrix.mT)
        return torch.stack([rounded_linear(*pair) for pair in zip(x, matrix.mT, strict=True)])
