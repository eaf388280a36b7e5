"""The `te` and `te_fp8` backends: Transformer Engine's GEMMs, and for all that is not a GEMM the kernels of the `triton` backend.

The same passes as `fused`, and the same tensors kept for the backward pass: the tokens, which the caller holds anyway, the
pre-activation, the routing weights and the integers of the sort. In FP8 the operands are rounded anew in the backward pass instead of
being kept. The host waits for the device once in each forward pass, to learn how many rows each expert has.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kernels.biases import add_bias_, sum_groups
from ..kernels.combine import combine_rows, gather_tokens, row_dots
from ..kernels.gated import gated_backward, gated_backward_reference, gated_forward, gated_forward_reference
from ..kernels.routes import launches, route
from ..layers.te_linear import MULTIPLE
from ..needs import BF16_FP16, missing
from . import fused
from .fused import Operands, down_bias_gradient, fused_experts, keep_routing, kept_routing, operands_of
from .spec import ExpertsSpec, ExpertWeights
from .te_gemm import groups_of, rows_times, weight_gradient


def why_not(spec: ExpertsSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `registry.Backend`, in the dtype of the weights."""
    return missing(dtype, device, "transformer_engine", dtypes=BF16_FP16) or fused.why_not(spec, dtype, device)


def why_not_fp8(spec: ExpertsSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `registry.Backend`, in FP8."""
    if (reason := missing(dtype, device, capability=(8, 9)) or why_not(spec, dtype, device)) is not None or spec is None:
        return reason
    odd = [width for width in (spec.hidden, spec.intermediate) if width % MULTIPLE]
    return f"FP8 GEMMs need widths divisible by {MULTIPLE}, this has {odd[0]}" if odd else None


def te_experts(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, weights: ExpertWeights, fp8: bool = False) -> Tensor:
    """``y_TH``: every token through its experts. Same arguments and result as `reference.reference_experts`.

    Calls that torch.compile traces, and calls of nobody, go through `fused.fused_experts`.

    Args:
        fp8: GEMMs in FP8.
    """
    if torch.compiler.is_compiling() or topk_ids_TK.numel() == 0 or weights.rows == 0:
        return fused_experts(x_TH, topk_ids_TK, topk_weights_TK, weights)
    return _TeExperts.apply(x_TH, topk_weights_TK, topk_ids_TK, weights, fp8, *operands_of(weights))


#: `te_experts` in FP8.
te_fp8_experts = functools.partial(te_experts, fp8=True)


class _TeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, topk_weights_TK, topk_ids_TK, weights: ExpertWeights, fp8: bool, *tensors):
        """`tensors` are `Operands`."""
        spec, operands = weights.spec, Operands(*tensors)
        routing = route(topk_ids_TK, topk_weights_TK, spec.num_experts, weights.rows)
        groups = groups_of(routing, fp8)
        pre = rows_times(gather_tokens(x_TH, routing, scaled=spec.scale_input), operands.up, groups)
        if operands.up_bias is not None:
            add_bias_(pre, operands.up_bias, routing)
        activate = gated_forward if launches(pre) else gated_forward_reference
        h_RI = activate(pre, spec.activation, spec.layout.gate_form, rows=routing.ends[-1:])
        y_RH = rows_times(h_RI, operands.down, groups)
        y_TH, _ = combine_rows(y_RH, routing, scaled=not spec.scale_input, bias_EH=operands.down_bias)
        ctx.spec, ctx.groups, ctx.weights_dtype = spec, groups, topk_weights_TK.dtype
        keep_routing(ctx, routing, x_TH, pre, *tensors)
        return y_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        """Recomputes rows and activation; every gradient that nobody needs is left out."""
        routing, x_TH, pre, *tensors = kept_routing(ctx)
        spec, groups, operands = ctx.spec, ctx.groups, Operands(*tensors)
        needs_x, needs_weights, _, _, _, *needs = ctx.needs_input_grad
        needs = Operands(*needs)
        grad_TH = grad_TH.contiguous()

        grad_RH = gather_tokens(grad_TH, routing)
        grad_h_RI = rows_times(grad_RH, operands.down.mT, groups, of_gradients=True)
        activate = gated_backward if launches(pre) else gated_backward_reference
        grad_pre, h_RI, grad_weights_R = activate(
            pre, grad_h_RI, spec.activation, spec.layout.gate_form, want_h=needs.down,
            weights_R=None if spec.scale_input else routing.weights_R, rows=routing.ends[-1:],
        )  # fmt: skip
        del grad_h_RI
        grad_down = weight_gradient(grad_RH, h_RI, operands.down, groups) if needs.down else None
        del grad_RH, h_RI
        grad_down_bias = down_bias_gradient(grad_TH, operands, routing) if needs.down_bias else None
        if operands.down_bias is not None and needs_weights:
            grad_weights_R = grad_weights_R + row_dots(grad_TH, routing.token_R, operands.down_bias, routing.expert_R, routing)

        grad_up = grad_up_bias = grad_x_TH = grad_weights_TK = None
        if needs.up:
            grad_up = weight_gradient(grad_pre, gather_tokens(x_TH, routing, scaled=spec.scale_input), operands.up, groups)
        if needs.up_bias:
            grad_up_bias = sum_groups(grad_pre, routing, of_tokens=False, scaled=False, dtype=operands.up_bias.dtype)
        if needs_x or needs_weights:
            grad_x_RH = rows_times(grad_pre, operands.up.mT, groups, of_gradients=True)
            if spec.scale_input:
                grad_weights_R = row_dots(grad_x_RH, None, x_TH, routing.token_R, routing)
            grad_x_TH, grad_weights_TK = combine_rows(
                grad_x_RH, routing, scaled=spec.scale_input, numbers_R=grad_weights_R, numbers_dtype=ctx.weights_dtype
            )
        return grad_x_TH, grad_weights_TK, None, None, None, grad_up, grad_down, grad_up_bias, grad_down_bias
