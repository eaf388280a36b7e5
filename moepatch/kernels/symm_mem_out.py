"""Tokens to their experts' ranks through memory that ranks read from each other: Triton kernels, each beside its torch reference.

Each rank *publishes* its tokens in its own buffer; after a barrier all ranks *fetch* what they need from all buffers. Axes as in `symm_mem`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import Prepared
from .jit import jit
from .routes import launches
from .symm_mem import Edges, Peers, block, wire_dtype

try:  # The references and everything that only asks need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# --- publish -------------------------------------------------------------------------------------------------------------------------


def publish_tokens(
    peers: Peers,
    offsets: tuple[int, int, int],
    x_TH: Tensor,
    ids_TK: Tensor | None,
    weights_TK: Tensor | None,
    weights_dtype: torch.dtype,
    factor: float,
    programs: int,
) -> None:
    """Copies this rank's tokens into its buffer; with global ids (as int32) and weights if they are given.

    Args:
        offsets: bytes from the start of the buffer to the tokens ``[T, H]``, their ids ``[T, K]`` and their weights ``[T, K]``.
        weights_dtype: of the weights in the buffer.
        factor: tokens are multiplied by it.
        programs: the most programs to launch; each takes every so-manieth token.
    """
    if not launches(x_TH):
        return publish_tokens_reference(peers, offsets, x_TH, ids_TK, weights_TK, weights_dtype, factor, programs)
    tokens, hidden = x_TH.shape
    if tokens == 0:
        return
    top_k = 1 if ids_TK is None else ids_TK.shape[1]
    into = [peers.starts[peers.rank] + offset for offset in offsets]
    _publisher(hidden, top_k, ids_TK is not None, factor, weights_dtype)((min(tokens, programs),), x_TH, ids_TK, weights_TK, *into, tokens)


def publish_tokens_reference(
    peers: Peers,
    offsets: tuple[int, int, int],
    x_TH: Tensor,
    ids_TK: Tensor | None,
    weights_TK: Tensor | None,
    weights_dtype: torch.dtype,
    factor: float,
    programs: int,
) -> None:
    """See `publish_tokens`."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    peers.view(peers.rank, offsets[0], tuple(x_TH.shape), x_TH.dtype).copy_(x_TH.to(wide) * factor)
    if ids_TK is not None:
        peers.view(peers.rank, offsets[1], tuple(ids_TK.shape), torch.int32).copy_(ids_TK)
        peers.view(peers.rank, offsets[2], tuple(ids_TK.shape), weights_dtype).copy_(weights_TK)


@functools.cache
def _publisher(hidden: int, top_k: int, routes: bool, factor: float, weights_dtype: torch.dtype) -> Prepared:
    constants = {"ROUTES": routes, "FACTOR": factor, "DOUBLE": weights_dtype == torch.float64}
    return Prepared(_publish_kernel, **constants, H=hidden, K=top_k, K2=triton.next_power_of_2(top_k), BLOCK=block(hidden), num_warps=4)


@jit(do_not_specialize=["tokens"])
def _publish_kernel(
    x_TH, ids_TK, weights_TK, x_at, ids_at, weights_at, tokens,
    ROUTES: tl.constexpr, FACTOR: tl.constexpr, DOUBLE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, K2)
    into_TH = tl.multiple_of(x_at.to(tl.pointer_type(x_TH.dtype.element_ty)), 16)
    token = tl.program_id(0)
    while token < tokens:  # a range would be plain integers in Triton's interpreter
        wide_token = token.to(tl.int64)
        if ROUTES:
            into_ids = ids_at.to(tl.pointer_type(tl.int32)) + wide_token * K + slot
            tl.store(into_ids, tl.load(ids_TK + wide_token * K + slot, mask=slot < K).to(tl.int32), mask=slot < K)
            number: tl.constexpr = tl.float64 if DOUBLE else tl.float32
            into_weights = weights_at.to(tl.pointer_type(number)) + wide_token * K + slot
            tl.store(into_weights, tl.load(weights_TK + wide_token * K + slot, mask=slot < K).to(number), mask=slot < K)
        begin = tl.multiple_of(wide_token * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            x = tl.load(x_TH + begin + column, mask=column < H)
            if FACTOR != 1.0:
                x = _times(x, FACTOR)
            tl.store(into_TH + begin + column, x, mask=column < H)
        token += tl.num_programs(0)


@jit()
def _times(x, FACTOR: tl.constexpr):
    """In fp32 or wider, rounded once."""
    if x.dtype == tl.float64:
        return x * FACTOR
    return (x.to(tl.float32) * FACTOR).to(x.dtype)


# --- fetch ---------------------------------------------------------------------------------------------------------------------------


def fetch_tokens(
    peers: Peers, offsets: tuple[int, int, int], like_TH: Tensor, like_TK: Tensor, edges: Edges, local_experts: int, programs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_NH``, ``ids_NK`` and ``weights_NK`` from what every rank has put into its buffer.

    Args:
        offsets: bytes from the start of each buffer to its tokens ``[T, H]``, its global ids ``[T, K]`` (int32), its weights ``[T, K]``.
        like_TH: of the width and dtype of the tokens.
        like_TK: of the width of the weights; on the way they are fp32 or wider.
        local_experts: L.
    """
    if not launches(like_TH):
        return fetch_tokens_reference(peers, offsets, like_TH, like_TK, edges, local_experts, programs)
    x_NH, ids_NK, weights_NK = _received(like_TH, like_TK, edges.rows)
    _launch_fetch(peers, offsets, x_NH, ids_NK, weights_NK, edges, local_experts, programs)
    return x_NH, ids_NK, weights_NK


def fetch_tokens_reference(
    peers: Peers, offsets: tuple[int, int, int], like_TH: Tensor, like_TK: Tensor, edges: Edges, local_experts: int, programs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fetch_tokens`."""
    _, ids_NK, weights_NK = _received(like_TH, like_TK, edges.rows)
    for rank, tokens in enumerate(edges.tokens):
        shape, rows = (tokens, like_TK.shape[1]), edges.own(rank)
        local_TK = peers.view(rank, offsets[1], shape, torch.int32) - peers.rank * local_experts
        mine_TK = (local_TK >= 0) & (local_TK < local_experts)
        ids_NK[rows] = torch.where(mine_TK, local_TK, -1)
        weights_NK[rows] = torch.where(mine_TK, peers.view(rank, offsets[2], shape, weights_NK.dtype), 0)
    return fetch_rows_reference(peers, offsets[0], like_TH, ids_NK, edges, programs), ids_NK, weights_NK


def fetch_rows(peers: Peers, offset: int, like_TH: Tensor, ids_NK: Tensor, edges: Edges, programs: int) -> Tensor:
    """``x_NH`` alone, along a dispatch that has been: a row is 0 if none of its ids is here."""
    if not launches(like_TH):
        return fetch_rows_reference(peers, offset, like_TH, ids_NK, edges, programs)
    x_NH = like_TH.new_empty(edges.rows, like_TH.shape[1])
    _launch_fetch(peers, (offset, 0, 0), x_NH, ids_NK, None, edges, 0, programs)
    return x_NH


def fetch_rows_reference(peers: Peers, offset: int, like_TH: Tensor, ids_NK: Tensor, edges: Edges, programs: int) -> Tensor:
    """See `fetch_rows`."""
    hidden = like_TH.shape[1]
    x_NH = torch.cat([peers.view(rank, offset, (tokens, hidden), like_TH.dtype) for rank, tokens in enumerate(edges.tokens)])
    return torch.where((ids_NK >= 0).any(1, keepdim=True), x_NH, 0)


def _received(like_TH: Tensor, like_TK: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    top_k = like_TK.shape[1]
    x_NH, ids_NK = like_TH.new_empty(rows, like_TH.shape[1]), like_TK.new_empty(rows, top_k, dtype=torch.int32)
    return x_NH, ids_NK, like_TK.new_empty(rows, top_k, dtype=wire_dtype(like_TK.dtype))


def _launch_fetch(peers, offsets, x_NH, ids_NK, weights_NK, edges, local_experts, programs) -> None:
    kernel = _fetcher(x_NH.shape[1], ids_NK.shape[1], len(edges.tokens), weights_NK is not None)
    grid = (min(edges.rows, programs),)
    kernel(grid, peers.address_W, edges.edge_W, x_NH, ids_NK, weights_NK, *offsets, peers.rank, edges.rows, local_experts)


@functools.cache
def _fetcher(hidden: int, top_k: int, world: int, routes: bool) -> Prepared:
    lanes = {"K2": triton.next_power_of_2(top_k), "W2": triton.next_power_of_2(world)}
    return Prepared(_fetch_kernel, ROUTES=routes, H=hidden, K=top_k, W=world, **lanes, BLOCK=block(hidden), num_warps=4)


@jit(do_not_specialize=["rank", "rows", "local_experts"])
def _fetch_kernel(
    address_W, edge_W, x_NH, ids_NK, weights_NK, x_at, ids_at, weights_at, rank, rows, local_experts,
    ROUTES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, W: tl.constexpr, W2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, peer = tl.arange(0, K2), tl.arange(0, W2)
    ends = tl.load(edge_W + 1 + peer, mask=peer < W, other=2147483647)
    # Each rank starts with the rows of the rank after it, so that not all read from one at a time, and its own come last.
    first = tl.load(edge_W + rank + 1)
    turn = tl.program_id(0)
    while turn < rows:
        row = (turn + first) % rows
        source = tl.sum((ends <= row).to(tl.int32), 0)
        token = (row - tl.load(edge_W + source)).to(tl.int64)
        address = tl.load(address_W + source)
        wide_row = row.to(tl.int64)
        if ROUTES:
            ids = (address + ids_at).to(tl.pointer_type(tl.int32)) + token * K + slot
            ids = tl.load(ids, mask=slot < K, other=-1) - rank * local_experts
            mine = (slot < K) & (ids >= 0) & (ids < local_experts)
            weights = (address + weights_at).to(tl.pointer_type(weights_NK.dtype.element_ty))
            tl.store(ids_NK + wide_row * K + slot, tl.where(mine, ids, -1), mask=slot < K)
            tl.store(weights_NK + wide_row * K + slot, tl.load(weights + token * K + slot, mask=mine, other=0), mask=slot < K)
        else:
            mine = tl.load(ids_NK + wide_row * K + slot, mask=slot < K, other=-1) >= 0
        wanted = tl.max(mine.to(tl.int32), 0) > 0
        x_TH = tl.multiple_of((address + x_at).to(tl.pointer_type(x_NH.dtype.element_ty)), 16)
        read, write = tl.multiple_of(token * H, 16 if H % 16 == 0 else 1), tl.multiple_of(wide_row * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            # What was not sent is written as 0: memory from who knows where must not meet arithmetic downstream.
            tl.store(x_NH + write + column, tl.load(x_TH + read + column, mask=(column < H) & wanted, other=0), mask=column < H)
        turn += tl.num_programs(0)
