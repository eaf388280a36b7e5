"""What a kernel is, and the choice of one for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...needs import BF16_FP16, missing
from .spec import AttentionSpec, AttentionUse, Window


class How(NamedTuple):
    """What a kernel has to know besides queries, keys and values.

    Attributes:
        scale: of the scores.
        window: how far a query sees.
        sinks: logits ``[H]``, or None.
        softcap: or None.
        cu_seqlens: int32 ``[N+1]`` if sequences are packed, else None.
        max_len: of the longest packed sequence.
    """

    scale: float
    window: Window
    sinks: Tensor | None = None
    softcap: float | None = None
    cu_seqlens: Tensor | None = None
    max_len: int = 0


class Raw(Protocol):
    """A kernel's two passes, without autograd.

    Attributes:
        tokens_first: whether tensors are ``[B, S, H, D]``, else ``[B, H, S, D]``.
        own_sinks: whether it takes ``how.sinks`` into account; one that does not computes without them.
    """

    tokens_first: bool
    own_sinks: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """The result, the log-sum-exp and what else the backward pass needs."""

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple, how: How) -> tuple[Tensor, ...]:
        """The gradients of q, k and v, and of ``how.sinks`` if it takes them into account and there are any."""

    def by_head(self, out: Tensor) -> Tensor:
        """A view ``[B, H, S, D]`` of a result, whatever the kernel's layout."""

    def lse_by_head(self, lse: Tensor) -> Tensor:
        """A view ``[B, H, S]`` of a log-sum-exp."""


@dataclass(frozen=True)
class Kernel:
    """One library's attention.

    Attributes:
        name: for people.
        why_not: from (spec, dtype, device) to None if it serves there, else the reason; spec None asks about the machine alone.
        run: from q ``[B, H, S, D]``, k and v ``[B, G, S, D]`` to ``[B, S, H, Dv]``, or with ``how.cu_seqlens`` from ``[T, heads, dim]`` to
            ``[T, H, Dv]``. Differentiable.
        raw: gives the same without autograd where the library has it so, for whole sequences and values as wide as keys; else None.
    """

    name: str
    why_not: Callable[[AttentionSpec | None, torch.dtype, torch.device], str | None]
    run: Callable[[Tensor, Tensor, Tensor, How], Tensor]
    raw: Callable[[], Raw | None] = lambda: None


def first_that_serves(kernels: Sequence[Kernel], spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel for one form of attention."""
    return next((kernel for kernel in kernels if kernel.why_not(spec, dtype, device) is None), None)


def why_not_all(kernels: Sequence[Kernel], own: int, use: AttentionUse | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend, led by its first kernel, is not for a model: none of its own kernels serves a layer, or a layer is served by none.

    Args:
        kernels: the backend's own, then those that serve what is left over.
        own: how many are its own.
        use, dtype, device: as for `Kernel.why_not`, for all layers.
    """
    leader = kernels[0]
    reason = leader.why_not(None, dtype, device)
    if reason is not None or use is None:
        return reason
    reasons = [leader.why_not(form, dtype, device) for form, _ in use.forms]
    if not any(first_that_serves(kernels[:own], form, dtype, device) for form, _ in use.forms):
        return reasons[0]
    unserved = [form for form, _ in use.forms if first_that_serves(kernels, form, dtype, device) is None]
    return f"{unserved[0].describe()}: {leader.why_not(unserved[0], dtype, device)}" if unserved else None


def needs_gpu(dtype: torch.dtype, device: torch.device, capability: tuple[int, int], *libraries: str) -> str | None:
    """What all fused kernels ask of a machine."""
    return missing(dtype, device, *libraries, dtypes=BF16_FP16, capability=capability)


def wrong_dims(spec: AttentionSpec, limit: int) -> str | None:
    """Head dims and head counts that no kernel takes."""
    for dim in (spec.head_dim, spec.v_head_dim):
        if dim % 8 or dim > limit:
            return f"needs head dims that are multiples of 8 up to {limit}, this has {dim}"
    return wrong_heads(spec)


def wrong_heads(spec: AttentionSpec) -> str | None:
    """Head counts that no kernel takes."""
    return None if spec.heads % spec.kv_heads == 0 else f"needs as many queries for each key head, this has {spec.heads}/{spec.kv_heads}"
