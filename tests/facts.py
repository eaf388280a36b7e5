"""What `restore` has to give back: classes, parameter identities, flags, hooks, attributes and bytes."""

from __future__ import annotations

import torch


def facts(model) -> dict:
    """Everything about a model that a user could notice, as a comparable value."""
    return {
        "classes": [(name, type(m)) for name, m in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()],
        "hooks": [(name, list(m._forward_hooks), list(m._forward_pre_hooks), list(m._state_dict_hooks)) for name, m in model.named_modules()],
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
        "state": [(key, value.dtype, tuple(value.shape), _bytes(value)) for key, value in model.state_dict().items()],
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() and tensor.ndim else repr(tensor).encode()
