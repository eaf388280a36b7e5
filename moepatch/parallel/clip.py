"""The gradient norm of parameters on different meshes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .fsdp2 import part


@torch.no_grad()
def clip_grad_norm_(parameters: nn.Module | Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scales all gradients so that their common norm is at most `max_norm`; as ``torch.nn.utils.clip_grad_norm_``, but over mixed meshes.

    torch's own stops at parameters of different meshes (experts over ``ep``, everything else over all ranks). Every element counts once,
    wherever it lives.

    Args:
        parameters: a module, parameters or a parameter; those without a gradient are left out.
        max_norm: the largest norm; ``inf`` only measures.
        norm_type: p of the p-norm; ``inf`` for the largest element.

    Returns:
        The norm before clipping, a plain 0-d tensor, equal on all ranks.
    """
    if isinstance(parameters, nn.Module):
        for unit in parameters.modules():
            if isinstance(unit, FSDPModule):
                part(unit)  # a forward after the backward may have gathered it
        parameters = parameters.parameters()
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0, dtype=torch.float32)
    groups: dict[object, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else grad.device, []).append(grad)
    norms = [_whole(torch.nn.utils.get_total_norm(group, norm_type)).to(grads[0].device) for group in groups.values()]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.device))
    return total


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
