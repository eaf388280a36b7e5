"""The `reference` backend: a loop over the experts in canonical layout. Slow, readable, and the numeric truth of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import split_gate
from .spec import ExpertWeights


def reference_experts(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """``y_TH``, expert by expert, with autograd's own derivatives.

    Args:
        x_TH: tokens.
        topk_ids_TK: each token's experts; ids outside ``0 … E-1`` mean none.
        topk_weights_TK: their routing weights.
        weights: the module's tensors.
    """
    spec, module = weights.spec, weights.module
    layout = spec.layout
    up, down = layout.up.canonical(module).to(weights.dtype), layout.down.canonical(module).to(weights.dtype)
    up_bias = layout.up_bias.canonical(module).to(weights.dtype) if layout.up_bias else None
    down_bias = layout.down_bias.canonical(module).to(weights.dtype) if layout.down_bias else None
    y_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.promote_types(x_TH.dtype, topk_weights_TK.dtype))
    for expert in range(spec.num_experts):
        token, slot = torch.where(topk_ids_TK == expert)
        x_NH, weight_N1 = x_TH[token], topk_weights_TK[token, slot].unsqueeze(-1)
        if spec.scale_input:
            x_NH = x_NH * weight_N1.to(x_NH.dtype)
        pre = x_NH @ up[expert].T
        if up_bias is not None:
            pre = pre + up_bias[expert]
        h_NI = _activate(pre, weights)
        out_NH = h_NI @ down[expert].T
        if down_bias is not None:
            out_NH = out_NH + down_bias[expert]
        if weights.post_norm is not None:
            out_NH = weights.post_norm(out_NH)
        y_TH = y_TH.index_add(0, token, (out_NH if spec.scale_input else out_NH * weight_N1).to(y_TH.dtype))
    return y_TH.to(x_TH.dtype)


def _activate(pre: Tensor, weights: ExpertWeights) -> Tensor:
    """Applies gate and activation to a canonical pre-activation ``[N, 2I]`` (or ``[N, I]`` without a gate)."""
    spec = weights.spec
    if spec.activation.is_own:
        return weights.own_gate(spec.layout.to_family(pre))
    gate, up = split_gate((pre,), "none" if spec.layout.gate_form == "none" else "concatenated")
    wide = torch.promote_types(pre.dtype, torch.float32)
    return spec.activation.forward(gate.to(wide), None if up is None else up.to(wide)).to(pre.dtype)
