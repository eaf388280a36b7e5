"""Dispatch between the GPUs of one host that read each other's memory: torch symmetric memory and Triton, nothing waits for the device.

**Rows.** Every token has a row on every rank: row ``edges[s] + t`` is token t of source rank s, so N is the tokens of all ranks, and no
side has to count anything or to tell the other where a row lies. A token without an expert here is not moved; its row is zeros, its ids -1.

**Movement.** Each rank puts what others need into its own buffer, all meet at a barrier on the device, then each reads from the others'
buffers into ordinary memory. *Out* (a dispatch, and the gradient of a combine) brings tokens to their experts; *back* (a combine, and the
gradient of a dispatch) fetches their results and adds them up in the order of ranks. Each direction has a half of the buffer.

**Why nothing is overwritten too early.** All ranks move in the same order, each on one stream at a time. Before a rank writes into a half
again there has been a barrier after everybody's last reading of it: that of the other direction, which alternates with this one; where one
direction comes twice in a row (layers that overlap), a barrier of its own.

**How many tokens.** N is a shape, so hosts have to know every rank's T, and T may differ from rank to rank and from call to call. Hosts
tell each other through a page of shared memory, once in each dispatch: a host may wait there for another host to come as far, never for a
device. From the same numbers all ranks come to the same decision when buffers have to grow; only then they synchronise.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import symm_mem as kernels
from ..kernels.symm_mem import Edges, Peers
from .base import Received
from .one_host import CudaMemory, HostNumbers

_ALIGNMENT = 128  # bytes, of each part of a buffer
_PAGE = 2 * 2**20  # bytes; buffers are multiples of it
_PROGRAMS_PER_SM = 16  # of 4 warps and 32 registers: all that fit at once


def why_not(spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if tokens can be dispatched through symmetric memory from this device, else the reason; see `registry.Backend`."""
    if device.type != "cuda":
        return f"needs CUDA GPUs, this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if not dist.is_available() or importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} was built without symmetric memory"
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count()))
    if world > here:
        return f"needs all ranks of `ep` on one host, which has {here} of {world}; ask for it by name if each `ep` group is inside a host"
    index = torch.cuda.current_device() if device.index is None else device.index
    for other in range(torch.cuda.device_count()):
        if other != index and not torch.cuda.can_device_access_peer(index, other):
            return f"GPU {index} cannot read the memory of GPU {other}"
    return None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One dispatch, for its combine and both gradients.

    Attributes:
        ids_TK: global expert ids of this rank's tokens.
        ids_NK: local ids of the rows, -1 for experts elsewhere.
        edges: whose rows are whose.
    """

    ids_TK: Tensor
    ids_NK: Tensor
    edges: Edges


class SymmMem:
    """See the module's docstring.

    Args:
        group: the ranks that share one set of experts, all on one host.
        num_experts: of all ranks together (E); rank r holds ``r*L … (r+1)*L - 1``.
        capacity: tokens per rank that the buffers have room for from the start; they grow where a rank has more.
        num_sms: how many multiprocessors' worth of programs move rows; all if None. Fewer leave room for a computation beside them.
        memory: makes the buffers: the class `CudaMemory`, or one like it.

    The first dispatch of a group communicates between hosts and allocates. All dispatchers of a group share its buffers, which live as long
    as the group does.
    """

    name = "symm_mem"

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        *,
        capacity: int = 0,
        num_sms: int | None = None,
        memory: Callable[..., CudaMemory] = CudaMemory,
    ):
        self.group = group
        self.num_experts = num_experts
        self.local_experts = num_experts // group.size()
        self.capacity = capacity
        self.num_sms = num_sms
        self._memory = memory
        self._mover: Mover | None = None

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Received:
        """See `base.Dispatcher`."""
        weights_TK = topk_weights_TK.to(torch.promote_types(topk_weights_TK.dtype, torch.float32))
        edges = self.mover.agree(x_TH, weights_TK, self.capacity, self.group)
        x_NH, ids_NK, weights_NK = _Dispatch.apply(x_TH, weights_TK, topk_ids_TK.contiguous(), edges, self)
        routing = Routing(ids_TK=topk_ids_TK.contiguous(), ids_NK=ids_NK, edges=edges)
        return Received(x_NH=x_NH, ids_NK=ids_NK, weights_NK=weights_NK, rows=None, handle=routing)

    def combine(self, y_NH: Tensor, handle: Routing) -> Tensor:
        """See `base.Dispatcher`."""
        return _Combine.apply(y_NH, handle.ids_TK, handle.ids_NK, handle.edges, self)

    @property
    def mover(self) -> Mover:
        """Made by the first dispatch of the group, in which all ranks take part."""
        if self._mover is None:
            self._mover = Mover.of(self.group, self._memory)
        return self._mover

    def __deepcopy__(self, memo) -> SymmMem:
        return self  # it has no state of its own, and neither a group nor its buffers can be copied


class _Dispatch(torch.autograd.Function):
    """Tokens ``[T, H]`` and weights ``[T, K]`` to the rows of this rank and their local ids."""

    @staticmethod
    def forward(ctx, x_TH, weights_TK, ids_TK, edges, dispatcher):
        x_NH, ids_NK, weights_NK = dispatcher.mover.out(x_TH, ids_TK, weights_TK, None, edges, dispatcher)
        ctx.mark_non_differentiable(ids_NK)
        ctx.save_for_backward(ids_TK, ids_NK)
        ctx.edges, ctx.dispatcher = edges, dispatcher
        return x_NH, ids_NK, weights_NK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x_NH, _, grad_weights_NK):
        ids_TK, ids_NK = ctx.saved_tensors
        grad_weights_NK = grad_weights_NK if ctx.needs_input_grad[1] else None
        return *ctx.dispatcher.mover.back(grad_x_NH, grad_weights_NK, ids_TK, ids_NK, ctx.edges, ctx.dispatcher), None, None, None


class _Combine(torch.autograd.Function):
    """Rows ``[N, H]`` back to the tokens ``[T, H]`` they came from, added up over ranks."""

    @staticmethod
    def forward(ctx, y_NH, ids_TK, ids_NK, edges, dispatcher):
        ctx.save_for_backward(ids_TK, ids_NK)
        ctx.edges, ctx.dispatcher = edges, dispatcher
        return dispatcher.mover.back(y_NH, None, ids_TK, ids_NK, edges, dispatcher)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        ids_TK, ids_NK = ctx.saved_tensors
        return ctx.dispatcher.mover.out(grad_TH, ids_TK, None, ids_NK, ctx.edges, ctx.dispatcher)[0], None, None, None, None


class Mover:
    """The buffers of one group and the order in which they are used."""

    # By group, so that all ranks make a new one at the same time; a mover must not keep its group alive.
    _known: weakref.WeakKeyDictionary[dist.ProcessGroup, Mover] = weakref.WeakKeyDictionary()

    def __init__(self, group: dist.ProcessGroup, make_memory: Callable[..., CudaMemory]):
        self.rank = group.rank()
        self.hosts = HostNumbers(group)
        self.memory: CudaMemory | None = None
        self._make_memory = make_memory
        self._halves = (0, 0)  # bytes for out and for back
        self._last: tuple[str, torch.cuda.Stream | None] | None = None
        self._edges: dict[tuple[int, ...], Edges] = {}

    @classmethod
    def of(cls, group: dist.ProcessGroup, make_memory: Callable[..., CudaMemory]) -> Mover:
        """That of the group; a new one the first time."""
        if group not in cls._known:
            cls._known[group] = cls(group, make_memory)
        return cls._known[group]

    def agree(self, x_TH: Tensor, weights_TK: Tensor, capacity: int, group: dist.ProcessGroup) -> Edges:
        """Every rank's number of tokens, with buffers that have room for them. Grows on all ranks or on none."""
        tokens = self.hosts.exchange(x_TH.shape[0])
        if tokens not in self._edges:
            edge_W = torch.tensor([sum(tokens[:r]) for r in range(len(tokens) + 1)], dtype=torch.int32, pin_memory=x_TH.is_cuda)
            if len(self._edges) >= 256:
                self._edges.clear()
            self._edges[tokens] = Edges(tokens, edge_W.to(x_TH.device, non_blocking=True))
        edges = self._edges[tokens]
        most, rows = max(capacity, *tokens), max(capacity * len(tokens), edges.rows)
        need = (_parts(most, x_TH, weights_TK)[-1], _parts(rows, x_TH, weights_TK)[-1])
        if self.memory is None or any(n > h for n, h in zip(need, self._halves, strict=True)):
            self._grow(need, x_TH.device, group)
        return edges

    def out(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor | None, ids_NK: Tensor | None, edges: Edges, dispatcher: SymmMem
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens to rows. A first time with weights, which finds out ``ids_NK``; for a gradient along given ``ids_NK``."""
        x_TH = _plain(x_TH)
        if edges.rows == 0:
            empty_NK = ids_TK.new_empty(0, ids_TK.shape[1], dtype=torch.int32)
            return x_TH.new_empty(0, x_TH.shape[1]), empty_NK, None if weights_TK is None else weights_TK.new_empty(0, ids_TK.shape[1])
        peers = self._begin("out", x_TH)
        tokens = x_TH.shape[0]
        first = weights_TK is not None
        parts = _parts(max(edges.tokens), x_TH, weights_TK if first else ids_NK)[:3]
        if tokens:
            peers.view(self.rank, parts[0], (tokens, x_TH.shape[1]), x_TH.dtype).copy_(x_TH)
            if first:
                peers.view(self.rank, parts[1], tuple(ids_TK.shape), torch.int32).copy_(ids_TK)
                peers.view(self.rank, parts[2], tuple(ids_TK.shape), weights_TK.dtype).copy_(weights_TK)
        self.memory.barrier()
        programs = self._programs(dispatcher.num_sms, x_TH)
        if first:
            fetch = kernels.fetch_tokens if x_TH.is_cuda else kernels.fetch_tokens_reference
            return fetch(peers, parts, x_TH, weights_TK, edges, dispatcher.local_experts, programs)
        fetch = kernels.fetch_rows if x_TH.is_cuda else kernels.fetch_rows_reference
        return fetch(peers, parts[0], x_TH, ids_NK, edges, programs), ids_NK, None

    def back(
        self, y_NH: Tensor, numbers_NK: Tensor | None, ids_TK: Tensor, ids_NK: Tensor, edges: Edges, dispatcher: SymmMem
    ) -> tuple[Tensor, Tensor | None]:
        """Rows to tokens, added up; with numbers of each (token, expert) if given."""
        y_NH = _plain(y_NH)
        dtype = None if numbers_NK is None else numbers_NK.dtype
        if edges.rows == 0:
            return y_NH.new_empty(0, y_NH.shape[1]), None if dtype is None else numbers_NK.new_empty(0, ids_TK.shape[1])
        peers = self._begin("back", y_NH)
        y_at, numbers_at, _, end = (self._halves[0] + part for part in _parts(edges.rows, y_NH, ids_NK if dtype is None else numbers_NK))
        if end > sum(self._halves):
            raise ValueError(f"symm_mem: results {tuple(y_NH.shape)} in {y_NH.dtype} take more memory than the rows that were dispatched")
        on_gpu, programs = y_NH.is_cuda, self._programs(dispatcher.num_sms, y_NH)
        (kernels.stage_rows if on_gpu else kernels.stage_rows_reference)(peers, y_at, y_NH, ids_NK, edges, programs)
        if dtype is not None:
            peers.view(self.rank, numbers_at, tuple(ids_NK.shape), dtype).copy_(numbers_NK)
        self.memory.barrier()
        bring_back = kernels.bring_back if on_gpu else kernels.bring_back_reference
        return bring_back(peers, (y_at, numbers_at), y_NH, ids_TK, edges, dispatcher.local_experts, dtype, programs)

    def _begin(self, direction: str, x: Tensor) -> Peers:
        """Makes it safe to write into this direction's half of the buffer."""
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        if self._last is not None:
            last, last_stream = self._last
            if stream != last_stream:
                stream.wait_stream(last_stream)
            if last == direction:
                self.memory.barrier()
        self._last = (direction, stream)
        return self.memory.peers

    def _grow(self, need: tuple[int, int], device: torch.device, group: dist.ProcessGroup) -> None:
        # A quarter more than asked for where buffers grow again: batches that lengthen bit by bit should not allocate each time.
        spare = 1.0 if self.memory is None else 1.25
        halves = tuple(old if n <= old else _round_up(int(n * spare), _PAGE) for n, old in zip(need, self._halves, strict=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # this rank reads nobody's old buffer any more
        self.hosts.exchange(0)  # and neither does any other
        self.memory = None
        self.memory = self._make_memory(group, sum(halves), device, self.hosts)
        self._halves, self._last = halves, None

    def _programs(self, num_sms: int | None, x: Tensor) -> int:
        if not x.is_cuda:
            return 1
        return (num_sms or torch.cuda.get_device_properties(x.device).multi_processor_count) * _PROGRAMS_PER_SM


def _parts(rows: int, x: Tensor, numbers: Tensor) -> tuple[int, int, int, int]:
    """Where in a half lie rows ``[rows, H]`` like `x`, ids (or numbers) and numbers ``[rows, K]`` like `numbers`; and where they end."""
    narrow = _round_up(rows * numbers.shape[1] * max(4, numbers.dtype.itemsize), _ALIGNMENT)
    wide = _round_up(rows * x.shape[1] * x.dtype.itemsize, _ALIGNMENT)
    return 0, wide, wide + narrow, wide + 2 * narrow


def _plain(x: Tensor) -> Tensor:
    """Contiguous and aligned for reads of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
