"""Results back to their tokens' ranks through memory that ranks read from each other: Triton kernels, each beside its torch reference.

Each rank *stages* the rows of other ranks' tokens in its own buffer; after a barrier each *brings back* those of its own. Axes as in `symm_mem`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import Prepared
from .jit import jit
from .routes import launches
from .symm_mem import Edges, Peers, block

try:  # The references and everything that only asks need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# --- stage ---------------------------------------------------------------------------------------------------------------------------


def stage_rows(
    peers: Peers, offsets: tuple[int, int], y_NH: Tensor, ids_NK: Tensor, numbers_NK: Tensor | None, edges: Edges, programs: int
) -> None:
    """Copies what other ranks will fetch into this rank's buffer: the rows of their tokens that have an id.

    Args:
        offsets: bytes from the start of the buffer to row 0, and to the numbers of row 0.
        numbers_NK: if given, one number for each id; those of all rows with an id are copied.
        programs: the most programs to launch; each takes every so-manieth row.
    """
    if not launches(y_NH):
        return stage_rows_reference(peers, offsets, y_NH, ids_NK, numbers_NK, edges, programs)
    kernel = _stager(y_NH.shape[1], ids_NK.shape[1], numbers_NK is not None)
    into, own = peers.starts[peers.rank], edges.own(peers.rank)
    kernel(
        (min(edges.rows, programs),), y_NH, ids_NK, numbers_NK, into + offsets[0], into + offsets[1], own.start, own.stop, edges.rows
    )  # fmt: skip


def stage_rows_reference(
    peers: Peers, offsets: tuple[int, int], y_NH: Tensor, ids_NK: Tensor, numbers_NK: Tensor | None, edges: Edges, programs: int
) -> None:
    """See `stage_rows`."""
    into_NH = peers.view(peers.rank, offsets[0], tuple(y_NH.shape), y_NH.dtype)
    wanted_N = (ids_NK >= 0).any(1)
    if numbers_NK is not None:
        into_NK = peers.view(peers.rank, offsets[1], tuple(numbers_NK.shape), numbers_NK.dtype)
        into_NK.copy_(torch.where(wanted_N.unsqueeze(1), numbers_NK, into_NK))
    wanted_N[edges.own(peers.rank)] = False
    into_NH.copy_(torch.where(wanted_N.unsqueeze(1), y_NH, into_NH))


@functools.cache
def _stager(hidden: int, top_k: int, numbers: bool) -> Prepared:
    lanes = triton.next_power_of_2(top_k)
    return Prepared(_stage_kernel, NUMBERS=numbers, H=hidden, K=top_k, K2=lanes, BLOCK=block(hidden), num_warps=4)


@jit(do_not_specialize=["own_start", "own_end", "rows"])
def _stage_kernel(
    y_NH, ids_NK, numbers_NK, rows_at, numbers_at, own_start, own_end, rows,
    NUMBERS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, K2)
    into_NH = tl.multiple_of(rows_at.to(tl.pointer_type(y_NH.dtype.element_ty)), 16)
    row = tl.program_id(0)
    while row < rows:
        first_slot = row.to(tl.int64) * K
        ids = tl.load(ids_NK + first_slot + slot, mask=slot < K, other=-1)
        wanted = tl.max(ids, 0) >= 0
        if NUMBERS:
            into_NK = numbers_at.to(tl.pointer_type(numbers_NK.dtype.element_ty)) + first_slot + slot
            sent = (slot < K) & wanted
            tl.store(into_NK, tl.load(numbers_NK + first_slot + slot, mask=sent), mask=sent)
        fetched = wanted & ((row < own_start) | (row >= own_end))
        begin = tl.multiple_of(row.to(tl.int64) * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            here = (column < H) & fetched
            tl.store(into_NH + begin + column, tl.load(y_NH + begin + column, mask=here), mask=here)
        row += tl.num_programs(0)


# --- bring back ----------------------------------------------------------------------------------------------------------------------


def bring_back(
    peers: Peers,
    offsets: tuple[int, int],
    y_NH: Tensor,
    ids_TK: Tensor,
    edges: Edges,
    local_experts: int,
    numbers: tuple[torch.dtype, torch.dtype] | None,
    factor: float,
    programs: int,
) -> tuple[Tensor, Tensor | None]:
    """``y_TH``: for each token of this rank the sum of its rows on all ranks, in fp32 and in the order of ranks; rounded once.

    Args:
        offsets: bytes from the start of each buffer to its rows ``[N, H]`` and to its numbers ``[N, K]``.
        y_NH: this rank's own rows, read here instead of in the buffer.
        ids_TK: global expert ids of the tokens.
        numbers: if given, each token's numbers ``[T, K]`` come back too, each from the rank that has the expert; 0 for no expert.
            Their dtype in the buffers, and that of the result.
        factor: of the sums and the numbers.
    """
    if not launches(y_NH):
        return bring_back_reference(peers, offsets, y_NH, ids_TK, edges, local_experts, numbers, factor, programs)
    tokens, hidden, top_k = ids_TK.shape[0], y_NH.shape[1], ids_TK.shape[1]
    y_TH = y_NH.new_empty(tokens, hidden)
    numbers_TK = None if numbers is None else y_NH.new_empty(tokens, top_k, dtype=numbers[1])
    if tokens:
        wide = y_NH.dtype == torch.float64
        kernel = _bringer(hidden, top_k, len(edges.tokens), numbers and numbers[0], factor, wide)
        start = edges.starts[peers.rank]
        kernel(
            (min(tokens, programs),), peers.address_W, y_NH, ids_TK, y_TH, numbers_TK, *offsets, peers.rank, start, tokens, local_experts
        )  # fmt: skip
    return y_TH, numbers_TK


def bring_back_reference(
    peers: Peers,
    offsets: tuple[int, int],
    y_NH: Tensor,
    ids_TK: Tensor,
    edges: Edges,
    local_experts: int,
    numbers: tuple[torch.dtype, torch.dtype] | None,
    factor: float,
    programs: int,
) -> tuple[Tensor, Tensor | None]:
    """See `bring_back`."""
    mine, world = edges.own(peers.rank), len(edges.tokens)
    valid_TK = (ids_TK >= 0) & (ids_TK < world * local_experts)
    owner_TK = torch.where(valid_TK, torch.div(ids_TK, local_experts, rounding_mode="floor"), world)
    wide = torch.promote_types(y_NH.dtype, torch.float32)
    y_TH = y_NH.new_zeros(ids_TK.shape[0], y_NH.shape[1], dtype=wide)
    numbers_TK = None if numbers is None else y_NH.new_zeros(ids_TK.shape, dtype=numbers[0])
    for rank in range(world):
        rows_NH = y_NH if rank == peers.rank else peers.view(rank, offsets[0], tuple(y_NH.shape), y_NH.dtype)
        y_TH += torch.where((owner_TK == rank).any(1, keepdim=True), rows_NH[mine].to(wide), 0)
        if numbers is not None:
            numbers_NK = peers.view(rank, offsets[1], (edges.rows, ids_TK.shape[1]), numbers[0])
            numbers_TK = torch.where(owner_TK == rank, numbers_NK[mine], numbers_TK)
    return (y_TH * factor).to(y_NH.dtype), None if numbers is None else (numbers_TK * factor).to(numbers[1])


@functools.cache
def _bringer(hidden: int, top_k: int, world: int, numbers: torch.dtype | None, factor: float, wide: bool) -> Prepared:
    constants = {"NUMBERS": 0 if numbers is None else numbers.itemsize, "FACTOR": factor, "WIDE": tl.float64 if wide else tl.float32}
    shape = {"H": hidden, "K": top_k, "K2": triton.next_power_of_2(top_k), "W": world, "BLOCK": block(hidden)}
    return Prepared(_bring_back_kernel, **constants, **shape, num_warps=4)


@jit(do_not_specialize=["rank", "start", "tokens", "local_experts"])
def _bring_back_kernel(
    address_W, y_NH, ids_TK, y_TH, numbers_TK, y_at, numbers_at, rank, start, tokens, local_experts,
    NUMBERS: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, K2)
    token = tl.program_id(0)
    while token < tokens:
        wide_token, row = token.to(tl.int64), (start + token).to(tl.int64)
        ids = tl.load(ids_TK + wide_token * K + slot, mask=slot < K, other=-1).to(tl.int32)
        owner = tl.where((ids >= 0) & (ids < W * local_experts), ids // local_experts, W)
        if NUMBERS:
            sent: tl.constexpr = tl.float64 if NUMBERS == 8 else tl.float32
            numbers = (tl.load(address_W + owner, mask=owner < W, other=0) + numbers_at).to(tl.pointer_type(sent))
            number = tl.load(numbers + row * K + slot, mask=owner < W, other=0)
            if FACTOR != 1.0:
                number *= FACTOR
            tl.store(numbers_TK + wide_token * K + slot, number.to(numbers_TK.dtype.element_ty), mask=slot < K)
        read, write = tl.multiple_of(row * H, 16 if H % 16 == 0 else 1), tl.multiple_of(wide_token * H, 16 if H % 16 == 0 else 1)
        for h in range(0, H, BLOCK):
            column = h + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], dtype=WIDE)
            for peer in tl.static_range(W):
                goes = tl.sum((owner == peer).to(tl.int32), 0) > 0
                y = tl.where(peer == rank, y_NH.to(tl.int64), tl.load(address_W + peer) + y_at).to(tl.pointer_type(y_NH.dtype.element_ty))
                total += tl.load(tl.multiple_of(y, 16) + read + column, mask=(column < H) & goes, other=0).to(WIDE)
            if FACTOR != 1.0:
                total *= FACTOR
            tl.store(y_TH + write + column, total.to(y_TH.dtype.element_ty), mask=column < H)
        token += tl.num_programs(0)
