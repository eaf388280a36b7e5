"""Reversible weight operations: each is pure data movement, and each knows its inverse.

An op maps a tuple of tensors to a tuple of tensors. A *chain* is a tuple of ops; `invert` turns it round. Names of axes:
E experts, A and B any two axes of a matrix.

    >>> up = torch.arange(24.).reshape(2, 3, 4)
    >>> chain = (Transpose(), Deinterleave(dim=1))
    >>> (there,) = apply_chain(chain, (up,))
    >>> (back,) = apply_chain(invert(chain), (there,))
    >>> torch.equal(up, back)
    True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..errors import LayoutError

Tensors = tuple[Tensor, ...]


class Op:
    """One reversible step. Subclasses are frozen dataclasses, so an op is a value that compares, hashes and prints."""

    #: True if the result shares the memory of the input, so that applying the op costs nothing.
    is_view: bool = False

    def __call__(self, tensors: Tensors) -> Tensors:
        raise TypeError(f"{type(self).__name__} does not say what it does: an Op defines __call__ and inverse")

    @property
    def inverse(self) -> Op:
        """The op that undoes this one, bit for bit."""
        raise TypeError(f"{type(self).__name__} has no inverse: every Op of moepatch has to be reversible")

    def resized(self, sizes: Mapping[int, int]) -> Op:
        """The op for a module of other sizes: a count of experts is translated, axes stay."""
        counts = {f.name: sizes.get(getattr(self, f.name), getattr(self, f.name)) for f in fields(self) if f.name == "num_experts"}
        return replace(self, **counts)

    def _refuse(self, tensors: Tensors, wanted: str) -> LayoutError:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        return LayoutError(f"{self}: wanted {wanted}, got {len(tensors)} tensor(s) of shape {shapes}.")


@dataclass(frozen=True)
class Transpose(Op):
    """Swaps two axes of every tensor: ``[E, A, B] -> [E, B, A]``. Its own inverse; a view."""

    dim0: int = 1
    dim1: int = 2
    is_view = True

    def __call__(self, tensors: Tensors) -> Tensors:
        if any(t.ndim <= max(self.dim0, self.dim1) for t in tensors):
            raise self._refuse(tensors, f"at least {max(self.dim0, self.dim1) + 1} axes")
        return tuple(t.transpose(self.dim0, self.dim1) for t in tensors)

    @property
    def inverse(self) -> Op:
        return self


@dataclass(frozen=True)
class Unflatten(Op):
    """Splits the leading axis into experts: ``[E*A, B] -> [E, A, B]``. A view."""

    num_experts: int
    is_view = True

    def __call__(self, tensors: Tensors) -> Tensors:
        if any(t.shape[0] % self.num_experts for t in tensors):
            raise self._refuse(tensors, f"a leading axis divisible by {self.num_experts} experts")
        return tuple(t.unflatten(0, (self.num_experts, t.shape[0] // self.num_experts)) for t in tensors)

    @property
    def inverse(self) -> Op:
        return Flatten(self.num_experts)


@dataclass(frozen=True)
class Flatten(Op):
    """Joins the expert axis with the next one: ``[E, A, B] -> [E*A, B]``."""

    num_experts: int

    def __call__(self, tensors: Tensors) -> Tensors:
        if any(t.shape[0] != self.num_experts or t.ndim < 2 for t in tensors):
            raise self._refuse(tensors, f"a leading axis of {self.num_experts} experts and one more")
        return tuple(t.flatten(0, 1) for t in tensors)

    @property
    def inverse(self) -> Op:
        return Unflatten(self.num_experts)


@dataclass(frozen=True)
class Stack(Op):
    """Joins one tensor per expert into one: E times ``[A, B] -> [E, A, B]``."""

    num_experts: int

    def __call__(self, tensors: Tensors) -> Tensors:
        if len(tensors) != self.num_experts or len({t.shape for t in tensors}) != 1:
            raise self._refuse(tensors, f"{self.num_experts} tensors of one shape")
        return (torch.stack(tensors),)

    @property
    def inverse(self) -> Op:
        return Unstack(self.num_experts)


@dataclass(frozen=True)
class Unstack(Op):
    """One tensor per expert: ``[E, A, B] ->`` E times ``[A, B]``. Views."""

    num_experts: int
    is_view = True

    def __call__(self, tensors: Tensors) -> Tensors:
        if len(tensors) != 1 or tensors[0].shape[0] != self.num_experts:
            raise self._refuse(tensors, f"one tensor with {self.num_experts} experts")
        return tensors[0].unbind(0)

    @property
    def inverse(self) -> Op:
        return Stack(self.num_experts)


@dataclass(frozen=True)
class Concat(Op):
    """Joins equal parts along an axis: gate ``[E, I, H]`` and up ``[E, I, H] -> [E, 2I, H]``."""

    dim: int = 1
    parts: int = 2

    def __call__(self, tensors: Tensors) -> Tensors:
        if len(tensors) != self.parts or len({t.shape for t in tensors}) != 1:
            raise self._refuse(tensors, f"{self.parts} tensors of one shape")
        return (torch.cat(tensors, dim=self.dim),)

    @property
    def inverse(self) -> Op:
        return Split(self.dim, self.parts)


@dataclass(frozen=True)
class Split(Op):
    """Cuts an axis into equal parts: ``[E, 2I, H] ->`` gate and up ``[E, I, H]``. Views."""

    dim: int = 1
    parts: int = 2
    is_view = True

    def __call__(self, tensors: Tensors) -> Tensors:
        if len(tensors) != 1 or tensors[0].shape[self.dim] % self.parts:
            raise self._refuse(tensors, f"one tensor whose axis {self.dim} is divisible by {self.parts}")
        return tensors[0].chunk(self.parts, dim=self.dim)

    @property
    def inverse(self) -> Op:
        return Concat(self.dim, self.parts)


@dataclass(frozen=True)
class Deinterleave(Op):
    """Sorts alternating rows into halves: ``[g0, u0, g1, u1, …] -> [g0, g1, …, u0, u1, …]`` along an axis."""

    dim: int = 1

    def __call__(self, tensors: Tensors) -> Tensors:
        if any(t.shape[self.dim] % 2 for t in tensors):
            raise self._refuse(tensors, f"an even axis {self.dim}")
        return tuple(t.unflatten(self.dim, (t.shape[self.dim] // 2, 2)).transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 1) for t in tensors)

    @property
    def inverse(self) -> Op:
        return Interleave(self.dim)


@dataclass(frozen=True)
class Interleave(Op):
    """Alternates the rows of two halves: ``[g0, g1, …, u0, u1, …] -> [g0, u0, g1, u1, …]`` along an axis."""

    dim: int = 1

    def __call__(self, tensors: Tensors) -> Tensors:
        if any(t.shape[self.dim] % 2 for t in tensors):
            raise self._refuse(tensors, f"an even axis {self.dim}")
        return tuple(torch.stack(t.chunk(2, dim=self.dim), dim=self.dim + 1).flatten(self.dim, self.dim + 1) for t in tensors)

    @property
    def inverse(self) -> Op:
        return Deinterleave(self.dim)


def apply_chain(chain: Sequence[Op], tensors: Tensors) -> Tensors:
    """Applies the ops one after the other. Raises `LayoutError` where one does not fit."""
    for op in chain:
        tensors = op(tensors)
    return tensors


def invert(chain: Sequence[Op]) -> tuple[Op, ...]:
    """The chain that undoes `chain`."""
    return tuple(op.inverse for op in reversed(chain))
