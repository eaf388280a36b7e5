"""The two fused attentions inside torch: cuDNN's for whole sequences, FlashAttention's for windows and packed sequences.

Both are called as the operators underneath `scaled_dot_product_attention`: that offers neither windows nor packing, does not give the
log-sum-exp that sinks need, and its choice of a backend costs more host time than these calls.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gpus import Gpu
from .kernel import How, Kernel, needs_gpu, wrong_dims
from .sinks import with_sinks
from .spec import AttentionSpec

_aten = torch.ops.aten


class _Cudnn:
    """cuDNN on ``[B, H, S, D]``; it keeps the memory layout of the queries."""

    tokens_first = False
    own_sinks = False

    def forward(self, q, k, v, how):
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, how.window[1] == 0, scale=how.scale)
        return out, lse, (seed, offset)

    def backward(self, grad, q, k, v, out, lse, rest, how):
        lengths = q.shape[2], k.shape[2]
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, *rest, None, None, None, *lengths, 0.0, how.window[1] == 0, scale=how.scale
        )

    def by_head(self, out):
        return out

    def lse_by_head(self, lse):
        return lse.squeeze(-1) if lse.ndim == 4 else lse


class _Flash:
    """FlashAttention on ``[B, S, H, D]``, or packed on ``[T, H, D]``."""

    tokens_first = True
    own_sinks = False

    def forward(self, q, k, v, how):
        out, lse, *rest = _flash(q, k, v, how)
        return out, lse, tuple(rest[:2])

    def backward(self, grad, q, k, v, out, lse, rest, how):
        cu, length = how.cu_seqlens, how.max_len if how.cu_seqlens is not None else q.shape[1]
        left, right = how.window
        return _aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu, cu, length, length, 0.0, right == 0, *rest, scale=how.scale, window_size_left=left, window_size_right=right
        )

    def by_head(self, out):
        return out.transpose(-3, -2) if out.ndim == 4 else out.transpose(0, 1).unsqueeze(0)

    def lse_by_head(self, lse):
        return lse if lse.ndim == 3 else lse.unsqueeze(0)


_CUDNN, _FLASH = _Cudnn(), _Flash()


def _flash(q: Tensor, k: Tensor, v: Tensor, how: How):
    cu, length = how.cu_seqlens, how.max_len if how.cu_seqlens is not None else q.shape[1]
    left, right = how.window
    return _aten._flash_attention_forward(
        q, k, v, cu, cu, length, length, 0.0, right == 0, False, scale=how.scale, window_size_left=left, window_size_right=right
    )


def run_cudnn(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """See `Kernel.run`."""
    if how.sinks is not None:
        return with_sinks(_CUDNN, q, k, v, how).transpose(1, 2)
    keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, keep, 0.0, how.window[1] == 0, scale=how.scale)[0].transpose(1, 2)


def run_flash(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """See `Kernel.run`. Values that are narrower than the keys are widened with zeros."""
    dim = v.shape[-1]
    if dim < k.shape[-1]:
        v = F.pad(v, (0, k.shape[-1] - dim))
    if how.cu_seqlens is None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = with_sinks(_FLASH, q, k, v, how) if how.sinks is not None else _flash(q, k, v, how)[0]
    return out[..., :dim] if dim < out.shape[-1] else out


def why_not_cudnn(spec: AttentionSpec | None, dtype: torch.dtype, device: torch.device | Gpu) -> str | None:
    """See `Kernel.why_not`."""
    reason = needs_gpu(dtype, device, (8, 0))
    if reason is None:
        reason = why_not_loaded()
    if reason is not None or spec is None:
        return reason
    if spec.window is not None or spec.packed:
        return "torch's cuDNN attention has no windows and no packed sequences"
    if spec.softcap is not None:
        return "torch's cuDNN attention has no softcap"
    wide = spec.head_dim > 128 or spec.head_dim != spec.v_head_dim
    here = not isinstance(device, Gpu)  # what cannot be tried is taken on trust
    return wrong_dims(spec, 256) or (_why_cudnn_fails(replace(spec, sinks=False), dtype, device) if wide and here else None)


def why_not_flash(spec: AttentionSpec | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `Kernel.why_not`."""
    reason = needs_gpu(dtype, device, (8, 0))
    if reason is None and not torch.backends.cuda.is_flash_attention_available():
        reason = "this torch was built without FlashAttention"
    if reason is not None or spec is None:
        return reason
    if spec.softcap is not None:
        return "torch's FlashAttention has no softcap"
    if spec.v_head_dim > spec.head_dim:
        return "torch's FlashAttention needs values no wider than the keys"
    return wrong_dims(spec, 256)


CUDNN = Kernel("cuDNN", why_not_cudnn, run_cudnn, lambda: _CUDNN)
FLASH = Kernel("torch FlashAttention", why_not_flash, run_flash, lambda: _FLASH)


def why_not_loaded() -> str | None:
    """Why attention by cuDNN, torch's own or Transformer Engine's, cannot be trusted in this process, or None.

    Importing Transformer Engine loads the cuDNN that the system's linker finds, for the whole process. One older than torch was built with gives the
    right gradients until a CUDA graph replays its backward pass: that reads and writes anywhere (9.14 where torch has 9.19, on an H200).
    `torch.backends.cudnn.version` would say so once, and then no more.
    """
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    library = torch._C._cudnn
    return why_older_cudnn(library.getCompileVersion(), library.getRuntimeVersion())


def why_older_cudnn(built: tuple[int, int, int], loaded: tuple[int, int, int]) -> str | None:
    """What is wrong with a loaded cuDNN, by its version and the one that torch was built with; by cuDNN's own rule, newer ones of a major version will do."""
    if loaded[0] == built[0] and loaded[1] >= built[1]:
        return None
    found, wanted = (".".join(map(str, version)) for version in (loaded, built))
    return (
        f"cuDNN {found} is loaded and torch was built with {wanted}: another library, such as Transformer Engine, has loaded the system's, whose "
        "backward pass is wrong in a CUDA graph. Start Python with torch's own (F=$(python -c 'import nvidia.cudnn as c; print(c.__path__[0])')): "
        "CUDNN_HOME=$F LD_LIBRARY_PATH=$F/lib"
    )


@functools.cache
def _why_cudnn_fails(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Which head dims cuDNN takes depends on its version and the GPU: a small call, forward and backward, tells."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            shapes = ((spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.v_head_dim))
            q, k, v = (torch.zeros(1, 128, h, d, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for h, d in shapes)
            torch.autograd.grad(run_cudnn(q, k, v, How(spec.head_dim**-0.5, spec.reach)).sum(), (q, k, v))
    except RuntimeError as error:
        return f"does not take head dims {spec.head_dim}/{spec.v_head_dim} ({str(error).splitlines()[0]})"
    return None
