"""What computes the heads of multi-head latent attention: rows of the table ``latent``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.requirements import why_not_triton
from ..once import once_differentiable
from ..registry import register_backend
from .latent_heads import LatentHeads, reference_latent

#: Widest parts of a head, and most heads, that fit into a program's registers.
_WIDEST, _MOST = 512, 256


@register_backend("latent", "reference", rank=0, serves="plain torch")
def _reference():
    return reference_latent


def _why_not(spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the own kernels cannot serve; None if they can."""
    if (reason := why_not_triton("latent", dtype, device)) is not None or spec is None:
        return reason
    heads = spec.heads
    if heads.heads > _MOST or max(heads.nope, heads.rope_dim, heads.value_dim) > _WIDEST:
        return f"{heads.heads} heads of {heads.nope}+{heads.rope_dim} do not fit into registers (at most {_MOST}, and {_WIDEST} dims)"
    return None


@register_backend("latent", "triton", rank=50, serves="rope, the shared key and the layout of all heads in one Triton kernel each way", why_not=_why_not)
def _triton():
    return triton_latent


def triton_latent(
    q: Tensor, kv: Tensor, shared: Tensor, spec: LatentHeads, cos: Tensor | None, sin: Tensor | None, owned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference_latent`. Values are a view of `kv`, whose gradient is one contiguous matrix."""
    if cos is not None and cos.ndim != 3:
        return reference_latent(q, kv, shared, spec, cos, sin)
    if spec.rope == "none":
        cos = sin = None
    # Whoever watches operators may keep what they return: selective checkpointing does, to hand it out again.
    owned = owned and torch._C._len_torch_dispatch_stack() == 0
    q, k, v = _Latent.apply(q, kv, shared, cos, sin, spec, owned)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _Latent(torch.autograd.Function):
    """``[B, S, H, …]`` each, so that what attention reads is a transposed view."""

    @staticmethod
    def forward(ctx, q, kv, shared, cos, sin, spec, owned):
        from ..kernels.latent import latent_forward

        wants_tables = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(cos, sin, *((q, kv, shared) if wants_tables else ()))
        ctx.spec, ctx.dtypes = spec, (q.dtype, kv.dtype, shared.dtype)
        return latent_forward(q, kv, shared, spec, cos, sin, owned and not wants_tables)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        from ..kernels.latent import latent_backward

        cos, sin, *projections = ctx.saved_tensors
        dtables = _table_grads(projections, ctx.spec, cos, sin, (dq, dk)) if projections else (None, None)
        return *latent_backward(dq, dk, dv, ctx.spec, cos, sin, ctx.dtypes), *dtables, None, None


def _table_grads(projections, spec, cos, sin, grads) -> tuple[Tensor, Tensor]:
    """Gradients of the tables, which no family trains: the reference once more."""
    with torch.enable_grad():
        cos, sin = cos.detach().requires_grad_(), sin.detach().requires_grad_()
        q, k, _ = reference_latent(*(t.detach() for t in projections), spec, cos, sin)
        return torch.autograd.grad((q, k), (cos, sin), [g.transpose(1, 2) for g in grads])
