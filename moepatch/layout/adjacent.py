"""Weights that lie one after another in memory, so that several linear layers over one input are one GEMM.

The parameters stay the objects they were, with their names and shapes: only their data become consecutive slices of one buffer. Optimizers,
checkpoints and hooks see no difference, and whatever moves a parameter elsewhere later (``model.to``, FSDP2, loading with ``assign``)
merely takes the neighbourhood away: `joint_linear` looks at every call.

Those who write checkpoints take tensors of one storage for the same weights under several names, and refuse them (safetensors'
``save_model``) or drop all but one (accelerate). In a `state_dict` each therefore has a storage of its own, over the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack, to_dlpack
from torch.utils.hooks import RemovableHandle


def adjacent(*tensors: Tensor) -> Tensor | None:
    """One view ``[ΣN, ...]`` of tensors ``[N, ...]`` that follow each other in one storage; None if they do not.

    >>> both = torch.arange(12.0).view(4, 3)
    >>> adjacent(both[:1], both[1:]).shape
    torch.Size([4, 3])
    >>> adjacent(both[1:], both[:1]) is None
    True
    """
    first = tensors[0]
    if not first.is_contiguous():
        return None
    size, rows, at = first.element_size(), 0, first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        fits = tensor.data_ptr() == at and tensor.dtype is first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not fits or tensor.untyped_storage().data_ptr() != storage:
            return None
        at += tensor.numel() * size
        rows += tensor.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


@dataclass
class Adjacent:
    """The step that moves parameters ``[N, ...]`` of a module beside each other. Nothing happens on the meta device.

    Attributes:
        module: holds them.
        names: relative names, in the order of the buffer.
    """

    module: nn.Module
    names: Sequence[str]
    moved: list[nn.Parameter] = field(default_factory=list)
    hook: RemovableHandle | None = None

    def do(self) -> None:
        """Copies them into one buffer, with one of them twice in memory at a time at most beside it."""
        parameters = [self.module.get_parameter(name) for name in self.names]
        if any(p.device.type == "meta" or p.dtype != parameters[0].dtype for p in parameters) or len({p.device for p in parameters}) > 1:
            return
        self.moved = parameters
        with torch.no_grad():
            buffer = torch.empty((sum(p.shape[0] for p in parameters), *parameters[0].shape[1:]), dtype=parameters[0].dtype, device=parameters[0].device)
            for parameter, part in zip(parameters, buffer.split([p.shape[0] for p in parameters]), strict=True):
                part.copy_(parameter)
                parameter.data = part
        self.hook = self.module.register_state_dict_post_hook(storages_apart)

    def undo(self) -> None:
        """Gives each its own storage again."""
        if self.hook is not None:
            self.hook.remove()
        while self.moved:
            parameter = self.moved.pop()
            parameter.data = parameter.data.clone()


def storages_apart(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    """A hook of `state_dict`: tensors of the module that are slices of something larger become tensors of their size over the same memory."""
    for key, value in state_dict.items():
        # Parameters (of ``keep_vars=True``) and tensors of other kinds stay what they are.
        if key.startswith(prefix) and type(value) is Tensor and value.is_contiguous() and 0 < value.nbytes < value.untyped_storage().nbytes():
            state_dict[key] = _own_storage(value)


def _own_storage(tensor: Tensor) -> Tensor:
    """The same numbers in a storage that begins and ends with them, by way of DLPack, which knows bytes of every dtype."""
    return from_dlpack(to_dlpack(tensor.view(-1).view(torch.uint8))).view(tensor.dtype).view(tensor.shape)


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
