"""The buffers of ranks that read each other's memory, and the order in which they are used: see `symm_mem`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.symm_mem import Edges, Peers, wire_dtype
from ..kernels.symm_mem_back import bring_back, stage_rows
from ..kernels.symm_mem_out import fetch_rows, fetch_tokens, publish_tokens
from .chain import Turn
from .one_host import CudaMemory, HostNumbers

_ALIGNMENT = 128  # bytes, of each part of a buffer
_PAGE = 2 * 2**20  # bytes; buffers are multiples of it
_PROGRAMS_PER_SM = 16  # of 4 warps and 32 registers: all that fit at once


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
        self._last: tuple[str, int] | None = None  # direction and stream
        self._edges: dict[tuple[int, ...], Edges] = {}
        self._most_programs = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup, make_memory: Callable[..., CudaMemory]) -> Mover:
        """That of the group; a new one the first time."""
        if group not in cls._known:
            cls._known[group] = cls(group, make_memory)
        return cls._known[group]

    def agree(self, x_TH: Tensor, weights_TK: Tensor, capacity: int, group: dist.ProcessGroup, turn: Turn) -> Edges:
        """Every rank's number of tokens, with buffers that have room for them. Grows on all ranks or on none."""
        tokens = self.hosts.exchange(x_TH.shape[0], turn)
        if tokens not in self._edges:
            edge_W = torch.tensor([sum(tokens[:r]) for r in range(len(tokens) + 1)], dtype=torch.int32, device="cpu", pin_memory=x_TH.is_cuda)
            if len(self._edges) >= 256:
                self._edges.clear()
            self._edges[tokens] = Edges(tokens, edge_W.to(x_TH.device, non_blocking=True))
        edges = self._edges[tokens]
        hidden, top_k, size, small = x_TH.shape[1], weights_TK.shape[1], x_TH.dtype.itemsize, wire_dtype(weights_TK.dtype).itemsize
        most, rows = max(capacity, edges.most), max(capacity * len(tokens), edges.rows)
        out, back = _parts(most, hidden, size, top_k, small)[-1], _parts(rows, hidden, size, top_k, small)[-1]
        if self.memory is None or out > self._halves[0] or back > self._halves[1]:
            self._grow((out, back), x_TH.device, group)
        return edges

    def dispatch(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, edges: Edges, local_experts: int, num_sms: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, global ids and weights of all ranks to this rank's rows ``x_NH``, ``ids_NK`` and ``weights_NK``."""
        (hidden, top_k), small = (x_TH.shape[1], ids_TK.shape[1]), wire_dtype(weights_TK.dtype)
        if edges.rows == 0:
            return x_TH.new_empty(0, hidden), ids_TK.new_empty(0, top_k, dtype=torch.int32), weights_TK.new_empty(0, top_k, dtype=small)
        peers = self._begin("out", x_TH)
        parts = _parts(edges.most, hidden, x_TH.dtype.itemsize, top_k, small.itemsize)[:3]
        programs = self._programs(num_sms)
        publish_tokens(peers, parts, x_TH.contiguous(), ids_TK, weights_TK, small, 1.0, programs)
        self.memory.barrier()
        return fetch_tokens(peers, parts, x_TH, weights_TK, edges, local_experts, programs)

    def gradient_out(self, grad_TH: Tensor, ids_NK: Tensor, edges: Edges, num_sms: int | None) -> Tensor:
        """The gradients of combined tokens to the rows of an earlier dispatch, divided by the number of ranks."""
        if edges.rows == 0:
            return grad_TH.new_empty(0, grad_TH.shape[1])
        peers = self._begin("out", grad_TH)
        if edges.most * grad_TH.shape[1] * grad_TH.dtype.itemsize > self._halves[0]:
            raise ValueError(f"symm_mem: gradients {tuple(grad_TH.shape)} in {grad_TH.dtype} take more memory than the tokens that were dispatched")
        programs = self._programs(num_sms)
        publish_tokens(peers, (0, 0, 0), grad_TH.contiguous(), None, None, grad_TH.dtype, 1 / len(edges.tokens), programs)
        self.memory.barrier()
        return fetch_rows(peers, 0, grad_TH, ids_NK, edges, programs)

    def back(
        self,
        y_NH: Tensor,
        numbers_NK: Tensor | None,
        numbers_dtype: torch.dtype | None,
        factor: float,
        ids_TK: Tensor,
        ids_NK: Tensor,
        edges: Edges,
        local_experts: int,
        num_sms: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows to tokens, added up; with numbers of each (token, expert) if given, which then have `numbers_dtype`; all times `factor`."""
        y_NH, hidden, top_k = _plain(y_NH), y_NH.shape[1], ids_TK.shape[1]
        if edges.rows == 0:
            return y_NH.new_empty(0, hidden), None if numbers_NK is None else numbers_NK.new_empty(0, top_k, dtype=numbers_dtype)
        peers, first = self._begin("back", y_NH), self._halves[0]
        small = 4 if numbers_NK is None else numbers_NK.dtype.itemsize
        y_at, numbers_at, _, end = _parts(edges.rows, hidden, y_NH.dtype.itemsize, top_k, small)
        if end > self._halves[1]:
            raise ValueError(f"symm_mem: results {tuple(y_NH.shape)} in {y_NH.dtype} take more memory than the rows that were dispatched")
        at, programs = (first + y_at, first + numbers_at), self._programs(num_sms)
        dtypes = None
        if numbers_NK is not None:
            numbers_NK, dtypes = numbers_NK.contiguous(), (numbers_NK.dtype, numbers_dtype)
        stage_rows(peers, at, y_NH, ids_NK, numbers_NK, edges, programs)
        self.memory.barrier()
        return bring_back(peers, at, y_NH, ids_TK, edges, local_experts, dtypes, factor, programs)

    def _begin(self, direction: str, x: Tensor) -> Peers:
        """Makes it safe to write into this direction's half of the buffer."""
        stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
        if self._last is not None:
            last, last_stream = self._last
            if stream != last_stream:
                torch.cuda.current_stream(x.device).wait_stream(torch.cuda.ExternalStream(last_stream, device=x.device))
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
        if device.type == "cuda":
            self._most_programs = torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_SM

    def _programs(self, num_sms: int | None) -> int:
        return self._most_programs if num_sms is None else num_sms * _PROGRAMS_PER_SM


@functools.lru_cache(maxsize=1024)
def _parts(rows: int, hidden: int, size: int, top_k: int, small: int) -> tuple[int, int, int, int]:
    """Where in a half lie rows ``[rows, H]`` of elements of `size` bytes, ids (or numbers) and numbers ``[rows, K]`` of up to `small`; and their end."""
    narrow = _round_up(rows * top_k * max(4, small), _ALIGNMENT)
    wide = _round_up(rows * hidden * size, _ALIGNMENT)
    return 0, wide, wide + narrow, wide + 2 * narrow


def _plain(x: Tensor) -> Tensor:
    """Contiguous and aligned for reads of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
