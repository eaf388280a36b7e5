"""Functions of autograd that can be differentiated once: whoever differentiates what their backward passes return gets an error, never a part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import MoePatchError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's decorator of this name, for backward passes that use what the forward pass has saved.

    Torch's looks at the gradients that come in alone, and its error is on no way to any parameter: what depends on saved tensors, or all of it
    where somebody asks for the gradients of some tensors only, would be left out of second derivatives without a word.
    """

    @functools.wraps(backward)
    def once(ctx, *grads):
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # nobody has asked for a graph
            return found
        several = found if isinstance(found, tuple) else (found,)
        made = [value for value in several if isinstance(value, Tensor)]
        origins = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        refused = iter(_Refused.apply(len(made), *made, *origins))
        several = tuple(next(refused) if isinstance(value, Tensor) else value for value in several)
        return several if isinstance(found, tuple) else several[0]

    return once


class _Refused(torch.autograd.Function):
    """Gradients as they are, which depend on their origins in a way that nobody has written down."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise MoePatchError(
            "Second derivatives do not go through moepatch's kernels. Call moepatch.restore(model) before you take them, "
            "or take them with torch.func, whose transforms run the family's own code."
        )
