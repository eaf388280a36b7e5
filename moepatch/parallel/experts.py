"""The experts module of one rank: dispatch, this rank's experts, combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.base import Dispatcher
from ..errors import MoePatchError
from ..experts.module import ExpertsState, PatchedExperts, cannot_follow


@dataclass(frozen=True)
class ShardedState(ExpertsState):
    """`spec` is this rank's share; see `experts.module.ExpertsState`.

    Attributes:
        num_experts: of all ranks together.
        dispatcher: moves tokens between the ranks of one set of experts.
        ranks: how many ranks share the set (ep).
    """

    num_experts: int
    dispatcher: Dispatcher
    ranks: int

    def __str__(self) -> str:
        return f"{self.spec.describe()} of {self.num_experts}, backend={self.backend}, {self.dispatcher.name} ep={self.ranks}"


class PatchedShardedExperts(PatchedExperts):
    """Takes the tokens of this rank and returns their results, wherever their experts live. Every rank has to call it.

    Gradients: every rank's loss counts 1/ranks of the whole, because data parallelism averages gradients over ranks. An expert's weight is
    averaged over those ranks that hold a copy of it, but gets gradients from the tokens of all `ranks` that share it, so they are divided by
    `ranks` on their way in; what goes on to tokens and routing weights is multiplied back. The dispatcher does it in passing, or it costs
    passes over the tokens here, never one over the weights.
    """

    _moepatch: ShardedState

    def traced(self, family, own, args, kwargs):
        """Refuses: the family's code knows of no other ranks."""
        raise MoePatchError(
            f"{type(self).__name__}: torch.func transforms and torch.jit.trace cannot look through experts that are spread over {self._moepatch.ranks} ranks. "
            "Call moepatch.restore(model) first, or use them on a model that was optimized without a mesh."
        )

    def leave_to_family(self) -> None:
        """Raises: a family's code needs all experts, and this rank has its share.

        Raises:
            MoePatchError: always.
        """
        raise MoePatchError(cannot_follow(self, f"this rank has {self._moepatch.spec.num_experts} of {self._moepatch.num_experts} experts"))

    def _through_experts(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, rows: int | None = None, ranks: int = 1) -> Tensor:
        state = self._moepatch
        dispatcher, ranks = state.dispatcher, state.ranks
        received = dispatcher.dispatch(x_TH, topk_ids_TK, topk_weights_TK)
        if ranks == 1 or getattr(dispatcher, "averages", False):
            y_NH = super()._through_experts(received.x_NH, received.ids_NK, received.weights_NK, received.rows, ranks)
            return dispatcher.combine(y_NH, received.handle)
        x_NH, weights_NK = (_ScaleGradient.apply(t, float(ranks)) for t in (received.x_NH, received.weights_NK))
        y_NH = super()._through_experts(x_NH, received.ids_NK, weights_NK, received.rows, ranks)
        return dispatcher.combine(_ScaleGradient.apply(y_NH, 1 / ranks), received.handle)


class _ScaleGradient(torch.autograd.Function):
    """The identity, with a gradient times `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
