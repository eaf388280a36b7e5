"""The contract of a dispatcher: tokens to the ranks of their experts, and results back.

*Dispatch* and *combine* move tokens across ranks; sorting them by expert inside a rank is `experts.routes`. A token goes to a rank at most
once, however many of its experts live there, so what arrives is tokens with their local expert ids, not one row per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .chain import Chain


@dataclass(frozen=True, kw_only=True)
class Received:
    """What a rank has after a dispatch. N tokens arrived, L experts live here.

    Attributes:
        x_NH: the tokens.
        ids_NK: their local expert ids ``0 … L-1``; -1 where the expert lives elsewhere.
        weights_NK: their routing weights in fp32; meaningless where the id is -1.
        rows: how many ids are not -1, if the host knows.
        handle: what `combine` needs. One layer's handle is never used by another, so layers may overlap.
    """

    x_NH: Tensor
    ids_NK: Tensor
    weights_NK: Tensor
    rows: int | None
    handle: Any


class Dispatcher(Protocol):
    """Not an ``nn.Module``: dispatchers have no parameters and no buffers.

    Attributes:
        name: for people.
        averages: True if the gradient of what is combined arrives at the rows divided by the number of ranks, and `dispatch` multiplies
            theirs by it, in passes that it makes anyway. One without this attribute, or with False, leaves gradients as they are.
    """

    name: str
    averages: bool

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Received:
        """Sends tokens to the ranks of their experts. Ids are global; an id outside ``0 … E-1`` goes nowhere. Differentiable in x and weights.

        Every rank of the group has to call it, also with no tokens.
        """

    def combine(self, y_NH: Tensor, handle: Any) -> Tensor:
        """Brings the weighted results of every rank back and adds them up: ``y_TH``. Differentiable."""

    def join(self, chain: Chain, place: int) -> None:
        """Optional: told that its layer is one of a chain, and which."""
