"""The table ``mlp``: what computes dense MLPs and shared experts. Importing this module registers them.

A backend is a function ``(x_TH, weights: MlpWeights, spec: MlpSpec) -> y_TH``.
"""

from __future__ import annotations

from ..kernels.requirements import why_not_triton
from ..needs import missing
from ..registry import register_backend


@register_backend("mlp", "reference", rank=0, serves="plain torch: any activation, everything kept for the backward pass")
def _reference():
    from .mlp import reference_mlp

    return reference_mlp


@register_backend("mlp", "torch", rank=40, serves="gate and up in one GEMM, the activation recomputed in the backward pass")
def _torch():
    from .mlp import torch_mlp

    return torch_mlp


def _why_not_triton(spec, dtype, device):
    return why_not_triton("mlp", dtype, device)


@register_backend("mlp", "triton", rank=60, serves="gate and up in one GEMM, the activation in one kernel each way", why_not=_why_not_triton)
def _triton():
    from .mlp import triton_mlp

    return triton_mlp


def _why_not_liger(spec, dtype, device):
    if spec is not None and spec.activation.name != "swiglu":
        return f"it has no kernel for {spec.activation}"
    return missing(dtype, device, "liger_kernel", "triton")


@register_backend("mlp", "liger", rank=20, serves="Liger's SwiGLU between the linear layers", why_not=_why_not_liger)
def _liger():
    from .mlp import liger_mlp

    return liger_mlp
