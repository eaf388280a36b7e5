"""Rows ``te_fp8`` of the tables ``linear``, ``mlp`` and ``attention_block``: projections as FP8 GEMMs of Transformer Engine.

Importing this module registers them. Their rank is negative: FP8 is never chosen, only asked for.
"""

from __future__ import annotations

import torch

from ..needs import missing
from ..registry import register_backend
from .attention_block import AttentionBlockSpec
from .fp8 import round_linear_layers
from .linear import LinearSpec
from .mlp import MlpSpec

#: The rank of backends that are chosen by name only.
_BY_NAME = -10


def why_not_fp8(spec: LinearSpec | MlpSpec | AttentionBlockSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why projections cannot be FP8 GEMMs; None if they can."""
    return missing(dtype, device, "transformer_engine", "triton", capability=(8, 9)) or (None if spec is None else _widths(spec))


def _widths(spec: LinearSpec | MlpSpec | AttentionBlockSpec) -> str | None:
    """What is wrong with the widths of the GEMMs."""
    from .te_linear import MULTIPLE

    if isinstance(spec, LinearSpec):
        widths = (spec.in_features, spec.out_features)
    elif isinstance(spec, MlpSpec):
        widths = (spec.hidden, spec.intermediate)
    else:
        heads = spec.heads
        widths = (spec.hidden, sum(heads.splits), heads.heads * heads.value_dim)
    odd = [n for n in widths if n % MULTIPLE]
    return f"FP8 GEMMs need widths divisible by {MULTIPLE}, this has {odd[0]}" if odd else None


#: What all of them say: E4M3 has 3 bits behind the point, where bf16 has 7.
_FP8 = {"rank": _BY_NAME, "why_not": why_not_fp8, "exact": lambda spec: False, "rounded": round_linear_layers}


@register_backend("linear", "te_fp8", serves="Transformer Engine, FP8 with current scaling; by name only", **_FP8)
def _linear():
    from .te_linear import te_linear

    return te_linear


@register_backend("linear", "reference", rank=2 * _BY_NAME, serves="the layer's own product; by name only")
def _reference():
    from ..layout.adjacent import joint_linear

    return joint_linear


@register_backend("mlp", "te_fp8", serves="gate and up in one FP8 GEMM of Transformer Engine, down in another; by name only", **_FP8)
def _mlp():
    from .te_linear import te_mlp

    return te_mlp


@register_backend("attention_block", "te_fp8", serves="q, k, v and o as FP8 GEMMs of Transformer Engine; by name only", **_FP8)
def _attention():
    from .attention_block_backends import triton_heads
    from .rope import reference_heads

    def heads(joint, *rest):
        return (triton_heads if joint.is_cuda else reference_heads)(joint, *rest)

    return heads
