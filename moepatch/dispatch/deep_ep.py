"""Dispatch by DeepEP: its own kernels over NVLink, and over RDMA where it was built for that; bf16 on Hopper and newer.

The library has two interfaces, ``Buffer`` (1.x) and ``ElasticBuffer`` (2.x); the newer one that is there is used. Both need memory that
all ranks of a group have mapped. It belongs to the group, not to a layer, and grows to what the widest layer needs; `release` frees it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BackendUnavailable
from ..gpus import capability_of
from ..once import once_differentiable
from .base import Received

#: Warps copy and add in steps of 32 lanes of 16 bytes, and wait for all their lanes in between: a narrower last step is undefined.
_HIDDEN_STEP = 32 * 16 // torch.bfloat16.itemsize
#: A warp keeps half a token and a barrier of 8 bytes in 8 KiB; 1.x notices more than that only on the device, and traps.
_HIDDEN_END_1X = 8192
_RANKS_1X = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
_RANKS_OF_HOST_1X = 8
_MAX_LOCAL_EXPERTS_1X = 128
_MAX_TOP_K = 32


def why_not(spec: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if DeepEP can move the tokens of these experts (an `ExpertsSpec`), else the reason in words; see `registry.Backend`."""
    if importlib.util.find_spec("deep_ep") is None:
        return "not installed (built from its own repository, deepseek-ai/DeepEP)"
    if device.type != "cuda":
        return f"needs CUDA, this is {device.type}"
    if (here := capability_of(device)) < (9, 0):
        major, minor = here
        return f"needs compute capability 9.0, this is {major}.{minor}"
    if dtype != torch.bfloat16:
        return f"moves bfloat16, this is {str(dtype).removeprefix('torch.')}"
    library, failure = _library()
    return failure if failure is not None or spec is None else _why_not_hidden(spec.hidden, library)


def why_not_group(group: dist.ProcessGroup, num_experts: int) -> str | None:
    """None if DeepEP has kernels for this many ranks and experts of a layer, laid out over hosts like this; else the reason in words."""
    library, failure = _library()
    if failure is not None:
        return failure
    ranks = group.size()
    if hasattr(library, "ElasticBuffer"):
        return None
    if ranks not in _RANKS_1X:
        return f"1.x has no kernels for {ranks} ranks, only for {', '.join(map(str, _RANKS_1X))}"
    if ranks <= _RANKS_OF_HOST_1X and num_experts // ranks > _MAX_LOCAL_EXPERTS_1X:
        return f"1.x takes up to {_MAX_LOCAL_EXPERTS_1X} experts on a rank, this has {num_experts // ranks}"
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    host_of = [rank // per_host for rank in dist.get_process_group_ranks(group)] if per_host else []
    for first in range(0, len(host_of), _RANKS_OF_HOST_1X):
        if len(set(host_of[first : first + _RANKS_OF_HOST_1X])) > 1:
            return f"1.x wants {min(ranks, _RANKS_OF_HOST_1X)} ranks that follow each other on one host, hosts here have {per_host}"
    return None


def _why_not_hidden(hidden: int, library: Any) -> str | None:
    if hidden % _HIDDEN_STEP:
        return f"needs a hidden size divisible by {_HIDDEN_STEP}, this has {hidden}"
    if not hasattr(library, "ElasticBuffer") and hidden >= _HIDDEN_END_1X:
        return f"1.x takes hidden sizes below {_HIDDEN_END_1X}, this has {hidden}"
    return None


def _library() -> tuple[Any, str | None]:
    """The module, or why it cannot be imported: it may have been built for another torch, CUDA or NCCL."""
    try:
        return importlib.import_module("deep_ep"), None
    except Exception as error:  # it checks its surroundings with `assert`
        return None, f"installed, but its import fails: {type(error).__name__}: {error}".splitlines()[0]


class DeepEP:
    """See the module's docstring.

    Args:
        group: the ranks that share one set of experts.
        num_experts: of all ranks together (E); rank r holds ``r*L … (r+1)*L - 1``.
        num_sms: how many SMs move tokens, even; None for the library's own choice. The same on every rank.

    Raises:
        BackendUnavailable: DeepEP has no kernels for this group; the message says why.
    """

    name = "deep_ep"
    averages = False

    def __init__(self, group: dist.ProcessGroup, num_experts: int, *, num_sms: int | None = None):
        reason = why_not_group(group, num_experts)
        if reason is not None:
            raise BackendUnavailable(f"deep_ep: {reason}. Use dispatch='all_to_all'.")
        self.group = group
        self.num_experts = num_experts
        self.num_sms = num_sms

    @torch.compiler.disable
    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Received:
        """See `base.Dispatcher`."""
        self._check(x_TH, topk_ids_TK.shape[1])
        # Kernels run on the current device and wait for its current stream, whichever device the tokens are on.
        with torch.accelerator.device_index(x_TH.device.index):
            x_NH, weights_NK, ids_NK, flight = _Dispatch.apply(x_TH, topk_weights_TK.float(), topk_ids_TK, self)
        return Received(x_NH=x_NH, ids_NK=ids_NK, weights_NK=weights_NK, rows=flight.rows, handle=flight)

    @torch.compiler.disable
    def combine(self, y_NH: Tensor, handle: Flight) -> Tensor:
        """See `base.Dispatcher`. Ranks are added up in fp32 and rounded once."""
        self._check(y_NH)
        with torch.accelerator.device_index(y_NH.device.index):
            return _Combine.apply(y_NH, handle)

    def _check(self, x_TH: Tensor, top_k: int = 0) -> None:
        """Refuses what the kernels would get wrong without a word, or trap on."""
        reason = _why_not_hidden(x_TH.shape[1], _library()[0])
        if x_TH.dtype != torch.bfloat16:
            reason = f"moves bfloat16, these tokens are {str(x_TH.dtype).removeprefix('torch.')}"
        if top_k > _MAX_TOP_K:
            reason = f"takes up to {_MAX_TOP_K} experts per token, this has {top_k}"
        if reason is not None:
            raise BackendUnavailable(f"deep_ep: {reason}. Use dispatch='all_to_all'.")


@dataclass(frozen=True, kw_only=True)
class Flight:
    """One dispatch: who sent what to whom, in the library's own terms.

    Attributes:
        memory: of the group.
        routes: the library's handle.
        rows: how many (token, expert) pairs this rank computes.
        configs: the library's tuning for dispatch and combine, which have to use equally many SMs; 2.x keeps it in `routes`.
    """

    memory: Memory1 | Memory2
    routes: Any
    rows: int
    configs: Any = None


class _Dispatch(torch.autograd.Function):
    """Tokens ``[T, H]`` and weights ``[T, K]`` to the rows ``[N, H]``, ``[N, K]`` that this rank receives, with local ids ``[N, K]``."""

    @staticmethod
    def forward(ctx, x_TH, weights_TK, ids_TK, dispatcher: DeepEP):
        tensors = x_TH.contiguous(), ids_TK.long().contiguous(), weights_TK.contiguous()
        x_NH, ids_NK, weights_NK, flight = _memory(dispatcher.group).send(*tensors, dispatcher)
        ids_NK = ids_NK.to(torch.int32)  # half the bits to sort
        ctx.flight = flight
        ctx.save_for_backward(ids_NK)
        ctx.mark_non_differentiable(ids_NK)
        return x_NH, weights_NK, ids_NK, flight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH, grad_weights_NK, *_):
        (ids_NK,) = ctx.saved_tensors
        # Ranks that a weight was not for received it as 0; their gradients of it mean nothing. Weights travel whether or not their
        # gradient is needed: all ranks have to lay out the memory alike.
        grad_weights_NK = torch.where(ids_NK >= 0, grad_weights_NK, 0).contiguous()
        grad_TH, grad_weights_TK = ctx.flight.memory.bring_back(grad_NH.contiguous(), grad_weights_NK, ctx.flight)
        return grad_TH, grad_weights_TK, None, None


class _Combine(torch.autograd.Function):
    """Rows ``[N, H]`` back to the tokens ``[T, H]`` they came from, added up over ranks."""

    @staticmethod
    def forward(ctx, y_NH, flight: Flight):
        ctx.flight = flight
        return flight.memory.bring_back(y_NH.contiguous(), None, flight)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        return ctx.flight.memory.send_again(grad_TH.contiguous(), ctx.flight), None


class Memory:
    """What the ranks of a group have mapped: a buffer of the library, and the sizes it was made for."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.buffer: Any = None
        self.sizes: tuple[int, ...] = ()

    def release(self) -> None:
        """Frees the memory; the next use allocates it again. Every rank has to call it."""
        if self.buffer is not None:
            self.buffer.destroy()
        self.buffer, self.sizes = None, ()

    def _grown(self, make: Any, *wanted: int) -> Any:
        """The buffer, made anew if it is too small: on all ranks at once, because all have the same layers."""
        sizes = tuple(map(max, wanted, self.sizes or wanted))
        if sizes != self.sizes:
            self.release()
            # Its destructor would wait for the other ranks, which may be gone by then: `release` or the end of the process frees it.
            self.buffer, self.sizes = make(self.group, *sizes, explicitly_destroy=True), sizes
        return self.buffer


class Memory1(Memory):
    """For ``deep_ep.Buffer``. Its size does not depend on the number of tokens: they stream through it."""

    def send(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, dispatcher: DeepEP) -> tuple[Tensor, Tensor, Tensor, Flight]:
        """``x_NH, ids_NK, weights_NK, flight``. Waits for the device, to know how much arrives."""
        configs = self._configs(dispatcher.num_sms)
        buffer = self._fit(x_TH.shape[1], configs)
        per_rank_W, per_host, per_expert_E, goes_TW, _ = buffer.get_dispatch_layout(ids_TK, dispatcher.num_experts)
        x_NH, ids_NK, weights_NK, pairs_L, routes, _ = buffer.dispatch(
            x_TH, None, per_rank_W, per_host, goes_TW, per_expert_E, topk_idx=ids_TK, topk_weights=weights_TK, config=configs[0]
        )
        return x_NH, ids_NK, weights_NK, Flight(memory=self, routes=routes, rows=sum(pairs_L), configs=configs)

    def send_again(self, x_TH: Tensor, flight: Flight) -> Tensor:
        """``x_NH``: other values on the same ways."""
        return self._fit(x_TH.shape[1], flight.configs).dispatch(x_TH, handle=flight.routes, config=flight.configs[0])[0]

    def bring_back(self, y_NH: Tensor, weights_NK: Tensor | None, flight: Flight) -> tuple[Tensor, Tensor | None]:
        """``y_TH, weights_TK``: sums over ranks, in fp32 and in the order of ranks."""
        buffer = self._fit(y_NH.shape[1], flight.configs)
        return buffer.combine(y_NH, flight.routes, topk_weights=weights_NK, config=flight.configs[1])[:2]

    def _fit(self, hidden: int, configs: tuple[Any, Any]) -> Any:
        ranks, width = self.group.size(), hidden * torch.bfloat16.itemsize
        rdma = max(c.get_rdma_buffer_size_hint(width, ranks) for c in configs) if ranks > _RANKS_OF_HOST_1X else 0
        nvl = max(c.get_nvl_buffer_size_hint(width, ranks) for c in configs)
        return self._grown(_library()[0].Buffer, nvl, rdma)

    def _configs(self, num_sms: int | None) -> tuple[Any, Any]:
        """1.x's tuning for so many ranks. It takes the number of SMs from its class, which is set for as long as that takes."""
        buffer, ranks = _library()[0].Buffer, self.group.size()
        before = buffer.num_sms
        try:
            buffer.set_num_sms(num_sms or before)
            return buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
        finally:
            buffer.set_num_sms(before)


class Memory2(Memory):
    """As `Memory1`, for ``deep_ep.ElasticBuffer``, which holds all tokens of a dispatch. A token must not name an expert twice."""

    def send(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, dispatcher: DeepEP) -> tuple[Tensor, Tensor, Tensor, Flight]:
        """As `Memory1.send`."""
        # The kernels are compiled for a number of tokens that no rank exceeds: agreed on, and rounded up so that few are compiled.
        most = torch.tensor(x_TH.shape[0], device=x_TH.device, dtype=torch.int64)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        buffer = self._fit(1 << (max(int(most), 128) - 1).bit_length(), x_TH.shape[1], ids_TK.shape[1])
        x_NH, ids_NK, weights_NK, routes, _ = buffer.dispatch(
            x_TH,
            topk_idx=torch.where(ids_TK < dispatcher.num_experts, ids_TK, -1).to(_library()[0].topk_idx_t),
            topk_weights=weights_TK,
            num_experts=dispatcher.num_experts,
            num_max_tokens_per_rank=self.sizes[0],
            num_sms=dispatcher.num_sms or 0,
        )
        return x_NH, ids_NK, weights_NK, Flight(memory=self, routes=routes, rows=sum(routes.num_recv_tokens_per_expert_list))

    def send_again(self, x_TH: Tensor, flight: Flight) -> Tensor:
        routes = flight.routes
        buffer = self._fit(routes.num_max_tokens_per_rank, x_TH.shape[1], routes.topk_idx.shape[1])
        return buffer.dispatch(x_TH, handle=routes, num_experts=routes.num_experts, num_sms=routes.num_sms)[0]

    def bring_back(self, y_NH: Tensor, weights_NK: Tensor | None, flight: Flight) -> tuple[Tensor, Tensor | None]:
        buffer = self._fit(flight.routes.num_max_tokens_per_rank, y_NH.shape[1], flight.routes.topk_idx.shape[1])
        return buffer.combine(y_NH, flight.routes, topk_weights=weights_NK)[:2]

    def _fit(self, tokens: int, hidden: int, top_k: int) -> Any:
        def make(group, *sizes, **options):
            sizes = dict(zip(("num_max_tokens_per_rank", "hidden", "num_topk"), sizes, strict=True))
            # Reducing more than once would round to bf16 more than once.
            options |= {"allow_multiple_reduction": False, "deterministic": torch.are_deterministic_algorithms_enabled()}
            return _library()[0].ElasticBuffer(group, **sizes, **options)

        return self._grown(make, tokens, hidden, top_k)


_MEMORY: dict[dist.ProcessGroup, Memory1 | Memory2] = {}


def _memory(group: dist.ProcessGroup) -> Memory1 | Memory2:
    if group not in _MEMORY:
        _MEMORY[group] = (Memory2 if hasattr(_library()[0], "ElasticBuffer") else Memory1)(group)
    return _MEMORY[group]


def release(group: dist.ProcessGroup) -> None:
    """Frees the memory that DeepEP has mapped for a group. Call it on every rank of the group, before `destroy_process_group`."""
    if group in _MEMORY:
        _MEMORY.pop(group).release()
