"""What computes query, key and value heads from their joint projection: rows of the table ``attention_block``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.requirements import why_not_triton
from ..once import once_differentiable
from ..registry import register_backend
from .rope import HeadsSpec, dense_rows, reference_heads

_LARGEST_HEAD = 512


@register_backend("attention_block", "reference", rank=0, serves="plain torch")
def _reference():
    return reference_heads


def _why_not(spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the own kernels cannot serve; None if they can."""
    if (reason := why_not_triton("attention_block", dtype, device)) is not None:
        return reason
    if spec is not None and spec.heads.head_dim > _LARGEST_HEAD:
        return f"a head of {spec.heads.head_dim} does not fit into registers (at most {_LARGEST_HEAD})"
    return None


@register_backend("attention_block", "triton", rank=50, serves="head norms and rope in one Triton kernel each way", why_not=_why_not)
def _triton():
    return triton_heads


def triton_heads(
    joint: Tensor, spec: HeadsSpec, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `layers.rope.reference_heads`. Values and gate are views of `joint`; the gradient of `joint` is one contiguous matrix."""
    if cos is not None and cos.ndim != 3:
        return reference_heads(joint, spec, q_weight, k_weight, cos, sin)
    if cos is not None:
        cos, sin = dense_rows(cos), dense_rows(sin)
    q, k, v, *gate = _Heads.apply(joint, q_weight, k_weight, cos, sin, spec)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), gate[0] if gate else None


class _Heads(torch.autograd.Function):
    """``[B, S, heads, D]`` each, so that what attention reads is a transposed view as in transformers."""

    @staticmethod
    def forward(ctx, joint, q_weight, k_weight, cos, sin, spec):
        from ..kernels.rope import heads_forward

        joint = joint.contiguous()
        to_keys, keys, values = spec.splits
        if spec.touched:
            q, k = heads_forward(joint, spec, q_weight, k_weight, cos, sin)
        else:
            q = _part(joint, 0, to_keys, spec.heads).narrow(-1, 0, spec.head_dim)
            k = _part(joint, to_keys, keys, spec.kv_heads)
        v = _part(joint, to_keys + keys, values, spec.kv_heads)
        wants_tables = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(joint if spec.norm or wants_tables else None, q_weight, k_weight, cos, sin)
        ctx.spec = spec
        return (q, k, v, _part(joint, 0, to_keys, spec.heads).narrow(-1, spec.head_dim, spec.head_dim)) if spec.gated else (q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, dgate=None):
        from ..kernels.rope import heads_backward

        joint, q_weight, k_weight, cos, sin = ctx.saved_tensors
        grads = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        djoint, dq_weight, dk_weight = heads_backward(joint, ctx.spec, q_weight, k_weight, cos, sin, (*grads, dgate))
        dcos = dsin = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dcos, dsin = _table_grads(joint, ctx.spec, q_weight, k_weight, cos, sin, grads[:2])
        return djoint, dq_weight, dk_weight, dcos, dsin, None


def _part(joint: Tensor, start: int, width: int, heads: int) -> Tensor:
    """Columns of the joint projection as heads ``[B, S, heads, …]``."""
    return joint.narrow(-1, start, width).view(joint.shape[0], joint.shape[1], heads, width // heads)


def _table_grads(joint, spec, q_weight, k_weight, cos, sin, grads) -> tuple[Tensor, Tensor]:
    """Gradients of the tables, which no family trains: the reference once more."""
    with torch.enable_grad():
        cos, sin = cos.detach().requires_grad_(), sin.detach().requires_grad_()
        q, k, *_ = reference_heads(joint.detach(), spec, q_weight, k_weight, cos, sin)
        return torch.autograd.grad((q, k), (cos, sin), grads)
