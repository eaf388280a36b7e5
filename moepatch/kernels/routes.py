"""Sorting the router's choice by expert in one launch: a Triton kernel beside its torch reference.

T tokens, K experts per token, S = T*K slots, R rows, E experts. An id outside ``0 … E-1`` is a sentinel, sorted behind all others.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..experts.routes import Routes, sort_routes
from .jit import jit
from .launch import launch

try:  # The references and everything that only asks need no Triton.
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_CHUNK = 4096  # slots that a program reads at once
_ALIGNED = 4  # integers of 16 bytes
_PROGRAMS = 132  # what an H200 runs at the same time, one on each SM


class Routing(NamedTuple):
    """`Routes` and what belongs to its rows, all int32 except the weights.

    Attributes:
        order_R, token_R: for each sorted row its slot ``t*K + k`` and its token t.
        row_S: for each slot its row. Rows from ``ends[E]`` on are sentinels'; nothing reads or writes what belongs to them.
        expert_R: for each row its expert, E for a sentinel.
        ends: ``[E+1]``, 0 and the end of each expert's rows.
        weights_R: each row's routing weight in fp32 (or wider), 0 for a sentinel.
        top_k: K.
    """

    order_R: Tensor
    token_R: Tensor
    row_S: Tensor
    expert_R: Tensor
    ends: Tensor
    weights_R: Tensor
    top_k: int

    @property
    def offs_E(self) -> Tensor:
        """The end of each expert's rows: `ends` without its 0."""
        return self.ends[1:]

    @property
    def routes(self) -> Routes:
        """For functions of `experts.routes`."""
        return Routes(self.order_R, self.row_S, self.offs_E, self.expert_R, self.top_k)


def launches(x: Tensor) -> bool:
    """True if kernels can run on this tensor: it is on a GPU, or Triton interprets."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def most_programs(device: torch.device) -> int:
    """How many programs of 4 warps the device holds at a time: as many as are worth launching where each takes several rows."""
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """fp32, or wider if `dtype` is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def route(topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int, rows: int | None = None) -> Routing:
    """Sorts the router's choice by expert, stably, in one launch.

    Args:
        topk_ids_TK: integer ids ``[T, K]``; any id outside ``0 … num_experts-1`` means "no expert". Duplicates are allowed.
        topk_weights_TK: their routing weights.
        num_experts: E.
        rows: how many ids are not sentinels, if the host knows: then R is this, and sentinels have no rows at all.
    """
    slots, top_k = topk_ids_TK.numel(), topk_ids_TK.shape[-1]
    if slots == 0 or not launches(topk_ids_TK):
        return route_reference(topk_ids_TK, topk_weights_TK, num_experts, rows)
    ids_S, weights_S = topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
    rows = slots if rows is None else rows
    order_R, token_R, expert_R, row_S, ends = _integers((rows, rows, rows, slots, num_experts + 1), ids_S.device)
    weights_R = torch.empty(rows, dtype=wide_type(weights_S.dtype), device=ids_S.device)
    chunk = min(_CHUNK, triton.next_power_of_2(slots))
    chunks = triton.cdiv(slots, chunk)
    parts = max(1, min(chunks, _PROGRAMS // (num_experts + 1)))
    part = triton.cdiv(chunks, parts) * chunk
    launch(
        _route_kernel, (num_experts + 1, triton.cdiv(slots, part)),
        ids_S, weights_S, order_R, token_R, row_S, expert_R, weights_R, ends, slots, rows, part,
        E=num_experts, K=top_k, CHUNK=chunk, num_warps=16 if chunk == _CHUNK else 4,
    )  # fmt: skip
    return Routing(order_R, token_R, row_S, expert_R, ends, weights_R, top_k)


def _integers(counts: tuple[int, ...], device: torch.device) -> Sequence[Tensor]:
    """Uninitialised int32 tensors: parts of one allocation, where that leaves each aligned as an allocation of its own is."""
    if any(count % _ALIGNED for count in counts[:-1]):
        return [torch.empty(count, dtype=torch.int32, device=device) for count in counts]
    return torch.empty(sum(counts), dtype=torch.int32, device=device).split(counts)


def route_reference(topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int, rows: int | None = None) -> Routing:
    """See `route`."""
    routes = sort_routes(topk_ids_TK, num_experts, rows)
    order_R, row_S, expert_R = (t.to(torch.int32) for t in (routes.order_R, routes.row_S, routes.expert_R))
    weights_R = topk_weights_TK.reshape(-1).to(wide_type(topk_weights_TK.dtype)).index_select(0, order_R)
    weights_R = weights_R.masked_fill(expert_R == num_experts, 0)
    ends = torch.nn.functional.pad(routes.offs_E, (1, 0))
    return Routing(order_R, routes.token_R.to(torch.int32), row_S, expert_R, ends, weights_R, routes.top_k)


@jit(do_not_specialize=["slots", "rows", "part"])
def _route_kernel(
    ids_S, weights_S, order_R, token_R, row_S, expert_R, weights_R, ends, slots, rows, part,
    E: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # A program places one expert's slots out of one part of all slots; the expert after the last is the sentinels'. It counts for
    # itself what comes before its rows, which costs a pass over ids in the cache and saves a second launch.
    expert, first = tl.program_id(0), tl.program_id(1) * part
    lane = tl.arange(0, CHUNK)
    before = tl.zeros([CHUNK], dtype=tl.int32)
    at = first * 0
    while at < slots:  # a range would be plain integers in Triton's interpreter
        slot = at + lane
        ids = tl.load(ids_S + slot, mask=slot < slots, other=0)
        ids = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
        before += ((slot < slots) & ((ids < expert) | ((ids == expert) & (slot < first)))).to(tl.int32)
        at += CHUNK
    row = tl.sum(before, 0)
    if first == 0:
        tl.store(ends + expert, row)
    at, last = first, tl.minimum(first + part, slots)
    while at < last:
        slot = at + lane
        ids = tl.load(ids_S + slot, mask=slot < last, other=0)
        ids = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
        mine = (slot < last) & (ids == expert)
        place = row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(row_S + slot, place, mask=mine)
        held = mine & (place < rows)
        tl.store(order_R + place, slot, mask=held)
        tl.store(token_R + place, slot // K, mask=held)
        tl.store(expert_R + place, expert + tl.zeros([CHUNK], dtype=tl.int32), mask=held)
        weight = tl.load(weights_S + slot, mask=held & (expert < E), other=0).to(weights_R.dtype.element_ty)
        tl.store(weights_R + place, weight, mask=held)
        row += tl.sum(mine.to(tl.int32), 0)
        at += CHUNK
