"""Transformer Engine's `DotProductAttention`: cuDNN behind its own choice of kernels."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .exact import plain_attention
from .kernel import How, Kernel, needs_gpu, wrong_dims
from .spec import AttentionSpec
from .torch_kernels import why_not_loaded

#: Tokens of the call that shows what it computes, and the error that both sides' rounding may add up to.
_TRIED, _NEAR = 160, 0.05


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
    return wrong_dims(spec, 256) or _why_wrong(replace(spec, packed=False), dtype, device)


@functools.cache
def _why_wrong(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """A small call, forward and backward, tells what it computes here: without its cuDNN attention it takes what else is installed, without a word."""
    heads = min(spec.heads, 4 * (spec.heads // spec.kv_heads))
    shapes = ((heads, spec.head_dim), (heads * spec.kv_heads // spec.heads, spec.head_dim), (heads * spec.kv_heads // spec.heads, spec.v_head_dim))
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        made = (torch.randn(1, count, _TRIED, dim, generator=generator, device=device, dtype=torch.float32) for count, dim in shapes)
        q, k, v = (t.to(dtype).requires_grad_() for t in made)
        sinks = torch.zeros(heads, dtype=dtype, device=device, requires_grad=True) if spec.sinks else None
        distance = torch.arange(_TRIED, device=device)[:, None] - torch.arange(_TRIED, device=device)
        left, right = spec.reach
        mask = ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        try:
            found = run_te(q, k, v, How(spec.head_dim**-0.5, spec.reach, sinks))
            truth = plain_attention(q, k, v, mask[None, None], scale=spec.head_dim**-0.5, sinks_H=sinks)[0]
            ours, theirs = (torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (found, truth))
        except RuntimeError as error:
            return f"Transformer Engine's attention fails here ({str(error).splitlines()[0]})"
    errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip((found, *ours), (truth, *theirs), strict=True)]
    return None if max(errors) < _NEAR else f"Transformer Engine's attention computes something else here: its relative error is {max(errors):.1e}"


TE = Kernel("Transformer Engine", why_not_te, run_te)
