"""The rows of the table "loss": importing this module registers them. A factory returns ``(hidden, weight, bias, labels, formula) -> loss``."""

from __future__ import annotations

from ...needs import BF16_FP16, missing
from ...registry import register_backend


@register_backend("loss", "reference", rank=0, serves="logits in memory")
def _reference():
    from .reference import linear_cross_entropy

    return linear_cross_entropy


@register_backend("loss", "chunked", rank=50, serves="no logits: chunks of tokens, gradients in the forward pass; own Triton kernel on CUDA")
def _chunked():
    from .chunked import linear_cross_entropy

    return linear_cross_entropy


def _liger_serves(spec, dtype, device):
    return missing(dtype, device, "liger_kernel")


def _cce_serves(spec, dtype, device):
    return missing(dtype, device, "cut_cross_entropy", dtypes=BF16_FP16)


# Liger and Cut Cross-Entropy make the host wait for the device in each step: they are there for those who ask for them.
@register_backend("loss", "liger", rank=-1, serves="Liger's fused linear cross-entropy", why_not=_liger_serves)
def _liger():
    from .adapters import liger

    return liger()


@register_backend("loss", "cce", rank=-2, serves="Cut Cross-Entropy", why_not=_cce_serves)
def _cce():
    from .adapters import cce

    return cce()
