"""The `te` and `te_fp8` backends: the `triton` backend with Transformer Engine's GEMMs.

In FP8 the operands are rounded anew in the backward pass instead of being kept. The host waits for the device once in each forward pass, to
learn how many rows each expert has.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layers.te_linear import MULTIPLE
from ..needs import BF16_FP16, missing
from . import fused
from .fused import fused_experts
from .spec import ExpertsSpec, ExpertWeights
from .te_gemm import groups_of


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
    return fused_experts(x_TH, topk_ids_TK, topk_weights_TK, weights, functools.partial(groups_of, fp8=fp8))


#: `te_experts` in FP8.
te_fp8_experts = functools.partial(te_experts, fp8=True)
