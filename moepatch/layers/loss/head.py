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
from ...parallel.fsdp1 import frees_inside
from .chunked import Formula

#: ``(hidden_TH, weight_VH, bias_V, labels_T, formula) -> loss``. One whose forward pass makes the gradients may have an attribute
#: ``with_gradients``, with the arguments of `chunked.with_gradients`.
Compute = Callable[[Tensor, Tensor, Tensor | None, Tensor, Formula], Tensor]


class _State(threading.local):
    on = False
    items: Any = None
    model: nn.Module | None = None


_deferring = _State()


@contextmanager
def deferring(items: Tensor | int | None = None, model: nn.Module | None = None):
    """While it is open, patched heads return deferred logits on this thread.

    Args:
        items: what the family will divide a sum of losses by, if it is known (``num_items_in_batch``).
        model: whose forward computes the loss; None: whoever called the head.
    """
    before = _deferring.on, _deferring.items, _deferring.model
    _deferring.on, _deferring.items, _deferring.model = True, items, model
    try:
        yield
    finally:
        _deferring.on, _deferring.items, _deferring.model = before


@contextmanager
def not_deferring():
    """While it is open, heads on this thread return ordinary logits."""
    before = _deferring.on
    _deferring.on = False
    try:
        yield
    finally:
        _deferring.on = before


def is_deferring() -> bool:
    """Whether a patched head should defer: never in what is being compiled or traced."""
    return _deferring.on and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def stays(head: nn.Module) -> bool:
    """Whether a head keeps its weight until the loss, as far as FSDP1 is concerned: a unit inside the model that computes it would free it."""
    model = _deferring.model
    return model is None or not frees_inside(model, head)


def expected_items(device: torch.device) -> Tensor | None:
    """What `deferring` was told, as a number on a device; None where it is not known there."""
    items = _deferring.items
    if type(items) is int:
        return torch.full((), items, dtype=torch.float32, device=device)
    return items if type(items) is Tensor and items.numel() == 1 and items.device == device else None


class Head:
    """One call of a head: its arguments, without their graph, and the modes that it was made in.

    It makes the logits whenever they are wanted, as long as its arguments are what they were. What can be seen of a change: that autograd
    counts (``optimizer.step()``, any operator on a parameter), a tensor put in the place of ``weight.data`` (the logits are still those of the old
    one), and, for writing through ``.data`` or into memory, one of about a thousand numbers of the weight and of the bias that are compared. A write
    through ``.data`` that changes a few other numbers alone, or hidden states, cannot be seen.

    Args:
        module: the head; called once more, with its hooks, if its weight was freed meanwhile.
        inputs: hidden states ``[..., H]``, weight ``[V, H]``, bias ``[V]`` or None.
        compute: the fused loss.
    """

    def __init__(self, module: nn.Linear, inputs: tuple[Tensor, Tensor, Tensor | None], compute: Compute):
        self.module, self.compute = module, compute
        self.wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
        # Not the parameters themselves: who empties ``weight.data`` after the forward pass puts other memory there.
        self.hidden, self.weight, self.bias = (None if t is None else t.detach() for t in inputs)
        self.autocast = autocast_dtype(self.hidden.device)
        self.captured = _is_capturing(self.hidden)
        self._versions, self._sample = _versions(self.hidden, self.weight, self.bias), _sample(self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.autocast or self.hidden.dtype

    @property
    def is_gone(self) -> bool:
        """Whether the weight's memory was freed."""
        return _is_freed(self.weight)

    def logits(self) -> Tensor:
        """Ordinary logits without a graph, computed anew.

        Raises:
            MoePatchError: the head's arguments have changed or are gone.
        """
        with torch.no_grad(), torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if not self.is_gone:
                self._check(self.weight, self.bias)
                return F.linear(self.hidden, self.weight, self.bias)
            if isinstance(self.module.weight, DTensor):
                # FSDP2 has the weight in shares again. All ranks have to want the logits.
                shares = self.module.weight, self.module.bias
                weight, bias = (None if t is None else t.full_tensor().to(self.dtype) for t in shares)
                self._check(weight.to(self.weight.dtype), None if bias is None else bias.to(self.bias.dtype))
                return F.linear(self.hidden, weight, bias)
            return self._called_again()

    def loss(
        self, steps, labels_T: Tensor, formula: Formula, wants: tuple[bool, ...]
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]] | None]:
        """The fused loss of the values that `steps` (`steps.Steps`) lead to.

        Args:
            wants: whether the gradients of hidden states, weight and bias are wanted; not those that `self.wants` leaves out.

        Raises:
            MoePatchError: the head's arguments have changed.

        Returns:
            The loss without a graph; and, if gradients are wanted, what makes those of hidden states, weight and bias out of the loss's.
            It may be called once.
        """
        if not _deferring.on:  # else it is the loss of the forward pass that the head is in, and nothing can have come between
            self._check(self.weight, self.bias)
        hidden = self.hidden.detach().requires_grad_(wants[0])
        with torch.set_grad_enabled(wants[0]):
            rows_TH = steps.rows(hidden).to(self.dtype)
        operands = [None if t is None else t.detach().to(self.dtype) for t in (rows_TH, self.weight, self.bias)]
        if not any(wants):
            with torch.no_grad():
                return self.compute(*operands, labels_T, formula), None
        loss, finish = _with_gradients(self.compute, operands, labels_T, formula, wants)

        def gradients(grad: Tensor) -> list[Tensor | None]:
            found = finish(grad)
            if found[0] is not None:
                whole = rows_TH.numel() == hidden.numel() and rows_TH.dtype == hidden.dtype
                found[0] = found[0].view(hidden.shape) if whole else torch.autograd.grad(rows_TH, hidden, found[0])[0]
            dtypes = (t if t is None else t.dtype for t in (self.hidden, self.weight, self.bias))
            return [None if t is None else t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]

        return loss, gradients

    def _check(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises if the head's arguments are not what they were."""
        if _versions(self.hidden, self.weight, self.bias) != self._versions or not _equal(_sample(weight, bias), self._sample):
            raise MoePatchError(
                "The logits of this output were not computed yet, and the head's weight or its input has changed since: they cannot be computed any "
                "more, nor can a loss of them. Read `outputs.logits` before `optimizer.step()`, or leave the loss unpatched: optimize(model, loss=None)."
            )

    def _called_again(self) -> Tensor:
        """What the head returns now: hooks that freed its weight may bring it back."""

        def check(module, args):
            if module.weight.shape != self.weight.shape or _is_freed(module.weight):
                raise MoePatchError(
                    f"The logits of this output were not computed yet, and the memory of the head's weight {tuple(self.weight.shape)} was freed since "
                    "(FSDP does it after a unit's forward): they cannot be computed any more. Put the head and the loss into one unit, or leave the "
                    "loss unpatched: optimize(model, loss=None)."
                )
            self._check(module.weight, module.bias)

        handle = self.module.register_forward_pre_hook(check)  # the last to be called
        try:
            with not_deferring():
                return self.module(self.hidden)
        finally:
            handle.remove()


def _with_gradients(compute: Compute, operands: list[Tensor | None], labels_T: Tensor, formula: Formula, wants: tuple[bool, ...]):
    """The loss without a graph, and what makes the gradients of its operands out of its own."""
    if hasattr(compute, "with_gradients"):
        return compute.with_gradients(*operands, labels_T, formula, wants)
    leaves = [None if t is None else t.detach().requires_grad_(want) for t, want in zip(operands, wants, strict=True)]
    with torch.enable_grad():
        loss = compute(*leaves, labels_T, formula)

    def finish(grad: Tensor) -> list[Tensor | None]:
        found = iter(torch.autograd.grad(loss, [t for t, want in zip(leaves, wants, strict=True) if want], grad))
        return [next(found) if want else None for want in wants]

    return loss.detach(), finish


def _is_freed(weight: Tensor) -> bool:
    return weight.numel() > 0 and weight.untyped_storage().size() == 0


def _versions(*tensors: Tensor | None) -> list[int | None]:
    """How often each was written into, as autograd counts; it does not for inference tensors."""
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def _sample(weight_VH: Tensor, bias_V: Tensor | None) -> list[Tensor]:
    """A copy of some numbers, spread over the tensors."""
    step_V, step_H = (-(-size // 32) for size in weight_VH.shape)
    found = [weight_VH.detach()[:: step_V or 1, :: step_H or 1]] + ([] if bias_V is None else [bias_V.detach()[:: step_V or 1]])
    return [t.clone(memory_format=torch.contiguous_format) for t in found]


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Bit for bit. On a GPU the host waits for the answer, except while a graph is captured, where it is not asked."""
    if _is_capturing(some[0]):
        return True
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(some, others, strict=True))
