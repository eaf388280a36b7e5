"""Transformer Engine's `DotProductAttention`: cuDNN behind its own choice of kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .kernel import How, Kernel, needs_gpu, wrong_dims
from .spec import AttentionSpec
from .torch_kernels import why_not_loaded


@functools.cache
def _attention(heads: int, kv_heads: int, head_dim: int, v_head_dim: int, scale: float, sinks: bool):
    """One module for all layers of a form: it has no weights of its own, and making one costs more than calling it."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_attention_heads=heads,
        kv_channels=(head_dim, v_head_dim),
        num_gqa_groups=kv_heads,
        softmax_scale=scale,
        softmax_type="learnable" if sinks else "vanilla",
    )


def run_te(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """See `Kernel.run`."""
    packed = how.cu_seqlens is not None
    if not packed:
        # It takes the order of axes for the order in memory, which rotary embeddings leave as they like.
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    heads, kv_heads, dim = q.shape[-2], k.shape[-2], v.shape[-1]
    module = _attention(heads, kv_heads, q.shape[-1], dim, how.scale, how.sinks is not None)
    if how.sinks is not None:
        # Its softmax offset is a parameter. For this call it is the layer's own tensor, which thereby gets its gradient.
        module._parameters["softmax_offset"] = how.sinks
    causal = how.window[1] == 0
    lengths = {"cu_seqlens_q": how.cu_seqlens, "cu_seqlens_kv": how.cu_seqlens, "max_seqlen_q": how.max_len, "max_seqlen_kv": how.max_len}
    kind = ("padding_causal" if causal else "padding") if packed else ("causal" if causal else "no_mask")
    try:
        out = module(q, k, v, qkv_format="thd" if packed else "bshd", attn_mask_type=kind, window_size=how.window, **(lengths if packed else {}))
    finally:
        if how.sinks is not None:
            module._parameters["softmax_offset"] = None
    return out.view(*out.shape[:-1], heads, dim)


def why_not_te(spec: AttentionSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `Kernel.why_not`."""
    reason = needs_gpu(dtype, device, (8, 0), "transformer_engine") or why_not_loaded()
    if reason is not None or spec is None:
        return reason
    if spec.softcap is not None:
        return "Transformer Engine's cuDNN attention has no softcap"
    if spec.packed and spec.sinks:
        return "Transformer Engine has no sinks in packed sequences"
    if not spec.causal and spec.window is not None:
        return "Transformer Engine's cuDNN attention has no two-sided windows"
    return wrong_dims(spec, 256)


TE = Kernel("Transformer Engine", why_not_te, run_te)
