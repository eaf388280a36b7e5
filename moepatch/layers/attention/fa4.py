"""FlashAttention 4 (the ``flash-attn-4`` distribution, module `flash_attn.cute`): windows, packed sequences, sinks and softcap in one kernel."""

from __future__ import annotations

import functools
import importlib.metadata

import torch
from torch import Tensor

from .kernel import How, Kernel, needs_gpu, wrong_dims
from .spec import AttentionSpec


@functools.cache
def _functions():
    # Importing it brings the CuTe compiler along, which takes seconds.
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    return flash_attn_func, flash_attn_varlen_func


def run_fa4(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """See `Kernel.run`. The first call of a form compiles for some seconds."""
    whole, packed = _functions()
    left, right = how.window
    options = {
        "softmax_scale": how.scale,
        "causal": right == 0,
        "window_size": (None if left < 0 else left, None if right < 0 or left < 0 else right),
        "learnable_sink": how.sinks,
        "softcap": how.softcap or 0.0,
    }
    if how.cu_seqlens is None:
        return whole(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)[0]
    cu, longest = how.cu_seqlens, how.max_len
    return packed(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, **options)[0]


@functools.cache
def _why_not_installed() -> str | None:
    # `flash_attn` is also the name of FlashAttention 2: the distribution decides.
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install --pre moepatch[fa4])"
    return None


def why_not_fa4(spec: AttentionSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `Kernel.why_not`."""
    reason = _why_not_installed() or needs_gpu(dtype, device, (9, 0))
    if reason is not None or spec is None:
        return reason
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if not hopper and (spec.head_dim, spec.v_head_dim) == (192, 128):
        return None
    return wrong_dims(spec, 256 if hopper else 128)


FA4 = Kernel("FlashAttention 4", why_not_fa4, run_fa4)
