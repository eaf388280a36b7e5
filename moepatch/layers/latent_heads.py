"""Multi-head latent attention: from its up-projections to the heads that attention takes, in plain torch.

B sequences of S tokens, H heads. A query or key head has N dims without position and R dims that are rotated, D = N + R; a value head has V.
One rotated key of R dims is shared by all heads. Families' formulas are those of DeepSeek's models in transformers; `kernels.latent` does the
same in one pass each way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """One way to rotate all R dims of a part of a head.

    Attributes:
        pairs_in: whether dims 2i and 2i+1 are a pair before, else dims i and i + R/2.
        pairs_out: the same for where they are put.
        whole: whether tables have R columns of which the second half is for second numbers, else the first R/2 serve both.
        complex: whether the family gives one complex table of R/2 columns instead of cos and sin.
    """

    pairs_in: bool
    pairs_out: bool
    whole: bool
    complex: bool = False


#: Every way that is known, by name.
TURNS: dict[str, Turn] = {
    "half": Turn(pairs_in=False, pairs_out=False, whole=True),
    "pairs to halves": Turn(pairs_in=True, pairs_out=False, whole=False),
    "pairs, complex": Turn(pairs_in=True, pairs_out=True, whole=False, complex=True),
}


@dataclass(frozen=True)
class LatentHeads:
    """What lies between the up-projections and attention.

    Attributes:
        heads, nope, rope_dim, value_dim: H, N, R and V.
        rope: a key of `TURNS`, or ``none``.
        q_scale: multiplies queries before anything else.
    """

    heads: int
    nope: int
    rope_dim: int
    value_dim: int
    rope: str
    q_scale: float = 1.0

    @property
    def head_dim(self) -> int:
        """D."""
        return self.nope + self.rope_dim


def tables_of(position_embeddings: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, as views where the family has them as one complex table."""
    if position_embeddings is None:
        return None, None
    if isinstance(position_embeddings, Tensor):
        return torch.view_as_real(position_embeddings).unbind(-1)
    return tuple(position_embeddings)


def turned(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """Rotates ``[B, S, H, R]`` by tables ``[1 or B, S, R/2 or R]``; see `TURNS`."""
    how, half, dtype = TURNS[rope], x.shape[-1] // 2, x.dtype
    x = x.to(torch.promote_types(dtype, cos.dtype))  # before its numbers are used twice: their gradients are summed in that dtype
    cos_1, sin_1 = cos[..., None, :half], sin[..., None, :half]
    cos_2, sin_2 = (cos[..., None, half:], sin[..., None, half:]) if how.whole else (cos_1, sin_1)
    x_1, x_2 = x.unflatten(-1, (-1, 2)).unbind(-1) if how.pairs_in else x.chunk(2, -1)
    both = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
    return (torch.stack(both, -1).flatten(-2) if how.pairs_out else torch.cat(both, -1)).to(dtype)


def reference_latent(
    q: Tensor, kv: Tensor, shared: Tensor, spec: LatentHeads, cos: Tensor | None, sin: Tensor | None, owned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, S, D]``, ``[B, H, S, D]`` and ``[B, H, S, V]``.

    Args:
        q: ``[B, S, H*D]``, N and then R dims of each head.
        kv: ``[B, S, H*(N+V)]``, the key's N and then the value's V dims of each head.
        shared: ``[B, S, R]``, the part of the keys that all heads share.
        cos, sin: tables ``[1 or B, S, R/2 or R]``; unused without rope.
        owned: whether nobody else looks at `q` any more, so that the result may be put into it.
    """
    q, kv, shared = q.unflatten(-1, (spec.heads, -1)), kv.unflatten(-1, (spec.heads, -1)), shared.unsqueeze(2)
    q = q * spec.q_scale if spec.q_scale != 1.0 else q
    if spec.rope != "none":
        rotated = turned(q[..., spec.nope :], cos, sin, spec.rope)
        q, shared = torch.cat([q[..., : spec.nope], rotated], -1), turned(shared, cos, sin, spec.rope)
    k_nope, v = kv.split([spec.nope, spec.value_dim], -1)
    k = torch.cat([k_nope, shared.to(kv.dtype).expand(-1, -1, spec.heads, -1)], -1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
