"""Sorting tokens by expert and back: *permute* and *unpermute* of one rank, pure data movement with exact gradients.

T tokens, K experts per token, R = T*K routed rows, E experts. An id outside ``0 … E-1`` is a *sentinel*: the token has no
expert in that slot. Sentinel rows are sorted behind all others, past the last offset, where no GEMM reads or writes them, so
whatever memory holds there never reaches a result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routes(NamedTuple):
    """Who goes where. Made once per layer and call by one sort; nothing here waits for the device.

    Attributes:
        order_R: for each sorted row, its slot ``t*K + k`` in the router's choice.
        row_S: the inverse: for each of the S = T*K slots, its sorted row.
        offs_E: int32, the end of each expert's rows: expert e owns rows ``offs[e-1] … offs[e]-1``.
        expert_R: for each sorted row its expert, E for a sentinel.
        top_k: K.
    """

    order_R: Tensor
    row_S: Tensor
    offs_E: Tensor
    expert_R: Tensor
    top_k: int

    @property
    def token_R(self) -> Tensor:
        """For each sorted row, its token."""
        return torch.div(self.order_R, self.top_k, rounding_mode="floor")


def sort_routes(topk_ids_TK: Tensor, num_experts: int, rows: int | None = None) -> Routes:
    """Sorts the router's choice by expert.

    Args:
        topk_ids_TK: integer ids ``[T, K]``; any id outside ``0 … num_experts-1`` means "no expert". Duplicates are allowed.
        num_experts: E.
        rows: how many ids are not sentinels, if the host knows: then R is this, and sentinels have no rows at all.

    The sort is stable, so that a recomputation (activation checkpointing) sees the same order.
    """
    ids_R = topk_ids_TK.reshape(-1)
    ids_R = torch.where((ids_R < 0) | (ids_R > num_experts), num_experts, ids_R)
    expert_R, order_R = torch.sort(ids_R, stable=True)
    edges_E = torch.arange(num_experts, device=ids_R.device, dtype=ids_R.dtype)
    offs_E = torch.searchsorted(expert_R, edges_E, right=True).to(torch.int32)
    row_S = torch.empty_like(order_R)
    row_S[order_R] = torch.arange(order_R.numel(), device=order_R.device, dtype=order_R.dtype)
    return Routes(order_R[:rows], row_S, offs_E, expert_R[:rows], topk_ids_TK.shape[-1])


def gather_rows(x_TH: Tensor, routes: Routes) -> Tensor:
    """``x_RH``: each routed row's token. Not recorded by autograd: callers own the backward."""
    return x_TH.index_select(0, routes.token_R)


def sum_rows(x_RH: Tensor, routes: Routes) -> Tensor:
    """``y_TH``: for each token the sum of its rows, sentinels left out; accumulated in fp32 and rounded once."""
    tokens = routes.row_S.numel() // routes.top_k
    if x_RH.shape[0] == 0:
        return x_RH.new_zeros(tokens, x_RH.shape[1])
    routed_SH = _rows_of_slots(x_RH, routes)
    return routed_SH.view(tokens, routes.top_k, x_RH.shape[1]).sum(dim=1)


def _rows_of_slots(x_RH: Tensor, routes: Routes) -> Tensor:
    """For each slot its row, 0 for sentinels."""
    routed_SH = x_RH.index_select(0, routes.row_S.clamp(max=x_RH.shape[0] - 1))
    # The number of rows with an expert is compared on the device: reading its value here would wait for it.
    sentinel_S = routes.row_S >= routes.offs_E[-1]
    return routed_SH.masked_fill_(sentinel_S.view(-1, *[1] * (x_RH.ndim - 1)), 0)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, *routes):
        *tensors, ctx.top_k = routes
        ctx.save_for_backward(*tensors)
        return sum_rows(x_RH, Routes(*routes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        # Sentinel rows get their token's gradient too; no GEMM reads them, and sum_rows masks what becomes of them.
        routes = Routes(*ctx.saved_tensors, ctx.top_k)
        return gather_rows(grad_TH, routes), *(None for _ in routes)


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights_TK, *routes):
        *tensors, ctx.top_k = routes
        ctx.save_for_backward(*tensors)
        routes = Routes(*routes)
        # Not in place: under torch 2.11's compiler, what a forward returns has no gradient if it was written in place.
        return weights_TK.reshape(-1).index_select(0, routes.order_R).masked_fill(_sentinels(routes), 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_R):
        routes = Routes(*ctx.saved_tensors, ctx.top_k)
        slots = routes.row_S.numel()
        grad_S = _rows_of_slots(grad_R, routes) if grad_R.shape[0] else grad_R.new_zeros(slots)
        return grad_S.view(slots // routes.top_k, routes.top_k), *(None for _ in routes)


def permute_weights(weights_TK: Tensor, routes: Routes) -> Tensor:
    """Routing weights ``[T, K] -> [R]`` in sorted order, 0 for sentinels; differentiable."""
    return _PermuteWeights.apply(weights_TK, *routes)


def unpermute(x_RH: Tensor, routes: Routes) -> Tensor:
    """Rows ``[R, H]`` summed back to tokens ``[T, H]``; differentiable. The inverse of the permutation when K is 1."""
    return _Unpermute.apply(x_RH, *routes)


def zero_sentinels(x_RH: Tensor, routes: Routes) -> Tensor:
    """Rows with the undefined ones of sentinels set to 0, for whoever is about to read all rows; differentiable."""
    return x_RH.masked_fill(_sentinels(routes).unsqueeze(-1), 0)


def _sentinels(routes: Routes) -> Tensor:
    return routes.expert_R >= routes.offs_E.numel()
