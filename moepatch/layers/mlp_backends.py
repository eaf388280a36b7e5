"""The table ``mlp``: what computes dense MLPs and shared experts. Importing this module registers them.

A backend is a function ``(x_TH, weights: MlpWeights, spec: MlpSpec) -> y_TH``.
"""

from __future__ import annotations

import importlib.util

import torch

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
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"needs a GPU, this is {device.type}"
    return None if dtype in (torch.bfloat16, torch.float16, torch.float32) else f"computes in float32, the weights are {dtype}"


@register_backend("mlp", "triton", rank=60, serves="gate and up in one GEMM, the activation in one kernel each way", why_not=_why_not_triton)
def _triton():
    from .mlp import triton_mlp

    return triton_mlp


def _why_not_liger(spec, dtype, device):
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if spec is not None and spec.activation.name != "swiglu":
        return f"has no kernel for {spec.activation}"
    return _why_not_triton(spec, dtype, device)


@register_backend("mlp", "liger", rank=20, serves="Liger's SwiGLU between the linear layers", why_not=_why_not_liger)
def _liger():
    from .mlp import liger_mlp

    return liger_mlp
