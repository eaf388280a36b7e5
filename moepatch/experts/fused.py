"""The `triton` backend: torch's grouped GEMMs, and one kernel for each pass over rows that stands between them.

Forward: sort, gather, up, activation, down, weighted sum. Kept for the backward pass: the tokens ``x_TH`` (which the caller holds anyway), the
pre-activation, the routing weights and the integers of the sort. The routing weight is multiplied in where rows are summed; its gradient is
``<h, dL/d(weight*h)>``, which the activation's backward has at hand. Rows of sentinels are neither computed nor read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import gated
from ..kernels.biases import add_bias_, sum_groups
from ..kernels.combine import combine_rows, gather_tokens, row_dots
from ..kernels.requirements import why_not_triton
from ..kernels.routes import Routing, launches, route
from ..once import once_differentiable
from .gemm import rows_times, weight_gradient, why_not_grouped
from .grouped import grouped_experts
from .shrink import cut_later
from .spec import ExpertsSpec, ExpertWeights


class Operands(NamedTuple):
    """Tensors of one experts module as GEMM operands: views ``[E, out, in]`` and biases ``[E, out]`` or None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


class Gemms(Protocol):
    """The products of one call's rows, sorted by expert, with their experts' matrices. Rows of nobody are undefined."""

    def rows_times(self, x_RA: Tensor, w_EBA: Tensor, *, of_gradients: bool = False) -> Tensor:
        """``y_RB``: each row times its expert's matrix; `of_gradients` says that the rows are gradients."""

    def weight_gradient(self, grad_RB: Tensor, x_RA: Tensor, weight_EBA: Tensor) -> Tensor:
        """``dL/dW [E, B, A]``; exactly 0 for an expert without rows."""


class TorchGemms(NamedTuple):
    """Torch's grouped GEMMs, which read on the device where an expert's rows end."""

    offs_E: Tensor

    @classmethod
    def of(cls, routing: Routing) -> TorchGemms:
        """For the rows of a call."""
        return cls(routing.offs_E)

    def rows_times(self, x_RA: Tensor, w_EBA: Tensor, *, of_gradients: bool = False) -> Tensor:
        """See `Gemms`."""
        return rows_times(x_RA, w_EBA, self.offs_E)

    def weight_gradient(self, grad_RB: Tensor, x_RA: Tensor, weight_EBA: Tensor) -> Tensor:
        """See `Gemms`."""
        return weight_gradient(grad_RB, x_RA, weight_EBA, self.offs_E)


def why_not(spec: ExpertsSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `registry.Backend`."""
    if (reason := why_not_triton("experts", dtype, device)) is not None:
        return reason
    if spec is None:
        return why_not_grouped(dtype, (), device)
    ups = spec.intermediate * (1 if spec.layout.gate_form == "none" else 2)
    return _why_not_written_out(spec) or why_not_grouped(dtype, (spec.hidden, spec.intermediate, ups), device)


def _why_not_written_out(spec: ExpertsSpec) -> str | None:
    """What makes a layer too rare to have kernels of its own."""
    if spec.activation.is_own:
        return "the activation is the module's own"
    if spec.post_norm is not None:
        return "a norm stands between the experts and their weights"
    if spec.layout.gate_form == "separate":
        return "gate and up are two parameters"
    if spec.scale_input and spec.layout.down_bias is not None:
        return "the routing weight scales the tokens, and the experts have biases"
    return None


def fused_experts(
    x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, weights: ExpertWeights, gemms_of: Callable[[Routing], Gemms] = TorchGemms.of
) -> Tensor:
    """``y_TH``: every token through its experts. Same arguments and result as `reference.reference_experts`.

    What `why_not` refuses goes through `grouped.grouped_experts`, and so does a call that torch.compile traces: it fuses those pieces itself.

    Args:
        gemms_of: whose GEMMs.
    """
    if torch.compiler.is_compiling() or x_TH.dtype == torch.float64 or _why_not_written_out(weights.spec) is not None:
        return grouped_experts(x_TH, topk_ids_TK, topk_weights_TK, weights)
    return _FusedExperts.apply(x_TH, topk_weights_TK, topk_ids_TK, weights, gemms_of, *operands_of(weights))


def operands_of(weights: ExpertWeights) -> Operands:
    """Views of the parameters in the dtype of the GEMMs; those of identity experts, which some families keep, are left out."""
    layout, module, experts = weights.spec.layout, weights.module, weights.spec.num_experts
    found = (weight and weight.operands(module)[0] for weight in (layout.up, layout.down, layout.up_bias, layout.down_bias))
    # A slice would cost a copy of its gradient, so it is taken only where it is one.
    found = (t if t is None or t.shape[0] == experts else t[:experts] for t in found)
    return Operands(*(None if t is None else t.to(weights.dtype) for t in found))


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, topk_weights_TK, topk_ids_TK, weights: ExpertWeights, gemms_of, *tensors):
        """`tensors` are `Operands`."""
        spec, operands = weights.spec, Operands(*tensors)
        routing = route(topk_ids_TK, topk_weights_TK, spec.num_experts, weights.rows)
        gemms = gemms_of(routing)
        pre = gemms.rows_times(gather_tokens(x_TH, routing, scaled=spec.scale_input), operands.up)
        if operands.up_bias is not None:
            add_bias_(pre, operands.up_bias, routing)
        h_RI = _activate(pre, spec, routing)
        y_RH = gemms.rows_times(h_RI, operands.down)
        y_TH, _ = combine_rows(y_RH, routing, scaled=not spec.scale_input, bias_EH=operands.down_bias)
        ctx.spec, ctx.gemms, ctx.weights_dtype = spec, gemms, topk_weights_TK.dtype
        keep_routing(ctx, routing, x_TH, pre, *tensors)
        if weights.ranks > 1 and weights.rows is None and launches(pre):
            cut_later(pre, routing.ends, weights.ranks)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        """Recomputes rows and activation; every gradient that nobody needs is left out."""
        routing, x_TH, pre, *tensors = kept_routing(ctx)
        spec, gemms, operands = ctx.spec, ctx.gemms, Operands(*tensors)
        needs_x, needs_weights, _, _, _, *needs = ctx.needs_input_grad
        needs = Operands(*needs)
        grad_TH = grad_TH.contiguous()

        grad_RH = gather_tokens(grad_TH, routing)
        grad_h_RI = gemms.rows_times(grad_RH, operands.down.mT, of_gradients=True)
        grad_pre, h_RI, grad_weights_R = _activate_backward(pre, grad_h_RI, spec, routing, want_h=needs.down)
        del grad_h_RI
        grad_down = gemms.weight_gradient(grad_RH, h_RI, operands.down) if needs.down else None
        del grad_RH, h_RI
        grad_down_bias = down_bias_gradient(grad_TH, operands, routing) if needs.down_bias else None
        if operands.down_bias is not None and needs_weights:
            grad_weights_R = grad_weights_R + row_dots(grad_TH, routing.token_R, operands.down_bias, routing.expert_R, routing)

        grad_up = None
        if needs.up:
            grad_up = gemms.weight_gradient(grad_pre, gather_tokens(x_TH, routing, scaled=spec.scale_input), operands.up)
        grad_up_bias = None
        if needs.up_bias:
            grad_up_bias = sum_groups(grad_pre, routing, of_tokens=False, scaled=False, dtype=operands.up_bias.dtype)
        grad_x_TH = grad_weights_TK = None
        if needs_x or needs_weights:
            # A token's gradient and those of its weights leave in one kernel.
            grad_x_RH = gemms.rows_times(grad_pre, operands.up.mT, of_gradients=True)
            if spec.scale_input:
                grad_weights_R = row_dots(grad_x_RH, None, x_TH, routing.token_R, routing)
            grad_x_TH, grad_weights_TK = combine_rows(
                grad_x_RH, routing, scaled=spec.scale_input, numbers_R=grad_weights_R, numbers_dtype=ctx.weights_dtype
            )
        return grad_x_TH, grad_weights_TK, None, None, None, grad_up, grad_down, grad_up_bias, grad_down_bias


def keep_routing(ctx, routing: Routing, *tensors: Tensor | None) -> None:
    """Saves for the backward pass what it reads of `routing`, and `tensors`."""
    ctx.top_k = routing.top_k
    ctx.save_for_backward(routing.token_R, routing.row_S, routing.expert_R, routing.ends, routing.weights_R, *tensors)


def kept_routing(ctx) -> tuple[Routing, *tuple[Tensor | None, ...]]:
    """What `keep_routing` has saved; `order_R` was not needed any more."""
    token_R, row_S, expert_R, ends, weights_R, *tensors = ctx.saved_tensors
    return Routing(token_R, token_R, row_S, expert_R, ends, weights_R, ctx.top_k), *tensors


def down_bias_gradient(grad_TH: Tensor, operands: Operands, routing: Routing) -> Tensor:
    """``[E, H]``: the weighted gradients of each expert's tokens, added up."""
    return sum_groups(grad_TH, routing, of_tokens=True, scaled=True, dtype=operands.down_bias.dtype)


def _activate(pre: Tensor, spec: ExpertsSpec, routing: Routing) -> Tensor:
    forward = gated.gated_forward if launches(pre) else gated.gated_forward_reference
    return forward(pre, spec.activation, spec.layout.gate_form, rows=routing.ends[-1:])


def _activate_backward(
    pre: Tensor, grad_h_RI: Tensor, spec: ExpertsSpec, routing: Routing, want_h: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the pre-activation, the weighted activation, and gradients of the routing weights (None if they scale the tokens)."""
    backward = gated.gated_backward if launches(pre) else gated.gated_backward_reference
    weights_R = None if spec.scale_input else routing.weights_R
    return backward(pre, grad_h_RI, spec.activation, spec.layout.gate_form, want_h=want_h, weights_R=weights_R, rows=routing.ends[-1:])
