"""The values that matching produces: what was found (`Site`), what was left alone (`Refusal`) and what was nearly taken (`Left`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Spec(Protocol):
    """What a module computes. Any hashable value with these two methods will do; equal specs make one pattern."""

    def describe(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Site:
    """One module that moepatch knows how to serve.

    Attributes:
        kind: the name of its `Kind`: which classes are injected and how it is tried.
        fqns: all of its names in the model.
        class_name: its class as it was found.
        spec: what it computes.
        now: what computes it before the patch, in words.
        dtype, device: of its weights, as strings (``bfloat16``, ``cuda:0``).
    """

    kind: str
    fqns: tuple[str, ...]
    class_name: str
    spec: Spec
    now: str
    dtype: str
    device: str

    @property
    def fqn(self) -> str:
        """The first name."""
        return self.fqns[0]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A module that looks like part of a mixture of experts and is left alone.

    Attributes:
        fqns: all of its names in the model.
        class_name: its class.
        reason: why, with the numbers.
        hint: what would help.
    """

    fqns: tuple[str, ...]
    class_name: str
    reason: str
    hint: str = ""

    @property
    def fqn(self) -> str:
        """The first name."""
        return self.fqns[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"fqns": list(self.fqns), "class": self.class_name, "reason": self.reason, "hint": self.hint}


@dataclass(frozen=True, kw_only=True)
class Left:
    """A module that has the weights or the name of a kind, and keeps its own forward: a near miss.

    Attributes:
        kind: the name of the `Kind` that it nearly is.
        fqns: all of its names in the model.
        class_name: its class.
        reason: the one thing that was in the way, with the name or the numbers, as the end of a sentence ("the argument `cache` is not known").
    """

    kind: str
    fqns: tuple[str, ...]
    class_name: str
    reason: str

    @property
    def fqn(self) -> str:
        """The first name."""
        return self.fqns[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "fqns": list(self.fqns), "class": self.class_name, "reason": self.reason}
