"""The `quack` backend: QuACK's grouped GEMMs, which gather tokens as they read and apply the activation before they write.

Forward: sort, up and activation, down, weighted sum. Backward: down's gradient with the activation's and the routing weight's, the two
weight gradients, up's gradient, sum. No gathered copy of tokens or gradients exists. Kept for the backward pass: the tokens (which the
caller holds anyway), the pre-activation, the routing weights and the integers of the sort.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from ..gpus import capability_of
from ..kernels.biases import sum_groups
from ..kernels.combine import combine_rows, row_dots
from ..kernels.routes import route
from ..layout.ops import Transpose
from ..needs import BF16_FP16, missing
from . import quack_calls as calls
from . import quack_gemms
from ..once import once_differentiable
from .fused import Operands, down_bias_gradient, fused_experts, keep_routing, kept_routing, operands_of
from .quack_epilogues import epilogues, has
from .shrink import cut_later
from .spec import ExpertsSpec, ExpertWeights

_WIDTHS = 8  # elements of 2 bytes that QuACK reads at a time


def why_not(spec: ExpertsSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `registry.Backend`."""
    if (reason := missing(dtype, device, dtypes=BF16_FP16, capability=(9, 0))) is not None:
        return reason
    if (capability := capability_of(device)) != (9, 0):
        return f"its kernels are tried on compute capability 9.0 alone, this is {capability[0]}.{capability[1]}"
    return (spec and why_not_spec(spec)) or _why_not_importable()


def why_not_spec(spec: ExpertsSpec) -> str | None:
    """What QuACK cannot compute."""
    if not has(spec.activation):
        return f"QuACK has no {spec.activation}"
    if spec.post_norm is not None:
        return "a norm stands between the experts and their weights"
    if spec.scale_input:
        return "the routing weight scales the tokens"
    if spec.layout.gate_form == "separate":
        return "gate and up are two parameters"
    if spec.layout.gate_form == "concatenated" and any(isinstance(op, Transpose) for op in spec.layout.up.ops):
        return "gate and up are halves of the contiguous axis"
    odd = [w for w in (spec.hidden, spec.intermediate) if w % _WIDTHS]
    return f"QuACK wants widths divisible by {_WIDTHS}, this has {odd[0]}" if odd else None


@functools.cache
def _why_not_importable() -> str | None:
    if importlib.util.find_spec("quack") is None:
        return "not installed (pip install moepatch[quack])"
    try:
        quack_gemms.library()
    except Exception as error:
        version = importlib.metadata.version("quack-kernels")
        return f"quack-kernels {version} is installed, but its import fails ({type(error).__name__}: {error}); 0.6.4 works"
    return None


def quack_experts(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """``y_TH``: every token through its experts. Same arguments and result as `reference.reference_experts`.

    Nothing to multiply, and calls that torch.compile traces, go through `fused.fused_experts`.

    Raises:
        BackendUnavailable: QuACK failed at the first call for these shapes; the message has its reason.
    """
    if torch.compiler.is_compiling() or topk_ids_TK.numel() == 0 or weights.rows == 0:
        return fused_experts(x_TH, topk_ids_TK, topk_weights_TK, weights)
    operands = Operands(*(None if t is None else _readable(t) for t in operands_of(weights)))
    return _QuackExperts.apply(x_TH, topk_weights_TK, topk_ids_TK, weights, *operands)


class _QuackExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, topk_weights_TK, topk_ids_TK, weights: ExpertWeights, *tensors):
        """`tensors` are `Operands`."""
        spec, operands = weights.spec, Operands(*tensors)
        halves, act = spec.layout.gate_form == "concatenated", epilogues(spec.activation)
        x_TH = _readable(x_TH.contiguous())
        routing = route(topk_ids_TK, topk_weights_TK, spec.num_experts, weights.rows)
        bias_EN = _alternating(operands.up_bias) if halves and operands.up_bias is not None else operands.up_bias
        train = any(ctx.needs_input_grad)
        pre, h_RI = calls.activate(x_TH, operands.up, bias_EN, routing, act, halves, operands.down, train)
        y_RH = calls.project(h_RI, operands.down, routing)
        y_TH, _ = combine_rows(y_RH, routing, scaled=True, bias_EH=operands.down_bias)
        ctx.halves, ctx.epilogues, ctx.weights_dtype = halves, act, topk_weights_TK.dtype
        keep_routing(ctx, routing, x_TH, pre, *tensors)
        if weights.ranks > 1 and weights.rows is None:
            cut_later(pre, routing.ends, weights.ranks)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        """Recomputes the activation; every gradient that nobody needs is left out."""
        routing, x_TH, pre, *tensors = kept_routing(ctx)
        operands, halves = Operands(*tensors), ctx.halves
        needs_x, needs_weights, _, _, *needs = ctx.needs_input_grad
        needs = Operands(*needs)
        grad_TH = _readable(grad_TH.contiguous())

        grad_pre, h_RI, dots_RP = calls.differentiate(grad_TH, operands.down, pre, routing, ctx.epilogues)
        grad_down = grad_up = None
        if needs.down:
            grad_down = quack_gemms.empty_like(operands.down)
            calls.outer_sums(grad_TH, h_RI, grad_down, routing)
        del h_RI
        if needs.up:
            grad_up = quack_gemms.empty_like(operands.up)
            calls.outer_sums(x_TH, grad_pre, grad_up.mT, routing, halves)
        grad_down_bias = down_bias_gradient(grad_TH, operands, routing) if needs.down_bias else None
        grad_up_bias = None
        if needs.up_bias:
            grad_up_bias = sum_groups(grad_pre, routing, of_tokens=False, scaled=False, dtype=operands.up_bias.dtype)
            grad_up_bias = _in_halves(grad_up_bias) if halves else grad_up_bias
        if operands.down_bias is not None and needs_weights:
            dots_RP[:, 0] += row_dots(grad_TH, routing.token_R, operands.down_bias, routing.expert_R, routing)
        grad_x_TH = grad_weights_TK = None
        if needs_x or needs_weights:
            # A token's gradient and those of its weights leave in one kernel.
            grad_x_RH = calls.project(grad_pre, operands.up.mT, routing, halves)
            grad_x_TH, grad_weights_TK = combine_rows(grad_x_RH, routing, numbers_R=dots_RP, numbers_dtype=ctx.weights_dtype)
        return grad_x_TH, grad_weights_TK, None, None, grad_up, grad_down, grad_up_bias, grad_down_bias


def _readable(t: Tensor) -> Tensor:
    """As it is if it can be read 16 bytes at a time, else a copy."""
    strides = t.stride()
    contiguous = 1 in strides[-2:] and all(s == 1 or s % _WIDTHS == 0 for s in strides)
    return t if contiguous and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _alternating(bias_EN: Tensor) -> Tensor:
    return bias_EN.unflatten(1, (2, -1)).mT.flatten(1)


def _in_halves(bias_EN: Tensor) -> Tensor:
    return bias_EN.unflatten(1, (-1, 2)).mT.flatten(1)
