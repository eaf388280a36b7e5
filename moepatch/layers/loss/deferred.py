"""Logits that are computed only if somebody looks at them, and that autograd knows as what a head returns.

`DeferredLogits` come out of an autograd function of hidden states, weight and bias. They follow what families do to logits before their loss:
scaling, a softcap, a cast to fp32, cuts of the sequence, views, copies. Their cross-entropy is the fused one. Any other operator finds
ordinary logits, the numbers that the head would have returned; gradients flow back through the same graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...autocast import autocast_dtype
from .gradient import DeferredGradient, Part, Prepared
from .head import Compute, Head
from .lazy import Lazy, Numbers, alike, is_view
from .steps import Steps, follow

aten = torch.ops.aten
_CROSS_ENTROPY = F.cross_entropy
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class DeferredLogits(Lazy):
    """See the module's docstring. Made by `defer`."""

    _steps: Steps

    @classmethod
    def of(cls, steps: Steps, layout: tuple, numbers: Numbers) -> DeferredLogits:
        """The values that these steps lead to; `layout` is their shape, strides and offset."""
        made = cls._wrap(*layout, steps.dtype, steps.head.hidden.device, numbers)
        made._steps = steps
        return made

    def _follow(self, func, args, kwargs):
        if args[0] is not self or (steps := follow(self._steps, func, args, kwargs)) is None:
            return NotImplemented
        numbers = self._numbers
        if func not in (aten.detach.default, aten.alias.default):
            view = is_view(func)

            def make(*base):
                return func(*(base or (self._numbers.fresh(),)), *args[1:], **kwargs)

            numbers = Numbers(make, self._numbers if view else None, self._numbers.replayed)
        return self.of(steps, alike(self, func, args, kwargs), numbers)

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is _CROSS_ENTROPY or func is F.cross_entropy:  # another one in its place has been called already, and called torch's own
            with torch._C.DisableTorchFunctionSubclass():
                return cross_entropy(*args, **(kwargs or {}))
        if func in (torch.tanh, Tensor.tanh) and len(args) == 1 and not kwargs and args[0].requires_grad and torch.is_grad_enabled():
            return _Tanh.apply(args[0])
        return super().__torch_function__(func, types, args, kwargs)


def defer(module: nn.Linear, hidden: Tensor, compute: Compute) -> DeferredLogits:
    """The logits ``[..., V]`` of a head, which is not computed, of hidden states ``[..., H]``; `compute` is the fused loss."""
    inputs = hidden, module.weight, module.bias
    head = Head(module, inputs, compute)
    return _Logits.apply(*inputs, head) if any(head.wants) else _logits(head)


def _logits(head: Head) -> DeferredLogits:
    steps = Steps(head, (*head.hidden.shape[:-1], head.weight.shape[0]), head.dtype)
    strides = torch.empty(steps.shape, dtype=steps.dtype, device="meta").stride()
    return DeferredLogits.of(steps, (steps.shape, strides, 0), Numbers(head.logits, replayed=head.captured))


class _Logits(torch.autograd.Function):
    """A head's output as a function of hidden states, weight and bias."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.head, ctx.dtype = head, head.dtype
        return _logits(head)

    @staticmethod
    def backward(ctx, grad):
        saved, head = ctx.saved_tensors, ctx.head
        if not _retains_graph():
            ctx.head = None
        if grad is None:
            return None, None, None, None
        taken, rest = [], grad
        if isinstance(grad, DeferredGradient) and grad._steps.before is None and grad._steps.head is head and not torch.is_grad_enabled():
            taken, rest = grad.take() or ([], grad)
        if rest is not None:
            taken = [*taken, _linear_backward(rest, *saved, ctx.dtype, ctx.needs_input_grad)]
        return *(_sum(grads) for grads in zip(*taken, strict=True)), None


def _retains_graph() -> bool:
    """Whether the backward pass that runs keeps the graph. Else what a node holds besides saved tensors has to go where those do: who keeps a loss
    after its backward, to add it up or to show it, would keep the hidden states of that step as well."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _sum(grads: tuple[Tensor | None, ...]) -> Tensor | None:
    found = [grad for grad in grads if grad is not None]
    return sum(found[1:], found[0]) if found else None


def _linear_backward(grad, hidden, weight, bias, dtype: torch.dtype, wants) -> list[Tensor | None]:
    """What torch's own linear layer hands back, bit for bit; differentiable."""
    with torch.autocast(hidden.device.type, enabled=False):
        grad_TV = grad.reshape(-1, grad.shape[-1])
        x_TH, w_VH = hidden.to(dtype).reshape(-1, hidden.shape[-1]), weight.to(dtype)
        return [
            (grad_TV @ w_VH).view(hidden.shape).to(hidden.dtype) if wants[0] else None,
            (grad_TV.t() @ x_TH).to(weight.dtype) if wants[1] else None,
            grad_TV.sum(0).to(bias.dtype) if wants[2] else None,
        ]


class _Tanh(torch.autograd.Function):
    """torch's own saves its output as a tensor, and hooks on what is saved would look at it."""

    @staticmethod
    def forward(ctx, x):
        out = aten.tanh.default(x)
        ctx.x, ctx.out, ctx.version = x, out.detach(), out._version  # not what is returned: nothing may hold itself
        return out

    @staticmethod
    def backward(ctx, grad):
        x, out = ctx.x, ctx.out
        if out is None:
            raise RuntimeError("Trying to backward through the graph of these logits a second time: specify retain_graph=True the first time.")
        if not _retains_graph():
            ctx.x = ctx.out = None
        _unchanged(out, ctx.version)
        if not torch.is_grad_enabled():
            return aten.tanh_backward.default(grad, out)
        with torch._C.DisableTorchFunctionSubclass():
            return grad * (1 - torch.tanh(x).square())


def _unchanged(x: Tensor, version: int) -> None:
    if x._version != version:
        raise RuntimeError(
            f"Logits of shape {tuple(x.shape)} that are needed for the gradient computation have been modified by an inplace operation: they are at "
            f"version {x._version}, expected version {version}. Modify a clone instead."
        )


def cross_entropy(x, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0):
    """``torch.nn.functional.cross_entropy``, where the logits or others of its arguments may be deferred."""
    old = size_average is not None or reduce is not None
    if isinstance(x, DeferredLogits) and not old and weight is None and label_smoothing == 0 and reduction in ("mean", "sum"):
        steps = x._steps
        fits = len(steps.shape) == 2 and type(target) is Tensor and target.dtype == torch.int64 and target.shape == steps.shape[:1]
        if fits and target.device == x.device and not x._numbers.made and not steps.head.is_gone:
            return _fused(x, target, ignore_index, reduction == "mean")
    if old:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    return torch._C._nn.cross_entropy_loss(x, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing)


def _fused(x: DeferredLogits, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    steps = x._steps
    formula = steps.formula(ignore_index, mean)
    # autocast computes cross-entropy in fp32
    wide = torch.promote_types(x.dtype, torch.float32) if autocast_dtype(x.device) is not None else x.dtype
    if torch.is_grad_enabled() and x.requires_grad:
        return _CrossEntropy.apply(x, target, formula, wide)
    return steps.head.loss(steps, target, formula, wants=(False, False, False))[0].to(wide)


class _CrossEntropy(torch.autograd.Function):
    """The fused loss as a function of deferred logits ``[T, V]``."""

    @staticmethod
    def forward(ctx, x, target, formula, wide):
        ctx.save_for_backward(target)
        head = x._steps.head
        loss, finish = head.loss(x._steps, target, formula, head.wants)
        # Not saved as tensors are: hooks on what is saved would look at it. It is an input, so that nothing holds itself.
        ctx.x, ctx.formula, ctx.wide, ctx.prepared, ctx.version = x, formula, wide, Prepared(finish), x._version
        return loss.to(wide)

    @staticmethod
    def backward(ctx, grad):
        (target,) = ctx.saved_tensors  # raises torch's own error after a backward pass that did not retain the graph
        x, formula, wide, prepared = ctx.x, ctx.formula, ctx.wide, ctx.prepared
        if torch.is_grad_enabled():
            return _differentiable(ctx, target, grad), None, None, None
        if not _retains_graph():
            ctx.x = ctx.prepared = None
        exact = grad.to(torch.promote_types(wide, torch.float32))  # as the loss was before it was rounded
        part = Part(prepared, exact, lambda: _gradient(x._numbers.fresh(), target, formula, wide, grad))
        return DeferredGradient.of(x._steps, (part,)), None, None, None


def _gradient(logits_TV: Tensor, target: Tensor, formula, wide: torch.dtype, grad: Tensor) -> Tensor:
    """The gradient of the cross-entropy of ordinary logits, as torch computes it. Below autograd, so by its operators."""
    log_p_TV = aten._log_softmax(logits_TV.to(wide), 1, False)
    count = (target != formula.ignore_index).sum().to(wide)
    reduction = _REDUCTIONS["mean" if formula.mean else "sum"]
    grad_TV = aten.nll_loss_backward(grad, log_p_TV, target, None, reduction, formula.ignore_index, count)
    return aten._log_softmax_backward_data(grad_TV, log_p_TV, 1, wide).to(logits_TV.dtype)


def _differentiable(ctx, target: Tensor, grad: Tensor) -> Tensor:
    """The same for second derivatives, with a graph of its own: on the logits, as torch does it."""
    x, formula = ctx.x, ctx.formula
    _unchanged(x, ctx.version)
    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass(), torch.autocast(x.device.type, enabled=False):
        loss = torch._C._nn.cross_entropy_loss(
            x.to(ctx.wide), target, None, _REDUCTIONS["mean" if formula.mean else "sum"], formula.ignore_index, 0.0
        )
        return torch.autograd.grad(loss, x, grad, create_graph=True)[0]
