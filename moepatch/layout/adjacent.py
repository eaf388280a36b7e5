"""Weights that lie one after another in memory, so that several linear layers over one input are one GEMM.

The parameters stay the objects they were, with their names and shapes: only their data become consecutive pieces of one buffer. Optimizers,
checkpoints and hooks see no difference, and whatever moves a parameter elsewhere later (``model.to``, FSDP2, loading with ``assign``)
merely takes the neighbourhood away: `joint_linear` looks at every call.

Many take tensors of one storage for one weight under several names: they refuse them (safetensors' ``save_model``), drop all but one
(accelerate) or write the whole storage for each (``torch.save``). So each parameter has a storage of its own, which begins and ends with it
and keeps the buffer under it alive; the buffer is found by its address for as long as somebody does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ..once import once_differentiable


#: The buffers that `side_by_side` has made, by the address of their first byte.
_BUFFERS: dict[int, StorageWeakRef] = {}


def adjacent(*tensors: Tensor) -> Tensor | None:
    """One view ``[ΣN, ...]`` of tensors ``[N, ...]`` that follow each other in one storage or buffer; None if they do not.

    >>> both = torch.arange(12.0).view(4, 3)
    >>> adjacent(both[:1], both[1:]).shape
    torch.Size([4, 3])
    >>> adjacent(both[1:], both[:1]) is None
    True
    """
    first = tensors[0]
    if not first.is_contiguous():
        return None
    size, rows, start = first.element_size(), 0, first.data_ptr()
    at = start
    for tensor in tensors:
        if tensor.data_ptr() != at or tensor.dtype is not first.dtype or tensor.shape[1:] != first.shape[1:] or not tensor.is_contiguous():
            return None
        at += tensor.numel() * size
        rows += tensor.shape[0]
    shape = (rows, *first.shape[1:])
    buffer = _buffer_at(start)
    if buffer is not None and buffer.nbytes() >= at - start and buffer.device == first.device:
        return _over(buffer, shape, first)
    storage = first.untyped_storage().data_ptr()
    return first.as_strided(shape, first.stride()) if all(t.untyped_storage().data_ptr() == storage for t in tensors) else None


def _buffer_at(address: int) -> torch.UntypedStorage | None:
    reference = _BUFFERS.get(address)
    return None if reference is None else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


def _over(storage: torch.UntypedStorage, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A contiguous tensor over the beginning of a storage."""
    if torch._C._len_torch_dispatch_stack():  # tracers such as make_fx have no storages
        with _disable_current_modes():
            return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, shape)
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, shape)


def side_by_side(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of tensors ``[N, ...]`` of one dtype and device, which are `adjacent` and have a storage each."""
    first = tensors[0]
    buffer = torch.empty(sum(t.nbytes for t in tensors), dtype=torch.uint8, device=first.device).untyped_storage()
    for address in [address for address, reference in list(_BUFFERS.items()) if reference.expired()]:
        _BUFFERS.pop(address, None)  # another thread may have been here
    _BUFFERS[buffer.data_ptr()] = StorageWeakRef(buffer)
    made, at = [], 0
    for tensor in tensors:
        made.append(_over(buffer[at : at + tensor.nbytes], tuple(tensor.shape), tensor).copy_(tensor))
        at += tensor.nbytes
    return tuple(made)


def own_storage(tensor: Tensor) -> Tensor:
    """A contiguous tensor over the same memory, in a storage that begins and ends with it."""
    start = tensor.storage_offset() * tensor.element_size()
    return _over(tensor.untyped_storage()[start : start + tensor.nbytes], tuple(tensor.shape), tensor)


@dataclass
class Adjacent:
    """The step that moves parameters ``[N, ...]`` of a module beside each other. Nothing happens on the meta device.

    Attributes:
        module: holds them.
        names: relative names, in the order of the buffer.
        moved: where each was put. The parameters themselves are not kept: a framework that shards them would free nothing.
    """

    module: nn.Module
    names: Sequence[str]
    moved: list[int] = field(default_factory=list)

    def do(self) -> None:
        """Copies them into one buffer."""
        parameters = [_parameter_of(self.module, name) for name in self.names]
        if not _can_be_neighbours(parameters):
            return
        with torch.no_grad():
            pieces = side_by_side(parameters)
            self.moved = [piece.data_ptr() for piece in pieces]
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.data = piece

    def copied(self) -> None:
        """Puts those of a copied model beside each other, too: copies are made one by one. The outermost module gets its state last, and asks again."""
        if self.moved and "_modules" in vars(self.module):
            parameters = [_parameter_of(self.module, name) for name in self.names]
            if [None if parameter is None else parameter.data_ptr() for parameter in parameters] != self.moved:
                self.moved = []
                self.do()

    def undo(self) -> None:
        """Takes each out of the buffer, if it still lies there: others may have given it another place, and rely on that."""
        for name, address in zip(self.names, self.moved):
            parameter = _parameter_of(self.module, name)
            if type(parameter) is nn.Parameter and parameter.data_ptr() == address:
                parameter.data = parameter.data.clone()
        self.moved = []


def _parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of a name; None where something else is there now, such as a wrapper that holds it under another name."""
    path, _, leaf = name.rpartition(".")
    for step in filter(None, path.split(".")):
        module = module._modules.get(step)
        if module is None:
            return None
    return module._parameters.get(leaf)


def _can_be_neighbours(parameters: Sequence[nn.Parameter | None]) -> bool:
    plain = all(isinstance(p, nn.Parameter) and type(p.data) is Tensor and p.device.type != "meta" and p.numel() > 0 for p in parameters)
    return plain and len({(p.device, p.dtype) for p in parameters}) == 1


def joint_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """Several linear layers over one input as one GEMM.

    Args:
        x: ``[..., K]``, in the dtype of the weights.
        weights: of shapes ``[N_i, K]``; fastest where they are `adjacent`, else they are copied together.
        biases: of shapes ``[N_i]``, or None.

    Returns:
        ``[..., ΣN_i]``. The gradients of weights and biases are slices of one buffer each.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)) if biases else None)
    flat = _JointLinear.apply(x.reshape(-1, x.shape[-1]), len(weights), *weights, *(biases or ()))
    return flat.view(*x.shape[:-1], flat.shape[-1])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one ``[ΣN, ...]``: a view where they are adjacent, else a copy."""
    if len(tensors) == 1:
        return tensors[0]
    # A tracer's tensors have no addresses.
    whole = None if torch.compiler.is_compiling() else adjacent(*tensors)
    return torch.cat(list(tensors)) if whole is None else whole


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, count, *tensors):
        weights, biases = tensors[:count], tensors[count:]
        ctx.save_for_backward(x_TK, *weights)
        ctx.rows = [w.shape[0] for w in weights]
        weight_NK = joined(weights)
        return torch.addmm(joined(biases), x_TK, weight_NK.t()) if biases else x_TK @ weight_NK.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        x_TK, *weights = ctx.saved_tensors
        count = len(weights)
        wanted = ctx.needs_input_grad
        dx_TK = dy_TN @ joined(weights) if wanted[0] else None
        dw = (dy_TN.t() @ x_TK).split(ctx.rows) if any(wanted[2 : 2 + count]) else [None] * count
        db = dy_TN.sum(0).split(ctx.rows) if any(wanted[2 + count :]) else [None] * (len(wanted) - 2 - count)
        return dx_TK, None, *dw, *db
