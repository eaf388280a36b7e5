"""From the joint q/k/v projection to the heads that attention takes: per-head norms and rotary embedding, in plain torch.

B sequences of S tokens (T = B·S), heads of D dims, N the width of the joint projection: all query heads, then the key heads, then the value
heads. With an output gate each query head is followed by its gate. Families' formulas are those of transformers' ``apply_rotary_pos_emb``
and of its RMS norms; `kernels.rope` does the same in one pass each way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """One way to rotate. The number of rotated dims R follows from the width of the tables.

    Attributes:
        interleaved: whether dims 2i and 2i+1 are a pair, else dims i and i + R/2.
        width: R divided by the width of the tables.
        step, second: the pair i finds its first number of a table at ``i * step`` and its second ``second`` further; None means R/2.
    """

    interleaved: bool
    width: int
    step: int
    second: int | None


#: Every way that is known, by name.
ROPES: dict[str, Rope] = {
    "half": Rope(interleaved=False, width=1, step=1, second=None),
    "half, narrow tables": Rope(interleaved=False, width=2, step=1, second=0),
    "interleaved": Rope(interleaved=True, width=1, step=1, second=0),
    "interleaved, paired tables": Rope(interleaved=True, width=1, step=2, second=1),
}


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm of query and key heads.

    Attributes:
        place: ``head`` (each head on its own), ``full`` (all heads of a token together), ``after`` (each head, after the rotation).
        eps: added to the mean square.
        offset: 1.0 where the weight is stored around 0.
        cast_first: whether the normalised value is rounded before the weight multiplies it.
    """

    place: str
    eps: float
    offset: float
    cast_first: bool


@dataclass(frozen=True)
class HeadsSpec:
    """What lies between the joint projection and attention.

    Attributes:
        heads, kv_heads, head_dim, value_dim: Hq, Hk, D and the width of value heads.
        norm: of queries and keys, or None.
        rope: a key of `ROPES`, or ``none``.
        gated: whether each query head of the projection is followed by D numbers of an output gate.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    norm: HeadNorm | None
    rope: str
    gated: bool = False

    @property
    def query_step(self) -> int:
        """From one query head to the next in the joint projection."""
        return self.head_dim * (2 if self.gated else 1)

    @property
    def splits(self) -> tuple[int, int, int]:
        """The widths of the projections of queries, keys and values."""
        return self.heads * self.query_step, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim

    @functools.cached_property
    def unrotated(self) -> HeadsSpec:
        """The same without rotation."""
        return self if self.rope == "none" else replace(self, rope="none")

    @property
    def touched(self) -> bool:
        """False if queries and keys are what was projected."""
        return self.norm is not None or self.rope != "none"


def rms_norm(x: Tensor, weight: Tensor, norm: HeadNorm) -> Tensor:
    """Normalises the last axis, as transformers' RMS norms do: statistics in fp32, the result in the dtype that torch promotes to."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.cast_first:
        return (weight + norm.offset if norm.offset else weight) * normed.to(x.dtype)
    return (normed * (weight.to(wide.dtype) + norm.offset)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """Rotates the first R dims of heads.

    Args:
        x: ``[B, S, H, D]``.
        cos, sin: tables ``[1 or B, S, W]``.
        rope: a key of `ROPES`.
    """
    how = ROPES[rope]
    rotated = cos.shape[-1] * how.width
    at = torch.arange(rotated // 2, device=x.device) * how.step
    second = rotated // 2 if how.second is None else how.second
    (cos_1, sin_1), (cos_2, sin_2) = ((cos[..., None, at + shift], sin[..., None, at + shift]) for shift in (0, second))
    part = x[..., :rotated]
    x_1, x_2 = part.unflatten(-1, (-1, 2)).unbind(-1) if how.interleaved else part.chunk(2, -1)
    turned = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
    joined = torch.stack(turned, -1).flatten(-2) if how.interleaved else torch.cat(turned, -1)
    return joined.to(x.dtype) if rotated == x.shape[-1] else torch.cat([joined.to(x.dtype), x[..., rotated:]], -1)


def dense_rows(table: Tensor) -> Tensor:
    """Cos or sin as kernels read them, one position after another; in some families they lie with the positions innermost."""
    return table if table.stride(-1) == 1 else table.contiguous()


def reference_heads(
    joint: Tensor, spec: HeadsSpec, q_norm, k_norm, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and the gate of the joint projection.

    Args:
        joint: ``[B, S, N]``.
        q_norm, k_norm: weights, or functions of a tensor (a norm that has to be called as it is); unused without a norm.
        cos, sin: tables ``[1 or B, S, W]``; unused without rope.

    Returns:
        ``[B, Hq, S, D]``, ``[B, Hk, S, D]``, ``[B, Hk, S, value_dim]`` and ``[B, S, Hq, D]`` or None.
    """
    q, k, v = joint.split(spec.splits, -1)
    q, gate = q.unflatten(-1, (spec.heads, -1)).split([spec.head_dim] * (2 if spec.gated else 1), -1) if spec.gated else (q, None)

    def treated(x: Tensor, heads: int, norm) -> Tensor:
        place = spec.norm.place if spec.norm else None
        x = _normed(x.flatten(2), norm, spec.norm) if place == "full" else x
        x = x.reshape(*joint.shape[:2], heads, spec.head_dim)
        x = _normed(x, norm, spec.norm) if place == "head" else x
        x = x if spec.rope == "none" else rotate(x, cos, sin, spec.rope)
        return (_normed(x, norm, spec.norm) if place == "after" else x).to(joint.dtype).transpose(1, 2)

    q, k = treated(q, spec.heads, q_norm), treated(k, spec.kv_heads, k_norm)
    return q, k, v.unflatten(-1, (spec.kv_heads, -1)).transpose(1, 2), gate


def _normed(x: Tensor, norm, how: HeadNorm) -> Tensor:
    return rms_norm(x, norm, how) if isinstance(norm, Tensor) else norm(x)
