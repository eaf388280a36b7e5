"""All of an attention module as one differentiable function: q/k/v projections, heads, attention, output projection.

Where nothing between them is anybody else's (no hooks, no LoRA, no cache that holds something), one node of autograd stands for a dozen, and
each way is a row of calls without views and wrappers in between: on a fast GPU a layer of a few thousand tokens waits for Python otherwise.
The kernels are those of the long way in `attention_block`, and so are the numbers.

B sequences of S tokens, H hidden, Hq query heads of D dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout.adjacent import joined
from ..once import once_differentiable
from .attention.kernel import How, Raw
from .attention.sinks import attend, attend_backward
from .rope import HeadsSpec


class Span(NamedTuple):
    """What is computed.

    Attributes:
        heads: between the projections and attention; without an output gate.
        raw, how: the attention kernel; sinks are given apart.
        biased: whether the projections of queries, keys and values have biases.
        cached: whether keys and values are wanted too, for a cache.
    """

    heads: HeadsSpec
    raw: Raw
    how: How
    biased: bool
    cached: bool


def attention_span(
    x: Tensor,
    tables: tuple[Tensor | None, Tensor | None],
    norms: tuple[Tensor | None, Tensor | None],
    output: tuple[Tensor, Tensor | None],
    projections: tuple[Tensor, ...],
    span: Span,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``[B, S, H]`` of tokens ``[B, S, H]``; if they are wanted, with keys and values ``[B, heads, S, D]``.

    Args:
        x: in the dtype of the weights.
        tables: cos and sin ``[1 or B, S, W]``, which get no gradient.
        norms: weights of the norms of queries and keys.
        output: weight and bias of the output projection.
        projections: weights of queries, keys and values, then their biases.
        span: the rest.
    """
    sinks = span.how.sinks
    return _Span.apply(x, *tables, *norms, *output, sinks, span._replace(how=span.how._replace(sinks=None)), *projections)


class _Span(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, q_norm, k_norm, output, output_bias, sinks, span, *projections):
        heads, tokens_first = span.heads, span.raw.tokens_first
        joint = F.linear(x, joined(projections[:3]), joined(projections[3:]) if span.biased else None)
        q, k, v = _split(joint, heads, q_norm, k_norm, cos, sin)
        if not tokens_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse, rest = attend(span.raw, q, k, v, span.how._replace(sinks=sinks))
        ctx.span = span
        ctx.save_for_backward(
            x, cos, sin, q_norm, k_norm, output, sinks, joint if heads.norm else None, q, k, v, out, lse, *projections[:3], *rest
        )
        y = F.linear(_tokens(out, tokens_first), output, output_bias)
        if not span.cached:
            return y
        ctx.set_materialize_grads(False)  # who looks at the cache of a forward pass does so without gradients, nearly always
        return y, k.transpose(1, 2) if tokens_first else k, v.transpose(1, 2) if tokens_first else v

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dkeys=None, dvalues=None):
        from ..kernels.rope import heads_backward

        x, cos, sin, q_norm, k_norm, output, sinks, joint, q, k, v, out, lse, w_q, w_k, w_v, *rest = ctx.saved_tensors
        wanted, (heads, raw, how, biased, _) = ctx.needs_input_grad, ctx.span
        dy = x.new_zeros(*x.shape[:2], output.shape[0]) if dy is None else dy
        dy_TH = dy.reshape(-1, dy.shape[-1])
        out_TN = _tokens(out, raw.tokens_first).flatten(0, 1)
        doutput = dy_TH.t() @ out_TN if wanted[5] else None
        dbias = dy_TH.sum(0) if wanted[6] else None
        dout = (dy_TH @ output).view(*x.shape[:2], heads.heads, heads.value_dim)
        dout = dout if raw.tokens_first else dout.transpose(1, 2)
        *grads, dsinks = attend_backward(raw, dout, q, k, v, out, lse, tuple(rest), how._replace(sinks=sinks), wanted[7])
        if raw.tokens_first:
            grads = [g.transpose(1, 2) for g in grads]
        grads = [grads[0], *(g if more is None else g + more for g, more in zip(grads[1:], (dkeys, dvalues), strict=True))]
        djoint, dq_norm, dk_norm = heads_backward(joint, heads, q_norm, k_norm, cos, sin, (*grads, None))
        djoint_TN = djoint.view(-1, djoint.shape[-1])
        dx = (djoint_TN @ joined((w_q, w_k, w_v))).view(x.shape) if wanted[0] else None
        dweights = dbiases = (None, None, None)
        if any(wanted[9:12]):
            dweights = (djoint_TN.t() @ x.reshape(-1, x.shape[-1])).split(heads.splits)
        if any(wanted[12:]):
            dbiases = djoint_TN.sum(0).split(heads.splits)
        return dx, None, None, dq_norm, dk_norm, doutput, dbias, dsinks, None, *dweights, *(dbiases if biased else ())


def _split(joint: Tensor, heads: HeadsSpec, q_norm, k_norm, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, S, heads, D]``."""
    from ..kernels.rope import heads_forward, turn_heads

    to_keys, keys, values = heads.splits
    if heads.norm:
        q, k = heads_forward(joint, heads, q_norm, k_norm, cos, sin)
    else:
        if heads.touched:  # nobody else has seen the projection, and the backward pass does not need it
            turn_heads(joint, heads, cos, sin)
        q, k = _part(joint, 0, to_keys, heads.heads), _part(joint, to_keys, keys, heads.kv_heads)
    return q, k, _part(joint, to_keys + keys, values, heads.kv_heads)


def _part(joint: Tensor, start: int, width: int, heads: int) -> Tensor:
    batch, sequence, row = joint.shape
    dim = width // heads
    return joint.as_strided((batch, sequence, heads, dim), (sequence * row, row, dim, 1), joint.storage_offset() + start)


def _tokens(out: Tensor, tokens_first: bool) -> Tensor:
    """An attention's result as ``[B, S, heads * D]``: a view, where the kernel has kept the layout of the queries."""
    return (out if tokens_first else out.transpose(1, 2)).flatten(2)
