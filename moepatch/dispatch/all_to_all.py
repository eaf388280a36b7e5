"""Dispatch by all-to-all over any c10d backend: NCCL on GPUs, gloo on the CPU.

Splits have to be known on the host, so each dispatch waits once for the device, for all counts together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ..once import once_differentiable
from .base import Received


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Who sends what to whom in one dispatch; W ranks, S rows sent, N rows received.

    Attributes:
        token_S: the token of each row sent, ordered by destination.
        row_TW: where token t lies among the rows sent to rank w, -1 if it is not sent there.
        sent, received: rows per rank, on the host.
        group: the ranks.
    """

    token_S: Tensor
    row_TW: Tensor
    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup


class AllToAll:
    """See the module's docstring.

    Args:
        group: the ranks that share one set of experts.
        num_experts: of all ranks together (E); rank r holds ``r*L … (r+1)*L - 1``.
    """

    name = "all_to_all"
    averages = False

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group = group
        self.num_experts = num_experts
        self.local_experts = num_experts // group.size()

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Received:
        """See `base.Dispatcher`."""
        exchange, rows = self._exchange(topk_ids_TK)
        x_NH = _Dispatch.apply(x_TH, exchange)
        ids_NK = _swap(topk_ids_TK.to(torch.int32).index_select(0, exchange.token_S), exchange.received, exchange.sent, self.group)
        local_NK = ids_NK - self.group.rank() * self.local_experts
        mine_NK = (local_NK >= 0) & (local_NK < self.local_experts)
        weights_NK = _Dispatch.apply(topk_weights_TK.to(torch.promote_types(topk_weights_TK.dtype, torch.float32)), exchange)
        # Weights of experts elsewhere travel along; masking them keeps their gradients to the ranks that used them.
        return Received(
            x_NH=x_NH,
            ids_NK=torch.where(mine_NK, local_NK, -1),
            weights_NK=torch.where(mine_NK, weights_NK, 0),
            rows=rows,
            handle=exchange,
        )

    def combine(self, y_NH: Tensor, handle: Exchange) -> Tensor:
        """See `base.Dispatcher`."""
        return _Combine.apply(y_NH, handle)

    def _exchange(self, topk_ids_TK: Tensor) -> tuple[Exchange, int]:
        """Plans a dispatch; returns with it how many (token, expert) pairs this rank will compute."""
        world = self.group.size()
        valid_TK = (topk_ids_TK >= 0) & (topk_ids_TK < self.num_experts)
        owner_TK = torch.where(valid_TK, torch.div(topk_ids_TK, self.local_experts, rounding_mode="floor"), world)
        pairs_TW = torch.zeros(topk_ids_TK.shape[0], world + 1, dtype=torch.int64, device=topk_ids_TK.device)
        pairs_TW = pairs_TW.scatter_add_(1, owner_TK.long(), torch.ones_like(owner_TK, dtype=torch.int64))[:, :world]
        goes_WT = (pairs_TW > 0).T
        # Row numbers in the order of (rank, token); the number of a token that does not go to a rank is not used.
        row_WT = goes_WT.flatten().cumsum(0).view(goes_WT.shape) - 1
        counts_W2 = torch.stack([goes_WT.sum(1), pairs_TW.sum(0)], dim=1)
        coming_W2 = _swap(counts_W2, [1] * world, [1] * world, self.group)
        sent, received, rows = (c.tolist() for c in torch.stack([counts_W2[:, 0], coming_W2[:, 0], coming_W2[:, 1]]).cpu())
        token_S = goes_WT.nonzero()[:, 1]
        row_TW = torch.where(goes_WT, row_WT, -1).T
        return Exchange(token_S=token_S, row_TW=row_TW, sent=sent, received=received, group=self.group), sum(rows)


class _Dispatch(torch.autograd.Function):
    """Tokens ``[T, H]`` to the rows ``[N, H]`` that this rank receives."""

    @staticmethod
    def forward(ctx, x_TH, exchange):
        ctx.exchange = exchange
        return _send(x_TH, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH):
        return _bring_back(grad_NH, ctx.exchange), None


class _Combine(torch.autograd.Function):
    """Rows ``[N, H]`` back to the tokens ``[T, H]`` they came from, added up over ranks."""

    @staticmethod
    def forward(ctx, y_NH, exchange):
        ctx.exchange = exchange
        return _bring_back(y_NH, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        return _send(grad_TH, ctx.exchange), None


def _send(x_TH: Tensor, exchange: Exchange) -> Tensor:
    return _swap(x_TH.index_select(0, exchange.token_S), exchange.received, exchange.sent, exchange.group)


def _bring_back(y_NH: Tensor, exchange: Exchange) -> Tensor:
    """The transposed movement of `_send`; a token's rows are added in fp32 in the order of ranks, so results repeat bit by bit."""
    y_SH = _swap(y_NH, exchange.sent, exchange.received, exchange.group)
    wide = torch.promote_types(y_SH.dtype, torch.float32)
    y_TH = y_SH.new_zeros(exchange.row_TW.shape[0], y_SH.shape[1], dtype=wide)
    if y_SH.shape[0] == 0:
        return y_TH.to(y_SH.dtype)
    for row_T in exchange.row_TW.unbind(1):
        y_TH += torch.where((row_T >= 0).unsqueeze(1), y_SH.index_select(0, row_T.clamp(min=0)).to(wide), 0)
    return y_TH.to(y_SH.dtype)


def _swap(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_to_all_single(rows.contiguous(), received, sent, group))
