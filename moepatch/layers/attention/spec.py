"""What an attention computes: the value on which kernels, backends and plans agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

#: How far a query sees, keys to the left and to the right of it; -1: all of them.
Window = tuple[int, int]

CAUSAL: Window = (-1, 0)
FULL: Window = (-1, -1)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One form of attention: ``softmax(cap(q k^T * scale) + mask, sink) v``, without any tensor.

    Attributes:
        heads, kv_heads: of the queries, and of the keys and values.
        head_dim, v_head_dim: of queries and keys, and of values.
        causal: whether a query sees keys to its right.
        window: how many keys a query sees to one side, its own position included; None: all.
        sinks: whether a learned logit for each head takes part in the softmax and is then dropped.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None: they stay.
        packed: whether a row holds several sequences that must not see each other.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    causal: bool = True
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    packed: bool = False

    @property
    def reach(self) -> Window:
        """The window as kernels want it."""
        left = -1 if self.window is None else self.window - 1
        return (left, 0) if self.causal else (left, left)

    def describe(self) -> str:
        """On one line."""
        dims = f"D={self.head_dim}" if self.head_dim == self.v_head_dim else f"D={self.head_dim}/{self.v_head_dim}"
        words = [f"{self.heads}/{self.kv_heads} heads {dims}", "causal" if self.causal else "bidirectional"]
        words += [f"window {self.window}"] if self.window is not None else []
        words += ["sinks"] if self.sinks else []
        words += [f"softcap {self.softcap:g}"] if self.softcap is not None else []
        return " ".join(words + ["packed"] if self.packed else words)


@dataclass(frozen=True)
class AttentionUse:
    """The attentions of all layers that share one configuration, and so one attention function.

    Attributes:
        forms: every form that occurs, in the order of the layers, with the number of layers.
    """

    forms: tuple[tuple[AttentionSpec, int], ...]

    def describe(self) -> str:
        """On one line."""
        return "; ".join(f"{count} x {form.describe()}" for form, count in self.forms)

    def to_dict(self) -> dict[str, Any]:
        """For people and programs that read JSON."""
        kinds = ["sinks"] * any(f.sinks for f, _ in self.forms) + ["window"] * any(f.window is not None for f, _ in self.forms)
        kinds += ["softcap"] * any(f.softcap is not None for f, _ in self.forms)
        return {"layout": " ".join(kinds) or "plain", "forms": [{**vars(form), "layers": count} for form, count in self.forms]}

    def resized(self, sizes: Mapping[int, int]) -> AttentionUse:
        """The same with other head dims."""
        forms = (
            (replace(f, head_dim=sizes.get(f.head_dim, f.head_dim), v_head_dim=sizes.get(f.v_head_dim, f.v_head_dim)), count) for f, count in self.forms
        )
        return AttentionUse(tuple(forms))
