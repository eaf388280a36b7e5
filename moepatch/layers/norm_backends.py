"""What can compute a norm, and a sum with the norm of it: plain torch, own Triton kernels, thin adapters over libraries.

Importing this module registers them.
"""

from __future__ import annotations

import functools

import torch

from ..kernels import requirements
from ..needs import missing
from ..registry import register_backend
from .norm import NormSpec


def _plain(spec: NormSpec) -> str | None:
    """Why a library that has ordinary norms only cannot serve; None if it can."""
    if spec.gate is not None:
        return "it has no gated norm"
    if spec.group:
        return "it has no norm of groups"
    return "it has no norm that rounds the scale" if spec.cast == "scale" else None


def why_not_triton(table: str, spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the own kernels cannot serve; None if they can."""
    from ..kernels.norm import WIDEST

    if (reason := requirements.why_not_triton(table, dtype, device)) is not None:
        return reason
    if isinstance(spec, NormSpec) and (spec.group or spec.width) > WIDEST:
        return f"a row of {spec.group or spec.width} does not fit into registers (at most {WIDEST})"
    return None


def _why_not_liger(spec, dtype, device):
    return missing(dtype, device, "liger_kernel") or (None if spec is None else _plain(spec))


def _why_not_te(spec, dtype, device):
    if (reason := missing(dtype, device, "transformer_engine")) is not None or spec is None:
        return reason
    return "it has no norm without a weight" if spec.weight is None else _plain(spec)


def _why_not_quack(spec, dtype, device):
    return missing(dtype, device, "quack", capability=(9, 0)) or (None if spec is None else _plain(spec))


def _rounds_after(spec: NormSpec) -> bool:
    """For libraries that compute all of a row in fp32 and round the result."""
    return spec.cast == "after"


@register_backend("norm", "reference", rank=0, serves="plain torch: every norm")
def _reference():
    from .norm import reference_norm

    return reference_norm


@register_backend("norm", "triton", rank=50, serves="own Triton kernels: every norm up to 16384 wide", why_not=functools.partial(why_not_triton, "norm"))
def _triton():
    from ..kernels.norm import norm

    return norm


@register_backend("norm", "liger", rank=30, serves="Liger's RMS norm: any without gate", why_not=_why_not_liger)
def _liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    modes = {"before": "llama", "after": "gemma"}

    def liger_norm(x, weight, spec, gate=None):
        """Not in place: the gradient that arrives may have other readers."""
        return LigerRMSNormFunction.apply(x, weight, spec.eps, float(spec.offset), modes[spec.cast], False)

    return liger_norm


@register_backend("norm", "te", rank=10, serves="Transformer Engine's RMS norm: with a weight, without gate", why_not=_why_not_te, exact=_rounds_after)
def _te():
    from .norm_te import te_norm

    return te_norm


@register_backend("norm", "quack", rank=20, serves="QuACK's RMS norm: any without gate", why_not=_why_not_quack, exact=_rounds_after)
def _quack():
    from quack.rmsnorm import rmsnorm

    def quack_norm(x, weight, spec, gate=None):
        return rmsnorm(x, weight, eps=spec.eps, weight_offset=float(spec.offset))

    return quack_norm


@register_backend("residual", "reference", rank=0, serves="sums and norms apart")
def _apart():
    from .residual import reference_ops

    return reference_ops()


@register_backend(
    "residual", "triton", rank=50, serves="own Triton kernels: a sum and the norm of it in one pass",
    why_not=functools.partial(why_not_triton, "residual"),
)  # fmt: skip
def _together():
    from .residual import triton_ops

    return triton_ops()
