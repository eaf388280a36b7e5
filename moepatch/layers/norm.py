"""RMS norms: what one computes, its truth in plain torch, and the patched module.

For each row, or each group of a row, ``y = x / sqrt(mean(x²) + eps) * (offset + weight)``. Families differ in where they round on the way,
in whether the weight is kept around 0 or around 1, and in whether a gate multiplies the input or the result.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kind import Kind
from ..registry import compute
from ..surgery import Patched, original_class
from ..trial import Call

#: Where a norm rounds to the dtype of its input: ``before`` the weight, ``after`` it, or already the ``scale`` ``1 / sqrt(…)``.
CASTS = ("before", "after", "scale")
GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}
#: The width at which a norm without a weight, which takes any, is tried.
_ANY_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """One RMS norm.

    Attributes:
        width: of the weight, and so of the rows; 0 without a weight, where any width goes.
        eps: is added to the mean square.
        weight: name of the weight, or None.
        cast: one of `CASTS`.
        offset: 1 where the weight is kept around 0, else 0.
        gate: one of `GATES`, for norms that are called with ``(x, gate)``, or None.
        gate_first: the gate multiplies the input, not the result.
        group: so many neighbours have a mean square of their own; 0: the whole row has one.
    """

    width: int
    eps: float
    weight: str | None
    cast: str
    offset: int = 0
    gate: str | None = None
    gate_first: bool = False
    group: int = 0

    def resized(self, sizes: Mapping[int, int]) -> NormSpec:
        """The same norm at another width."""
        return replace(self, width=sizes.get(self.width, self.width), group=sizes.get(self.group, self.group))

    def describe(self) -> str:
        """The width and what is not usual about the norm, on one line."""
        parts = [f"RMS {self.width or 'any width'} eps={self.eps:g}", f"cast {self.cast}"]
        parts += ["no weight"] if self.weight is None else []
        parts += ["zero-centred"] if self.offset else []
        parts += [f"{self.gate} gate {'first' if self.gate_first else 'last'}"] if self.gate else []
        parts += [f"groups of {self.group}"] if self.group else []
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "width": self.width,
            "layout": "RMS norm" if self.gate is None else "gated RMS norm",
            "eps": self.eps,
            "weighted": self.weight is not None,
            "cast": self.cast,
            "offset": self.offset,
            "gate": self.gate,
            "gate_first": self.gate_first,
            "group": self.group,
        }


def reference_norm(x: Tensor, weight: Tensor | None, spec: NormSpec, gate: Tensor | None = None) -> Tensor:
    """The norm in plain torch, rounding where families do.

    Args:
        x: rows ``[..., N]``.
        weight: ``[N]``, or None as in the spec.
        gate: of the shape of `x`, for a spec with a gate.

    Returns:
        Rows of the shape of `x`. The dtype is that of `x`; with ``cast="before"`` the one that it and the weight promote to.
    """
    wide = x.float()
    if gate is not None and spec.gate_first:
        wide = wide * GATES[spec.gate](gate.float())
    grouped = wide.unflatten(-1, (-1, spec.group)) if spec.group else wide
    scale = torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + spec.eps)
    y = grouped * scale if spec.cast != "scale" else grouped.to(x.dtype) * scale.to(x.dtype)
    y = y.flatten(-2) if spec.group else y
    if spec.cast == "before":
        y = y.to(x.dtype)
    if weight is not None:
        weight = weight.float() if spec.cast == "after" else weight
        y = (spec.offset + weight if spec.offset else weight) * y
    if gate is not None and not spec.gate_first:
        return (y * GATES[spec.gate](gate.float())).to(x.dtype)
    return y.to(x.dtype) if spec.cast == "after" else y


@dataclass(frozen=True)
class NormState:
    """What a patched norm needs to know."""

    spec: NormSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedNorm(Patched):
    """``norm(x [..., N])``, or ``norm(x, gate)`` for a gated one, computed by a backend. See `reference_norm` for the result."""

    _moepatch: NormState

    def forward(self, *args, **kwargs):
        """See the class; keywords go by the family's own names."""
        if kwargs:
            args = inspect.signature(original_class(self).forward).bind(self, *args, **kwargs).args[1:]
        state = self._moepatch
        spec = state.spec
        if spec.gate is not None and (len(args) < 2 or args[1] is None):
            return super().forward(*args)  # what a gated norm does without its gate is the family's own affair
        return compute("norm", state.backend)(args[0], own_weight(self), spec, *args[1:])


def own_weight(norm: PatchedNorm) -> Tensor | None:
    """The weight of a patched norm as it is now; None for one without."""
    name = norm._moepatch.spec.weight
    return None if name is None else getattr(norm, name)


def _inject(spec, backend, implementation):
    return {"": (PatchedNorm, NormState(spec, backend))}


def _trial(spec: NormSpec, dtype, device, generator) -> Call:
    """Rows of usual size, and rows so small that eps counts."""
    return _call(spec, (2, 12, 3, spec.width or _ANY_WIDTH), dtype, device, generator)


def _bench(spec: NormSpec, dtype, device, generator, tokens: int) -> Call:
    """As many rows as a sequence of `tokens` has; narrow norms stand for those of 32 attention heads."""
    width = spec.width or 2048
    return _call(spec, (1, tokens, width) if width > 512 else (1, tokens, 32, width), dtype, device, generator)


def _regimes(spec: NormSpec, dtype, device, generator):
    """One row, long sequences, and rows that hold nothing."""
    yield "with 1 row", _call(spec, (1, spec.width or _ANY_WIDTH), dtype, device, generator)
    yield "with 3 rows", _call(spec, (1, 3, spec.width or _ANY_WIDTH), dtype, device, generator)
    yield "with 5 sequences of 3 rows", _call(spec, (5, 3, spec.width or _ANY_WIDTH), dtype, device, generator)
    for tokens in (600, 4200) if spec.width <= 64 else ():
        yield f"with {tokens} rows", _call(spec, (1, tokens, spec.width or _ANY_WIDTH), dtype, device, generator)
    yield "with rows of zeros", _call(spec, (2, 3, spec.width or _ANY_WIDTH), dtype, device, generator).mapped(torch.zeros_like)


def _call(spec: NormSpec, shape, dtype, device, generator) -> Call:
    small = math.sqrt(spec.eps)
    row = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float32)
    x = torch.randn(shape, generator=generator, dtype=torch.float32) * torch.ones_like(row).masked_fill(row >= 0.5, small)
    tensors = [x] if spec.gate is None else [x, torch.randn(shape, generator=generator, dtype=torch.float32)]
    return Call(tuple(t.to(device=device, dtype=dtype) for t in tensors))


NORM = Kind(name="norm", pattern="norm", backends="norm", injections=_inject, trial=_trial, bench=_bench, regimes=_regimes, dense=True)
