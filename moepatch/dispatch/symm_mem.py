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
tell each other through a page of shared memory, once for the layers of a forward pass where these have had the same tokens before (`chain`),
else in each dispatch: a host may wait there for another host to come as far, never for a device. From the same numbers all ranks come to the
same decision when buffers have to grow; only then they synchronise.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..gpus import Gpu
from ..kernels.symm_mem import Edges
from ..once import once_differentiable
from .base import Received
from .chain import ALONE, Chain
from .mover import Mover
from .one_host import CudaMemory


def why_not(spec, dtype: torch.dtype, device: torch.device | Gpu) -> str | None:
    """None if tokens can be dispatched through symmetric memory from this device, else the reason; see `registry.Backend`."""
    if device.type != "cuda":
        return f"needs CUDA GPUs, this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if not dist.is_available() or importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} was built without symmetric memory"
    if isinstance(device, Gpu):
        return None  # which GPUs stand beside it is not known
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
    averages = True

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
        self._chain: Chain | None = None
        self._place = 0

    def join(self, chain: Chain, place: int) -> None:
        """See `base.Dispatcher`."""
        self._chain, self._place = chain, place

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Received:
        """See `base.Dispatcher`."""
        ids_TK, weights_TK = topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
        turn = self._chain.turn(self._place, x_TH.shape[0]) if self._chain is not None else ALONE
        edges = self.mover.agree(x_TH, weights_TK, self.capacity, self.group, turn)
        x_NH, ids_NK, weights_NK = _Dispatch.apply(x_TH, weights_TK, ids_TK, edges, self)
        return Received(x_NH=x_NH, ids_NK=ids_NK, weights_NK=weights_NK, rows=None, handle=Routing(ids_TK=ids_TK, ids_NK=ids_NK, edges=edges))

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
    """Tokens ``[T, H]`` and weights ``[T, K]`` to the rows of this rank and their local ids; gradients are multiplied by the number of ranks."""

    @staticmethod
    def forward(ctx, x_TH, weights_TK, ids_TK, edges, dispatcher):
        x_NH, ids_NK, weights_NK = dispatcher.mover.dispatch(x_TH, ids_TK, weights_TK, edges, dispatcher.local_experts, dispatcher.num_sms)
        ctx.mark_non_differentiable(ids_NK)
        ctx.save_for_backward(ids_TK, ids_NK)
        ctx.edges, ctx.dispatcher, ctx.dtype = edges, dispatcher, weights_TK.dtype
        return x_NH, ids_NK, weights_NK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x_NH, _, grad_weights_NK):
        ids_TK, ids_NK = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            grad_weights_NK = None
        dispatcher, edges = ctx.dispatcher, ctx.edges
        grads = dispatcher.mover.back(
            grad_x_NH, grad_weights_NK, ctx.dtype, float(len(edges.tokens)), ids_TK, ids_NK, edges, dispatcher.local_experts, dispatcher.num_sms
        )
        return *grads, None, None, None


class _Combine(torch.autograd.Function):
    """Rows ``[N, H]`` back to the tokens ``[T, H]`` they came from, added up over ranks; gradients are divided by the number of ranks."""

    @staticmethod
    def forward(ctx, y_NH, ids_TK, ids_NK, edges, dispatcher):
        ctx.save_for_backward(ids_NK)
        ctx.edges, ctx.dispatcher = edges, dispatcher
        return dispatcher.mover.back(y_NH, None, None, 1.0, ids_TK, ids_NK, edges, dispatcher.local_experts, dispatcher.num_sms)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        (ids_NK,) = ctx.saved_tensors
        return ctx.dispatcher.mover.gradient_out(grad_TH, ids_NK, ctx.edges, ctx.dispatcher.num_sms), None, None, None, None
