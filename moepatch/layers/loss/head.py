"""When heads defer their logits, and what one call of a head has to remember for that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ...autocast import autocast_dtype
from ...errors import MoePatchError
from .chunked import Formula

#: ``(hidden_TH, weight_VH, bias_V, labels_T, formula) -> loss``
Compute = Callable[[Tensor, Tensor, Tensor | None, Tensor, Formula], Tensor]


class _State(threading.local):
    on = False
    items: Any = None


_deferring = _State()


@contextmanager
def deferring(items: Tensor | int | None = None):
    """While it is open, patched heads return deferred logits on this thread.

    Args:
        items: what the family will divide a sum of losses by, if it is known (``num_items_in_batch``).
    """
    before = _deferring.on, _deferring.items
    _deferring.on, _deferring.items = True, items
    try:
        yield
    finally:
        _deferring.on, _deferring.items = before


def is_deferring() -> bool:
    """Whether a patched head should defer: never in what is being compiled or traced."""
    return _deferring.on and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def expected_items(device: torch.device) -> Tensor | None:
    """What `deferring` was told, as a number on a device; None where it is not known there."""
    items = _deferring.items
    if type(items) is int:
        return torch.full((), items, dtype=torch.float32, device=device)
    return items if type(items) is Tensor and items.numel() == 1 and items.device == device else None


class Head:
    """One call of a head: its arguments, the modes it was made in, and the logits once they are wanted.

    Args:
        module: the head; asked for its weight again if the one that it had was freed (FSDP2 frees it after the forward pass).
        hidden: ``[..., H]``.
        forward: computes the logits from `hidden` with the module's own code.
        compute: the fused loss.
    """

    def __init__(self, module: nn.Linear, hidden: Tensor, forward: Callable[[Tensor], Tensor], compute: Compute):
        self.module, self.hidden, self.forward, self.compute = module, hidden, forward, compute
        self.weight, self.bias = module.weight, module.bias
        self.version = self._version
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = autocast_dtype(hidden.device)
        self.value: Tensor | None = None

    @property
    def _version(self) -> int:
        return 0 if self.weight.is_inference() else self.weight._version  # inference tensors do not count their changes

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.autocast or self.hidden.dtype

    @property
    def requires_grad(self) -> bool:
        """Of the logits."""
        return self.grad and any(t is not None and t.requires_grad for t in (self.hidden, self.weight, self.bias))

    @property
    def is_gone(self) -> bool:
        """Whether the weight's memory was freed."""
        return self.weight.numel() > 0 and self.weight.untyped_storage().size() == 0

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (a part of the head's own), weight and bias in the dtype that the head computes in."""
        tensors = hidden, self.weight, self.bias
        return tuple(t if t is None else t.to(self.dtype) for t in tensors)

    def logits(self) -> Tensor:
        """Ordinary logits, once."""
        if self.value is None:
            kind = self.hidden.device.type
            with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
                with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
                    self.value = self._compute()
        return self.value

    def _compute(self) -> Tensor:
        if self.is_gone:
            # FSDP2 has the weight in shares again. All ranks have to want the logits; gradients are not theirs to have any more.
            with torch.no_grad():
                weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (self.module.weight, self.module.bias))
                return F.linear(self.hidden, weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype))
        if self._version != self.version:
            raise MoePatchError(
                "The logits of this output were not computed yet, and the head's weight has changed since: they cannot be computed any more. "
                "Read `outputs.logits` before `optimizer.step()`, or leave the loss unpatched: optimize(model, loss=None)."
            )
        if self.module.weight is self.weight:
            return self.forward(self.hidden)
        return F.linear(self.hidden, self.weight, self.bias)
