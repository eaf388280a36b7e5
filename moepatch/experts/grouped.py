"""The `torch` backend: grouped GEMMs over rows sorted once, without waiting for the device.

What is kept for the backward pass: the tokens ``x_TH`` (which the caller holds anyway), the pre-activation ``[R, 2I]``, the routing
weights ``[R]`` and the integers of the sort. The routing weight is multiplied into the activation before the down projection, so
neither the experts' outputs ``[R, H]`` nor a weighted copy of them is kept: the weight's gradient is ``<h, dL/d(weight*h)>``, which the
backward pass has at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..once import once_differentiable
from .activation import split_gate
from .gemm import rows_times, weight_gradient
from .routes import Routes, gather_rows, permute_weights, sort_routes, sum_rows, unpermute, zero_sentinels
from .spec import ExpertWeights


class _Operands(NamedTuple):
    """Tensors of one experts module as GEMM operands: views ``[E, out, in]`` and ``[E, out]``, None where absent.

    `up2` is the up projection where the family keeps gate and up in two parameters; `up` is then the gate alone.
    """

    up: Tensor
    up2: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


def grouped_experts(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """``y_TH``: every token through its experts. Same arguments and result as `reference.reference_experts`."""
    spec = weights.spec
    routes = sort_routes(topk_ids_TK, spec.num_experts, weights.rows)
    weights_R = permute_weights(topk_weights_TK.to(_wide(topk_weights_TK.dtype)), routes)
    norm = weights.post_norm
    out_RH = _GroupedMLP.apply(x_TH, weights_R if norm is None else None, weights, *routes, *_operands(weights))
    if norm is not None:
        # A norm stands between the down projection and the weight, so the weight cannot go in front of either.
        out_RH = (norm(zero_sentinels(out_RH, routes)) * weights_R.unsqueeze(-1)).to(x_TH.dtype)
    return unpermute(out_RH, routes)


def _operands(weights: ExpertWeights) -> _Operands:
    layout, module, experts = weights.spec.layout, weights.module, weights.spec.num_experts
    up = layout.up.operands(module)
    # Families with identity experts may keep rows for them in one of the parameters.
    up = tuple(w if w.shape[0] == experts else w[:experts] for w in up)
    (down,) = layout.down.operands(module)
    (up_bias,) = layout.up_bias.operands(module) if layout.up_bias else (None,)
    (down_bias,) = layout.down_bias.operands(module) if layout.down_bias else (None,)
    operands = (up[0], up[1] if len(up) == 2 else None, down, up_bias, down_bias)
    return _Operands(*(None if t is None else t.to(weights.dtype) for t in operands))


class _GroupedMLP(torch.autograd.Function):
    """Tokens ``x_TH`` to rows ``out_RH`` sorted by expert, weighted if `weights_R` is given. Sentinel rows are undefined."""

    @staticmethod
    def forward(ctx, x_TH, weights_R, weights: ExpertWeights, *tensors):
        """`tensors` are the five of `Routes` and the five of `_Operands`."""
        routes, operands = Routes(*tensors[:5]), _Operands(*tensors[5:])
        x_RH = gather_rows(x_TH, routes)
        if weights.spec.scale_input:
            x_RH = (x_RH * weights_R.unsqueeze(-1)).to(x_TH.dtype)
        pre = _project_up(x_RH, operands, routes)
        h_RI = _activate(pre, weights)
        if weights_R is not None and not weights.spec.scale_input:
            h_RI = h_RI * weights_R.unsqueeze(-1)
        out_RH = rows_times(h_RI.to(x_TH.dtype), operands.down, routes.offs_E)
        if operands.down_bias is not None:
            bias_RH = _per_row(operands.down_bias, routes)
            # Not in place, as in `routes`.
            out_RH = out_RH + (bias_RH if weights_R is None or weights.spec.scale_input else (bias_RH * weights_R.unsqueeze(-1)).to(out_RH.dtype))
        ctx.weights, ctx.top_k, ctx.pre_count = weights, routes.top_k, len(pre)
        ctx.save_for_backward(x_TH, weights_R, *routes[:4], *operands, *pre)
        return out_RH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH):
        """Recomputes rows and activation; every gradient that nobody needs is left out."""
        x_TH, weights_R, *saved = ctx.saved_tensors
        routes, operands, pre = Routes(*saved[:4], ctx.top_k), _Operands(*saved[4:9]), tuple(saved[9:])
        needs_x, needs_weights, _, *needs = ctx.needs_input_grad
        needs = _Operands(*needs[5:])
        spec, offs_E = ctx.weights.spec, routes.offs_E
        folded = weights_R is not None and not spec.scale_input
        scale_R1 = weights_R.unsqueeze(-1) if folded else None

        # Through the down projection and the activation.
        grad_h_RI = rows_times(grad_RH, operands.down.transpose(1, 2), offs_E)
        h_RI, grad_pre = _activate_backward(grad_h_RI, scale_R1, pre, ctx.weights)
        grad_weights_R = (grad_h_RI * h_RI).sum(-1) if folded and needs_weights else None
        if folded:
            h_RI = h_RI * scale_R1
        grad_down = weight_gradient(grad_RH, h_RI.to(x_TH.dtype), operands.down, offs_E) if needs.down else None
        grad_down_bias = None
        if operands.down_bias is not None:
            if grad_weights_R is not None:
                grad_weights_R = grad_weights_R + (grad_RH * _per_row(operands.down_bias, routes)).sum(-1, dtype=grad_weights_R.dtype)
            if needs.down_bias:
                grad_down_bias = _bias_gradient(grad_RH * scale_R1 if folded else grad_RH, operands.down_bias, routes)
        del h_RI, grad_h_RI

        # Through the up projection.
        ups = [w for w in (operands.up, operands.up2) if w is not None]
        x_RH = gather_rows(x_TH, routes)
        fed_RH = (x_RH * weights_R.unsqueeze(-1)).to(x_TH.dtype) if spec.scale_input else x_RH
        grad_up = [
            weight_gradient(g, fed_RH, w, offs_E) if need else None
            for g, w, need in zip(grad_pre, ups, (needs.up, needs.up2), strict=False)
        ]
        grad_up_bias = _bias_gradient(grad_pre[0], operands.up_bias, routes) if needs.up_bias else None
        grad_x_TH = None
        if needs_x or (spec.scale_input and needs_weights):
            grad_x_RH = rows_times(grad_pre[0], operands.up.transpose(1, 2), offs_E)
            if operands.up2 is not None:
                grad_x_RH += rows_times(grad_pre[1], operands.up2.transpose(1, 2), offs_E)
            if spec.scale_input:
                grad_weights_R = (grad_x_RH * x_RH).sum(-1, dtype=weights_R.dtype)
                grad_x_RH = (grad_x_RH * weights_R.unsqueeze(-1)).to(x_TH.dtype)
            grad_x_TH = sum_rows(grad_x_RH, routes)
        grads = _Operands(grad_up[0], grad_up[1] if len(grad_up) == 2 else None, grad_down, grad_up_bias, grad_down_bias)
        return grad_x_TH, grad_weights_R, None, *(None for _ in routes), *grads


def _project_up(x_RH: Tensor, operands: _Operands, routes: Routes) -> tuple[Tensor, ...]:
    """The pre-activation, in one tensor or (gate and up apart) in two."""
    pre = tuple(rows_times(x_RH, w, routes.offs_E) for w in (operands.up, operands.up2) if w is not None)
    if operands.up_bias is not None:
        pre[0].add_(_per_row(operands.up_bias, routes))
    return pre


def _activate(pre: tuple[Tensor, ...], weights: ExpertWeights) -> Tensor:
    """``h_RI`` in fp32 (or the family's own gate in its own precision)."""
    spec = weights.spec
    if spec.activation.is_own:
        return weights.own_gate(*pre)
    gate, up = split_gate(pre, spec.layout.gate_form)
    wide = _wide(gate.dtype)
    return spec.activation.forward(gate.to(wide), None if up is None else up.to(wide))


def _activate_backward(
    grad_h_RI: Tensor, scale_R1: Tensor | None, pre: tuple[Tensor, ...], weights: ExpertWeights
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Recomputes ``h_RI`` and returns it with the gradients of the pre-activation, in the form and dtype of `pre`."""
    spec = weights.spec
    grad = grad_h_RI if scale_R1 is None else grad_h_RI * scale_R1
    if spec.activation.is_own:
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in pre)
            h_RI = weights.own_gate(*leaves)
        return h_RI.detach(), torch.autograd.grad(h_RI, leaves, grad.to(h_RI.dtype))
    gate, up = split_gate(pre, spec.layout.gate_form)
    wide = _wide(gate.dtype)
    gate, up = gate.to(wide), None if up is None else up.to(wide)
    h_RI = spec.activation.forward(gate, up)
    grad_gate, grad_up = spec.activation.backward(grad.to(wide), gate, up)
    grad_pre = tuple(torch.empty_like(p) for p in pre)
    into_gate, into_up = split_gate(grad_pre, spec.layout.gate_form)
    into_gate.copy_(grad_gate)
    if into_up is not None:
        into_up.copy_(grad_up)
    return h_RI, grad_pre


def _per_row(bias_EB: Tensor, routes: Routes) -> Tensor:
    """Each row's bias; sentinel rows get the last expert's, which nobody reads."""
    return bias_EB.index_select(0, routes.expert_R.clamp(max=bias_EB.shape[0] - 1))


def _bias_gradient(grad_RB: Tensor, bias_EB: Tensor, routes: Routes) -> Tensor:
    """Sums rows per expert in fp32; sentinels fall into one more row, which is dropped."""
    experts, width = bias_EB.shape
    sums = grad_RB.new_zeros(experts + 1, width, dtype=_wide(grad_RB.dtype))
    return sums.index_add_(0, routes.expert_R, grad_RB.to(sums.dtype))[:experts].to(bias_EB.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or wider if the model is."""
    return torch.promote_types(dtype, torch.float32)
