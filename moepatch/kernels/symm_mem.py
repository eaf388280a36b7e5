"""Rows between the buffers of ranks that read each other's memory: Triton kernels, each beside its torch reference.

Row ``edges[s] + t`` of any rank belongs to token t of source rank s, so N is the tokens of all W ranks together. T tokens of this rank,
K experts per token, L experts on a rank, H hidden. A *buffer* is the bytes that one rank lets the others read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:  # The references and everything that only asks need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class Peers:
    """The buffers of all ranks as one of them sees them.

    Attributes:
        buffers: uint8, all of one size, by rank.
        address_W: int64, where they start, on the device.
        rank: whose view this is.
    """

    buffers: list[Tensor]
    address_W: Tensor
    rank: int

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in the buffer of `rank`, `offset` bytes from its start."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.buffers[rank].narrow(0, offset, size).view(dtype).view(shape)


@dataclass(frozen=True)
class Edges:
    """Whose rows are whose.

    Attributes:
        tokens: T of every rank.
        edge_W: int32 ``[W+1]`` on the device: rank s owns rows ``edge[s] … edge[s+1]-1``.
    """

    tokens: tuple[int, ...]
    edge_W: Tensor

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.tokens)

    def start(self, rank: int) -> int:
        """The first row of a rank."""
        return sum(self.tokens[:rank])


def _jit(**options):
    return triton.jit(**options) if triton else lambda function: function


def _block(hidden: int) -> int:
    """Columns per step: what leaves no tail if that can be, so that 4 warps move 16 or 32 bytes a thread."""
    return next((b for b in (2048, 1024) if hidden % b == 0), min(2048, triton.next_power_of_2(hidden)))


# --- stage ---------------------------------------------------------------------------------------------------------------------------


def stage_rows(peers: Peers, offset: int, y_NH: Tensor, ids_NK: Tensor, edges: Edges, programs: int) -> None:
    """Copies what other ranks will fetch into this rank's buffer: the rows of their tokens that have an id.

    Args:
        offset: bytes from the start of the buffer to row 0.
        programs: the most programs to launch; each takes every so-manieth row.
    """
    rows, hidden = y_NH.shape
    into_NH = peers.view(peers.rank, offset, (rows, hidden), y_NH.dtype)
    top_k = ids_NK.shape[1]
    _stage_kernel[(min(rows, programs),)](
        y_NH, ids_NK, into_NH, edges.start(peers.rank), edges.start(peers.rank + 1), rows,
        H=hidden, K=top_k, K2=triton.next_power_of_2(top_k), BLOCK=_block(hidden), num_warps=4,
    )  # fmt: skip


def stage_rows_reference(peers: Peers, offset: int, y_NH: Tensor, ids_NK: Tensor, edges: Edges, programs: int) -> None:
    """See `stage_rows`."""
    into_NH = peers.view(peers.rank, offset, tuple(y_NH.shape), y_NH.dtype)
    wanted_N = (ids_NK >= 0).any(1)
    wanted_N[edges.start(peers.rank) : edges.start(peers.rank + 1)] = False
    into_NH.copy_(torch.where(wanted_N.unsqueeze(1), y_NH, into_NH))


@_jit(do_not_specialize=["own_start", "own_end", "rows"])
def _stage_kernel(
    y_NH, ids_NK, into_NH, own_start, own_end, rows, H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    slot = tl.arange(0, K2)
    row = tl.program_id(0)
    while row < rows:  # a range would be plain integers in Triton's interpreter
        ids = tl.load(ids_NK + row.to(tl.int64) * K + slot, mask=slot < K, other=-1)
        wanted = (tl.max(ids, 0) >= 0) & ((row < own_start) | (row >= own_end))
        begin = tl.multiple_of(row.to(tl.int64) * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            here = (column < H) & wanted
            tl.store(into_NH + begin + column, tl.load(y_NH + begin + column, mask=here), mask=here)
        row += tl.num_programs(0)


# --- fetch ---------------------------------------------------------------------------------------------------------------------------


def fetch_tokens(
    peers: Peers, offsets: tuple[int, int, int], x_TH: Tensor, like_TK: Tensor, edges: Edges, local_experts: int, programs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_NH``, ``ids_NK`` and ``weights_NK`` from what every rank has put into its buffer.

    Args:
        offsets: bytes from the start of each buffer to its tokens ``[T, H]``, its global ids ``[T, K]`` (int32), its weights ``[T, K]``.
        x_TH: this rank's own tokens, read here instead of in the buffer.
        like_TK: of the shape and dtype of the weights.
        local_experts: L.
    """
    x_NH, ids_NK, weights_NK = _received(x_TH, like_TK, edges.rows)
    _launch_fetch(peers, offsets, x_TH, x_NH, ids_NK, weights_NK, edges, local_experts, programs)
    return x_NH, ids_NK, weights_NK


def fetch_tokens_reference(
    peers: Peers, offsets: tuple[int, int, int], x_TH: Tensor, like_TK: Tensor, edges: Edges, local_experts: int, programs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fetch_tokens`."""
    _, ids_NK, weights_NK = _received(x_TH, like_TK, edges.rows)
    for rank, tokens in enumerate(edges.tokens):
        shape, rows = (tokens, like_TK.shape[1]), slice(edges.start(rank), edges.start(rank + 1))
        local_TK = peers.view(rank, offsets[1], shape, torch.int32) - peers.rank * local_experts
        mine_TK = (local_TK >= 0) & (local_TK < local_experts)
        ids_NK[rows] = torch.where(mine_TK, local_TK, -1)
        weights_NK[rows] = torch.where(mine_TK, peers.view(rank, offsets[2], shape, like_TK.dtype), 0)
    return fetch_rows_reference(peers, offsets[0], x_TH, ids_NK, edges, programs), ids_NK, weights_NK


def fetch_rows(peers: Peers, offset: int, x_TH: Tensor, ids_NK: Tensor, edges: Edges, programs: int) -> Tensor:
    """``x_NH`` alone, along a dispatch that has been: a row is 0 if none of its ids is here."""
    x_NH = x_TH.new_empty(edges.rows, x_TH.shape[1])
    _launch_fetch(peers, (offset, 0, 0), x_TH, x_NH, ids_NK, None, edges, 0, programs)
    return x_NH


def fetch_rows_reference(peers: Peers, offset: int, x_TH: Tensor, ids_NK: Tensor, edges: Edges, programs: int) -> Tensor:
    """See `fetch_rows`."""
    hidden = x_TH.shape[1]
    by_rank = [peers.view(rank, offset, (tokens, hidden), x_TH.dtype) for rank, tokens in enumerate(edges.tokens)]
    by_rank[peers.rank] = x_TH
    x_NH = torch.cat(by_rank)
    return torch.where((ids_NK >= 0).any(1, keepdim=True), x_NH, 0)


def _received(x_TH: Tensor, like_TK: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    top_k = like_TK.shape[1]
    return x_TH.new_empty(rows, x_TH.shape[1]), like_TK.new_empty(rows, top_k, dtype=torch.int32), like_TK.new_empty(rows, top_k)


def _launch_fetch(peers, offsets, x_TH, x_NH, ids_NK, weights_NK, edges, local_experts, programs) -> None:
    hidden, top_k, world = x_NH.shape[1], ids_NK.shape[1], len(edges.tokens)
    _fetch_kernel[(min(edges.rows, programs),)](
        peers.address_W, edges.edge_W, x_TH, x_NH, ids_NK, weights_NK, *offsets, peers.rank, edges.rows, local_experts,
        ROUTES=weights_NK is not None, H=hidden, K=top_k, K2=triton.next_power_of_2(top_k), W=world, W2=triton.next_power_of_2(world),
        BLOCK=_block(hidden), num_warps=4,
    )  # fmt: skip


@_jit(do_not_specialize=["rank", "rows", "local_experts"])
def _fetch_kernel(
    address_W, edge_W, x_TH, x_NH, ids_NK, weights_NK, x_at, ids_at, weights_at, rank, rows, local_experts,
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
        x = tl.where(source == rank, x_TH.to(tl.int64), address + x_at).to(tl.pointer_type(x_TH.dtype.element_ty))
        x = tl.multiple_of(x, 16)
        read, write = tl.multiple_of(token * H, 16 if H % 16 == 0 else 1), tl.multiple_of(wide_row * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            # What was not sent is written as 0: memory from who knows where must not meet arithmetic downstream.
            tl.store(x_NH + write + column, tl.load(x + read + column, mask=(column < H) & wanted, other=0), mask=column < H)
        turn += tl.num_programs(0)


# --- bring back ----------------------------------------------------------------------------------------------------------------------


def bring_back(
    peers: Peers,
    offsets: tuple[int, int],
    y_NH: Tensor,
    ids_TK: Tensor,
    edges: Edges,
    local_experts: int,
    weights_dtype: torch.dtype | None,
    programs: int,
) -> tuple[Tensor, Tensor | None]:
    """``y_TH``: for each token of this rank the sum of its rows on all ranks, in fp32 and in the order of ranks; rounded once.

    Args:
        offsets: bytes from the start of each buffer to its rows ``[N, H]`` and to numbers ``[N, K]`` of `weights_dtype`.
        y_NH: this rank's own rows, read here instead of in the buffer.
        ids_TK: global expert ids of the tokens.
        weights_dtype: if given, each token's numbers ``[T, K]`` come back too, each from the rank that has the expert; 0 for no expert.
    """
    tokens, hidden, top_k, world = ids_TK.shape[0], y_NH.shape[1], ids_TK.shape[1], len(edges.tokens)
    y_TH = y_NH.new_empty(tokens, hidden)
    weights_TK = None if weights_dtype is None else y_NH.new_empty(tokens, top_k, dtype=weights_dtype)
    if tokens:
        _bring_back_kernel[(min(tokens, programs),)](
            peers.address_W, y_NH, ids_TK, y_TH, weights_TK, *offsets, peers.rank, edges.start(peers.rank), tokens, local_experts,
            WEIGHTS=weights_dtype is not None, WIDE=tl.float64 if y_NH.dtype == torch.float64 else tl.float32,
            H=hidden, K=top_k, K2=triton.next_power_of_2(top_k), W=world, BLOCK=_block(hidden), num_warps=4,
        )  # fmt: skip
    return y_TH, weights_TK


def bring_back_reference(
    peers: Peers,
    offsets: tuple[int, int],
    y_NH: Tensor,
    ids_TK: Tensor,
    edges: Edges,
    local_experts: int,
    weights_dtype: torch.dtype | None,
    programs: int,
) -> tuple[Tensor, Tensor | None]:
    """See `bring_back`."""
    mine, world = slice(edges.start(peers.rank), edges.start(peers.rank + 1)), len(edges.tokens)
    valid_TK = (ids_TK >= 0) & (ids_TK < world * local_experts)
    owner_TK = torch.where(valid_TK, torch.div(ids_TK, local_experts, rounding_mode="floor"), world)
    wide = torch.promote_types(y_NH.dtype, torch.float32)
    y_TH = y_NH.new_zeros(ids_TK.shape[0], y_NH.shape[1], dtype=wide)
    weights_TK = None if weights_dtype is None else y_NH.new_zeros(ids_TK.shape, dtype=weights_dtype)
    for rank in range(world):
        rows_NH = y_NH if rank == peers.rank else peers.view(rank, offsets[0], tuple(y_NH.shape), y_NH.dtype)
        y_TH += torch.where((owner_TK == rank).any(1, keepdim=True), rows_NH[mine].to(wide), 0)
        if weights_TK is not None:
            numbers_NK = peers.view(rank, offsets[1], (edges.rows, ids_TK.shape[1]), weights_dtype)
            weights_TK = torch.where(owner_TK == rank, numbers_NK[mine], weights_TK)
    return y_TH.to(y_NH.dtype), weights_TK


@_jit(do_not_specialize=["rank", "start", "tokens", "local_experts"])
def _bring_back_kernel(
    address_W, y_NH, ids_TK, y_TH, weights_TK, y_at, weights_at, rank, start, tokens, local_experts,
    WEIGHTS: tl.constexpr, WIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, K2)
    token = tl.program_id(0)
    while token < tokens:
        wide_token, row = token.to(tl.int64), (start + token).to(tl.int64)
        ids = tl.load(ids_TK + wide_token * K + slot, mask=slot < K, other=-1).to(tl.int32)
        owner = tl.where((ids >= 0) & (ids < W * local_experts), ids // local_experts, W)
        if WEIGHTS:
            numbers = (tl.load(address_W + owner, mask=owner < W, other=0) + weights_at).to(tl.pointer_type(weights_TK.dtype.element_ty))
            number = tl.load(numbers + row * K + slot, mask=owner < W, other=0)
            tl.store(weights_TK + wide_token * K + slot, number, mask=slot < K)
        read, write = tl.multiple_of(row * H, 16 if H % 16 == 0 else 1), tl.multiple_of(wide_token * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], dtype=WIDE)
            for peer in tl.static_range(W):
                goes = tl.sum((owner == peer).to(tl.int32), 0) > 0
                y = tl.where(peer == rank, y_NH.to(tl.int64), tl.load(address_W + peer) + y_at).to(tl.pointer_type(y_NH.dtype.element_ty))
                total += tl.load(tl.multiple_of(y, 16) + read + column, mask=(column < H) & goes, other=0).to(WIDE)
            tl.store(y_TH + write + column, total.to(y_TH.dtype.element_ty), mask=column < H)
        token += tl.num_programs(0)
