"""A kernel on the CPU with the contract of the GPU's: it returns the log-sum-exp, and its backward believes what it is given.

Windows and packed sequences are computed sequence by sequence, written out.
"""

from __future__ import annotations

import torch

from moepatch.layers.attention.exact import repeat_heads
from moepatch.layers.attention.kernel import How, Kernel
from moepatch.layers.attention.sinks import with_sinks


def visible(length: int, window: tuple[int, int]) -> torch.Tensor:
    """Boolean ``[S, S]``."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    left, right = window
    return ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))


def scores(q, k, how):
    """``[B, H, S, S]`` of one block of sequences, -inf where nothing is seen."""
    values = q @ repeat_heads(k, q.shape[1] // k.shape[1]).transpose(2, 3) * how.scale
    return values.masked_fill(~visible(q.shape[2], how.window), float("-inf"))


class PlainRaw:
    """A `sinks.Raw` on ``[B, H, S, D]``, or packed on ``[T, H, D]``."""

    own_sinks = False

    def forward(self, q, k, v, how):
        if how.cu_seqlens is None:
            s = scores(q, k, how)
            return s.softmax(-1) @ repeat_heads(v, q.shape[1] // v.shape[1]), s.logsumexp(-1), ()
        parts = [self.forward(*one, how._replace(cu_seqlens=None)) for one in self._split(how, q, k, v)]
        return torch.cat([out[0].transpose(0, 1) for out, _, _ in parts]), torch.cat([lse[0] for _, lse, _ in parts], -1), ()

    def backward(self, grad, q, k, v, out, lse, rest, how):
        if how.cu_seqlens is not None:
            pieces = zip(self._split(how, grad, q, k, v, out), self._edges(how), strict=True)
            grads = [self.backward(*one, lse[None, :, a:b], (), how._replace(cu_seqlens=None)) for one, (a, b) in pieces]
            return tuple(torch.cat([g[0].transpose(0, 1) for g in each]) for each in zip(*grads, strict=True))
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = repeat_heads(k, groups), repeat_heads(v, groups)
        weights = (scores(q, k, how) - lse[..., None]).exp()
        delta = (grad * out).sum(-1, keepdim=True)
        to_scores = weights * (grad @ wide_v.transpose(2, 3) - delta) * how.scale

        def narrow(x):
            return x.unflatten(1, (-1, groups)).sum(2)

        return to_scores @ wide_k, narrow(to_scores.transpose(2, 3) @ q), narrow(weights.transpose(2, 3) @ grad)

    def by_head(self, out):
        return out if out.ndim == 4 else out.transpose(0, 1).unsqueeze(0)

    def lse_by_head(self, lse):
        return lse if lse.ndim == 3 else lse.unsqueeze(0)

    def _edges(self, how):
        edges = how.cu_seqlens.tolist()
        assert max(b - a for a, b in zip(edges, edges[1:], strict=False)) <= how.max_len
        return list(zip(edges, edges[1:], strict=False))

    def _split(self, how, *tensors):
        return [tuple(t[a:b].transpose(0, 1).unsqueeze(0) for t in tensors) for a, b in self._edges(how)]


class CpuFlashRaw(PlainRaw):
    """torch's own flash attention for the CPU: causal whole sequences without grouped heads."""

    def forward(self, q, k, v, how):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=how.scale)
        return out, lse, ()

    def backward(self, grad, q, k, v, out, lse, rest, how):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True, scale=how.scale)


class _Without(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, raw, how):
        out, lse, _ = raw.forward(q, k, v, how)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.raw, ctx.how = raw, how
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.raw.backward(grad, q, k, v, out, lse, (), ctx.how), None, None


calls: list[How] = []


def run(q, k, v, how):
    """See `Kernel.run`; every call is noted in `calls`."""
    calls.append(how)
    raw = PlainRaw()
    out = with_sinks(raw, q, k, v, how) if how.sinks is not None else _Without.apply(q, k, v, raw, how)
    return out.transpose(1, 2) if how.cu_seqlens is None else out


TWIN = Kernel("twin", lambda spec, dtype, device: "no softcap" if spec is not None and spec.softcap is not None else None, run)
