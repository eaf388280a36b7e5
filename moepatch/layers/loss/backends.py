"""The rows of the table "loss": importing this module registers them. A factory returns ``(hidden, weight, bias, labels, formula) -> loss``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from ...registry import register_backend


@register_backend("loss", "reference", rank=0, serves="logits in memory")
def _reference():
    from .reference import linear_cross_entropy

    return linear_cross_entropy


@register_backend("loss", "chunked", rank=50, serves="no logits: chunks of tokens, gradients in the forward pass; own Triton kernel on CUDA")
def _chunked():
    from .chunked import linear_cross_entropy

    return linear_cross_entropy


def _needs(module: str, how: str, *dtypes: torch.dtype) -> Callable[..., str | None]:
    def why_not(spec, dtype, device):
        if importlib.util.find_spec(module) is None:
            return f"not installed ({how})"
        if device.type != "cuda":
            return f"needs a CUDA device, this is {device.type}"
        return None if dtype in dtypes else f"does not compute in {str(dtype).removeprefix('torch.')}"

    return why_not


def _quack_serves(spec, dtype, device):
    missing = _needs("quack", "pip install moepatch[quack]", torch.bfloat16)(spec, dtype, device)
    if missing is None and torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability ≥ 9.0, this is {}.{}".format(*torch.cuda.get_device_capability(device))
    if missing is None and spec is not None and (spec.bias or spec.hidden % 8 or spec.vocab % 8):
        return "needs a head without a bias whose sizes are multiples of 8"
    return missing


def _waits(spec) -> bool:
    """Liger and Cut Cross-Entropy make the host wait for the device in each step: they are there for those who ask for them."""
    return False


@register_backend("loss", "quack", rank=30, serves="QuACK's chunked linear cross-entropy: Hopper and newer", why_not=_quack_serves)
def _quack():
    from .adapters import quack

    return quack()


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@register_backend(
    "loss", "liger", rank=20, serves="Liger's fused linear cross-entropy", why_not=_needs("liger_kernel", "pip install moepatch[liger]", *_FLOATS), exact=_waits
)
def _liger():
    from .adapters import liger

    return liger()


@register_backend(
    "loss", "cce", rank=10, serves="Cut Cross-Entropy", why_not=_needs("cut_cross_entropy", "pip install cut-cross-entropy", *_FLOATS[:2]), exact=_waits
)
def _cce():
    from .adapters import cce

    return cce()
