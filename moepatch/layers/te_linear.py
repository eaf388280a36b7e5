"""Linear layers and MLPs as FP8 GEMMs of Transformer Engine, over weights that stay what they are.

Tokens, weights and gradients are rounded at every call with a scale of their own (current scaling: E4M3, gradients E5M2), so there is no
state beside the weights: checkpoints, recomputation and sharding see nothing of it. Between forward and backward the library keeps the
rounded tokens and the rounded weights, one byte a number. T tokens, K and N the widths of a layer, H hidden, I intermediate.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ..kernels.gated import gated_backward, gated_backward_reference, gated_forward, gated_forward_reference
from ..layout.adjacent import joined, joint_linear
from ..once import once_differentiable
from .mlp import MlpSpec, MlpWeights

#: FP8 GEMMs want every width, and for the weights' gradients the number of tokens, divisible by this.
MULTIPLE = 16


def te_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """Several linear layers over one input as one FP8 GEMM, with gradients to every weight; arguments as `layout.adjacent.joint_linear`.

    Fewer tokens than the GEMM is made for (decoding) are multiplied without rounding: there the time goes into reading the weights, and
    rounding would read them once more.

    Args:
        x: ``[..., K]``.
        weights: ``[N, K]`` each, in the dtype of `x`; K and the sum of N divisible by 16.
        biases: ``[N]`` each, or none.

    Returns:
        ``[..., ΣN]`` in the dtype of `x`.
    """
    x_TK = x.reshape(-1, x.shape[-1])
    count = x_TK.shape[0]
    if count < MULTIPLE:
        return joint_linear(x, weights, biases)
    missing = -count % MULTIPLE
    if missing:  # zeros change no scale and no sum
        x_TK = F.pad(x_TK, (0, 0, 0, missing))
    tensors = {"weight": _beside(weights)}
    if biases:
        tensors["bias"] = _beside(biases)
    rows, width = tensors["weight"].shape
    with _fp8():
        y_TN = functional_call(_stand_in(width, rows, bool(biases)), tensors, (x_TK,))
    # Taking all rows would cost a copy in the backward pass.
    return (y_TN[:count] if missing else y_TN).view(*x.shape[:-1], rows)


def te_mlp(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec) -> Tensor:
    """``y [T, H]`` of an MLP: two FP8 GEMMs forward, the activation between them in the dtype of the weights."""
    pre = te_linear(x_TH, weights.inputs, weights.biases)
    return te_linear(_Between.apply(pre, spec), (weights.down,), () if weights.down_bias is None else (weights.down_bias,))


def _fp8():
    from transformer_engine.pytorch import autocast

    return autocast(enabled=True, recipe=_recipe())


@functools.cache
def _recipe():
    from transformer_engine.common.recipe import Float8CurrentScaling

    return Float8CurrentScaling()


@functools.cache
def _stand_in(in_features: int, out_features: int, bias: bool):
    """The library's layer of one shape, without memory: its weights are those of the call, and scales are made anew at each."""
    from transformer_engine.pytorch import Linear

    return Linear(in_features, out_features, bias=bias, device="meta")


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else _Beside.apply(*tensors)


class _Beside(torch.autograd.Function):
    """`layout.adjacent.joined` with gradients, which are slices of one buffer."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.rows = [t.shape[0] for t in tensors]
        return joined(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.split(ctx.rows)


class _Between(torch.autograd.Function):
    """The activation, computed from the pre-activation alone in the backward pass."""

    @staticmethod
    def forward(ctx, pre, spec: MlpSpec):
        ctx.spec = spec
        ctx.save_for_backward(pre)
        forward = gated_forward if pre.is_cuda else gated_forward_reference
        return forward(pre, spec.activation, spec.joint_form, up_first=spec.up_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_TI):
        (pre,), spec = ctx.saved_tensors, ctx.spec
        backward = gated_backward if pre.is_cuda else gated_backward_reference
        return backward(pre, dh_TI.contiguous(), spec.activation, spec.joint_form, want_h=False, up_first=spec.up_first)[0], None
