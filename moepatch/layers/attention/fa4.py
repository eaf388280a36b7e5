"""FlashAttention 4 (the ``flash-attn-4`` distribution, module `flash_attn.cute`): windows, packed sequences, sinks and softcap in one kernel.

Under our own autograd functions it is called by the functions that are under its own one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from types import ModuleType

import torch
from torch import Tensor

from ...gpus import Gpu, capability_of
from .fa4_cache import keep, kept_compiles
from .kernel import How, Kernel, Raw, needs_gpu, wrong_heads
from .spec import AttentionSpec

#: What the functions without autograd are called with: releases may change them.
_FORWARD = {"softmax_scale", "causal", "window_size_left", "window_size_right", "learnable_sink", "softcap", "return_lse"}
_BACKWARD = _FORWARD - {"return_lse"}

#: Head dims of queries and keys, and of values, by major compute capability, that were tried forward and backward against fp32: 24 to 4096 tokens,
#: causal or not, grouped heads, windows, sinks. tests/test_gpu_attention_fa4.py tries them again, and others: with 16 the gradient of the
#: queries is off by 0.65 at 160 tokens, without a word.
TRIED: dict[int, frozenset[tuple[int, int]]] = {9: frozenset({(64, 64), (128, 128)})}


@functools.cache
def _library() -> ModuleType:
    # Importing it brings the CuTe compiler along, which takes seconds.
    with kept_compiles():
        from flash_attn.cute import cache_utils, interface
    keep(interface, cache_utils)
    return interface


@functools.cache
def _why_not_installed() -> str | None:
    # `flash_attn` is also the name of FlashAttention 2: the distribution decides.
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install --pre moepatch[fa4])"
    return None


class _FlashAttention4:
    """FlashAttention 4 on ``[B, S, H, D]``.

    Its forward kernel gives sinks their share on the way, and the kernel that rounds the gradient of the queries sums the sinks' own: both passes over
    the result that `sinks` would need cost nothing here.
    """

    tokens_first = True
    own_sinks = True

    def forward(self, q, k, v, how):
        return *_library()._flash_attn_fwd(q, k, v, **_inner_options(how), return_lse=True)[:2], ()

    def backward(self, grad, q, k, v, out, lse, rest, how):
        return _library()._flash_attn_bwd(q, k, v, out, grad, lse, **_inner_options(how))

    def by_head(self, out):
        return out.transpose(1, 2)

    def lse_by_head(self, lse):
        return lse


def _options(how: How) -> dict:
    """What all functions of the library are told in the same words."""
    return {"softmax_scale": how.scale, "causal": how.window[1] == 0, "learnable_sink": how.sinks, "softcap": how.softcap or 0.0}


def _reach(how: How) -> tuple[int | None, int | None]:
    """The window as the library wants it."""
    left, right = how.window
    return None if left < 0 else left, None if right < 0 or left < 0 else right


def _inner_options(how: How) -> dict:
    left, right = _reach(how)
    return {**_options(how), "window_size_left": left, "window_size_right": right}


@functools.cache
def _raw() -> Raw | None:
    """None where this release has no such functions."""
    found = vars(_library())
    for name, wanted in (("_flash_attn_fwd", _FORWARD), ("_flash_attn_bwd", _BACKWARD)):
        if name not in found or not wanted <= set(inspect.signature(found[name]).parameters):
            return None
    return _FlashAttention4()


def run_fa4(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """See `Kernel.run`. The first call of a form compiles for some seconds."""
    options = {**_options(how), "window_size": _reach(how)}
    if how.cu_seqlens is None:
        return _library().flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)[0]
    lengths = {"cu_seqlens_q": how.cu_seqlens, "cu_seqlens_k": how.cu_seqlens, "max_seqlen_q": how.max_len, "max_seqlen_k": how.max_len}
    return _library().flash_attn_varlen_func(q, k, v, **lengths, **options)[0]


def why_not_fa4(spec: AttentionSpec | None, dtype: torch.dtype, device: torch.device | Gpu) -> str | None:
    """See `Kernel.why_not`."""
    reason = _why_not_installed() or needs_gpu(dtype, device, (9, 0))
    if reason is not None or spec is None:
        return reason
    major, minor = capability_of(device)
    if major not in TRIED:
        return f"its results were tried on compute capability {', '.join(f'{known}.x' for known in sorted(TRIED))} alone, this is {major}.{minor}"
    if (spec.head_dim, spec.v_head_dim) not in TRIED[major]:
        return f"was tried with head dims {_listed(TRIED[major])}, this has {_dims(spec.head_dim, spec.v_head_dim)}"
    return wrong_heads(spec)


def _dims(keys: int, values: int) -> str:
    return f"{keys}" if keys == values else f"{keys}/{values}"


def _listed(dims: frozenset[tuple[int, int]]) -> str:
    return ", ".join(_dims(*pair) for pair in sorted(dims))


FA4 = Kernel("FlashAttention 4", why_not_fa4, run_fa4, _raw)
