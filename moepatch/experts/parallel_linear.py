"""A linear layer per expert over rows that the family has already sorted: ``forward(rows [R, in], rows_per_expert [E])``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from ..layout.experts import Weight
from ..once import once_differentiable
from ..registry import compute
from ..surgery import Patched
from .gemm import rows_times, weight_gradient


@dataclass(frozen=True, kw_only=True)
class ParallelLinearSpec:
    """E matrices in one parameter.

    Attributes:
        num_experts: E.
        in_features, out_features: widths.
        weight: where the matrices lie; canonical is ``[E, out, in]``.
        counts: the form in which the family gives the number of rows of each expert.
    """

    num_experts: int
    in_features: int
    out_features: int
    weight: Weight
    counts: Literal["list", "tensor"]

    def resized(self, sizes: Mapping[int, int]) -> ParallelLinearSpec:
        """The same at other sizes."""
        return replace(
            self,
            num_experts=sizes.get(self.num_experts, self.num_experts),
            in_features=sizes.get(self.in_features, self.in_features),
            out_features=sizes.get(self.out_features, self.out_features),
        )

    @property
    def params_per_expert(self) -> int:
        """Weights of one expert."""
        return self.in_features * self.out_features

    def describe(self) -> str:
        """One line."""
        return f"E={self.num_experts} in={self.in_features} out={self.out_features}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"num_experts": self.num_experts, "in_features": self.in_features, "out_features": self.out_features, "layout": "3-D, one linear" + (", transposed" if self.weight.ops else "")}


@dataclass(frozen=True)
class ParallelLinearState:
    """What the patched module needs to know."""

    spec: ParallelLinearSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedParallelLinear(Patched):
    """``y_r = W_e @ x_r`` for rows sorted by expert.

    Args of the call:
        inputs: rows ``[R, in]``.
        expert_size: how many rows each expert has: E integers in a list or a tensor.
    """

    _moepatch: ParallelLinearState

    def forward(self, inputs: Tensor, expert_size: Sequence[int] | Tensor) -> Tensor:
        weight = self._moepatch.spec.weight.canonical(self)
        dtype = autocast_dtype(inputs.device) or weight.dtype
        run = compute("parallel_linear", self._moepatch.backend)
        return run(inputs.to(dtype), weight.to(dtype), expert_size)


def reference_linear(x_RA: Tensor, w_EBA: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """One product per expert."""
    counts = counts.tolist() if isinstance(counts, Tensor) else counts
    return torch.cat([x @ w.T for x, w in zip(x_RA.split(list(counts)), w_EBA, strict=True)])


def grouped_linear(x_RA: Tensor, w_EBA: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """All experts in one grouped GEMM."""
    offs_E = torch.as_tensor(counts, device=x_RA.device).cumsum(0).to(torch.int32)
    return _GroupedLinear.apply(x_RA, w_EBA, offs_E)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RA, w_EBA, offs_E):
        ctx.save_for_backward(x_RA, w_EBA, offs_E)
        return rows_times(x_RA, w_EBA, offs_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RB):
        x_RA, w_EBA, offs_E = ctx.saved_tensors
        needs_x, needs_w, _ = ctx.needs_input_grad
        grad_RB = grad_RB.contiguous()
        grad_x = rows_times(grad_RB, w_EBA.transpose(1, 2), offs_E) if needs_x else None
        return grad_x, weight_gradient(grad_RB, x_RA, w_EBA, offs_E) if needs_w else None, None
