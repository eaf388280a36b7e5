"""What a head is, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The linear layer from hidden states to logits, and the cross-entropy after it.

    Attributes:
        hidden: H.
        vocab: V, rows of the weight (a padded vocabulary counts whole).
        bias: whether the head has one.
    """

    hidden: int
    vocab: int
    bias: bool

    def describe(self) -> str:
        """One phrase for people."""
        return f"cross-entropy of {self.hidden:,} → {self.vocab:,}{' + bias' if self.bias else ''}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"layout": "head", "hidden": self.hidden, "vocab": self.vocab, "bias": self.bias}

    def resized(self, sizes: Mapping[int, int]) -> LossSpec:
        """The same at other sizes, by value."""
        return replace(self, hidden=sizes.get(self.hidden, self.hidden), vocab=sizes.get(self.vocab, self.vocab))
