"""Logits that are computed only if somebody looks at them.

`DeferredLogits` stands for the output of a head. It knows what the head was called with and follows what families do to logits before
their loss: scaling, a softcap, a cast to fp32, cuts of the sequence, views. Its cross-entropy is the fused one. Anything else that is done
to it is done to ordinary logits, which are then computed as the head would have: the same numbers, the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from .chunked import Formula
from .head import Head, expected_items


@dataclass(frozen=True)
class Steps:
    """What was done to a head's output since, twice: as calls to repeat on ordinary logits, and as a formula over hidden states.

    Attributes:
        calls: functions of the logits.
        hidden: the hidden states that belong to the present rows, ``[..., H]``.
        scale, cap: the present values are ``scale·z``, or with a cap ``cap·tanh(scale·z)``.
        tanh: whether a tanh has been applied (`cap` counts only then).
        dtype: of the present values.
    """

    calls: tuple[Callable[[Tensor], Tensor], ...]
    hidden: Tensor
    dtype: torch.dtype
    scale: float = 1.0
    cap: float = 1.0
    tanh: bool = False

    def formula(self, ignore_index: int, mean: bool) -> Formula:
        """The same as the loss wants it."""
        scale, softcap = (self.scale * self.cap, self.cap) if self.tanh else (self.scale, None)
        return Formula(ignore_index, scale, softcap, mean, None if mean else expected_items(self.hidden.device))


class DeferredLogits(Tensor):
    """See the module's docstring. Made by `defer`."""

    _head: Head
    _steps: Steps
    _value: Tensor | None
    _hooks: list

    @staticmethod
    def __new__(cls, head: Head, steps: Steps):
        shape = (*steps.hidden.shape[:-1], head.weight.shape[0])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=steps.dtype, device=steps.hidden.device, requires_grad=head.requires_grad)
        made._head, made._steps, made._value, made._hooks = head, steps, None, []
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and func in _FOLLOWED and first._head.value is None:
            followed = _FOLLOWED[func](*args, **kwargs)
            if followed is not NotImplemented:
                return followed
        return func(*tree_map(_ordinary, args), **tree_map(_ordinary, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Reached only by code that goes around `__torch_function__`: collectives, for example. Autograd has been passed already.
        def plain(leaf):
            return _ordinary(leaf).detach() if isinstance(leaf, DeferredLogits) else leaf

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def _then(self, call: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
        return DeferredLogits(self._head, replace(self._steps, calls=(*self._steps.calls, call), **changes))


def defer(head: Head) -> DeferredLogits:
    """The logits of a head that has not been computed."""
    return DeferredLogits(head, Steps((), head.hidden, head.dtype))


def _ordinary(leaf: Any) -> Any:
    """The logits that a leaf stands for; other leaves as they are."""
    if not isinstance(leaf, DeferredLogits):
        return leaf
    if leaf._value is None:
        head = leaf._head
        value = head.logits()
        with torch.inference_mode(head.inference), torch.set_grad_enabled(head.grad):
            for call in leaf._steps.calls:
                value = call(value)
        for hook in leaf._hooks if value.requires_grad else ():
            value.register_hook(hook)
        leaf._value = value
    return leaf._value


# What is followed. Each function has the arguments of the torch function that it stands for, and answers NotImplemented where it cannot.


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _times(x, other, *, out=None):
    if not _number(other) or out is not None:
        return NotImplemented
    steps = x._steps
    return x._then(lambda t: t * other, **({"cap": steps.cap * other} if steps.tanh else {"scale": steps.scale * other}))


def _over(x, other, *, rounding_mode=None, out=None):
    if not _number(other) or other == 0 or rounding_mode is not None or out is not None:
        return NotImplemented
    steps = x._steps
    return x._then(lambda t: t / other, **({"cap": steps.cap / other} if steps.tanh else {"scale": steps.scale / other}))


def _tanh(x, *, out=None):
    if x._steps.tanh or out is not None:
        return NotImplemented
    return x._then(torch.tanh, tanh=True)


def _to(x, *args, **kwargs):
    """Casts that lose nothing, and moves to where they are."""
    wanted = [*args, *kwargs.values()]
    if len(wanted) != 1 or not isinstance(wanted[0], torch.dtype | torch.device):
        return NotImplemented
    if wanted[0] in (x._steps.dtype, x._steps.hidden.device):
        return x
    if wanted[0] != torch.float32 or x._steps.dtype not in (torch.bfloat16, torch.float16):
        return NotImplemented
    return x._then(Tensor.float, dtype=torch.float32)


def _float(x, memory_format=torch.preserve_format):
    return _to(x, torch.float32)


def _same(x, memory_format=torch.contiguous_format):
    return x if memory_format == torch.contiguous_format else NotImplemented


def _view(x, *shape, **others):
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    vocab, hidden = x._head.weight.shape
    if others or not shape or not all(type(n) is int for n in shape) or shape[-1] != vocab:
        return NotImplemented
    return x._then(lambda t: t.reshape(shape), hidden=x._steps.hidden.reshape(*shape[:-1], hidden))


def _cut(x, index):
    """``[..., :-1, :]`` and its like: cuts that leave the vocabulary whole."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or type(part) is int or isinstance(part, slice) for part in parts) or parts.count(Ellipsis) > 1:
        return NotImplemented
    dims, named = x._steps.hidden.ndim, len(parts) - parts.count(Ellipsis)
    reaches_last = named == dims or (Ellipsis in parts and parts[-1] is not Ellipsis)
    if named > dims or (reaches_last and parts[-1 if parts[-1] is not Ellipsis else -2] != slice(None)):
        return NotImplemented
    return x._then(lambda t: t[index], hidden=x._steps.hidden[index])


def _cross_entropy(x, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0):
    steps, head = x._steps, x._head
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum") and label_smoothing == 0
    fits = steps.hidden.ndim == 2 and type(target) is Tensor and target.dtype == torch.int64 and target.shape == steps.hidden.shape[:1]
    if not plain or not fits or target.device != steps.hidden.device or head.is_gone:
        return NotImplemented
    loss = head.compute(*head.operands(steps.hidden), target, steps.formula(ignore_index, reduction == "mean"))
    return loss if head.autocast else loss.to(steps.dtype)  # autocast computes cross-entropy in fp32


class _Handle:
    """What `register_hook` of deferred logits returns."""

    def __init__(self, hooks: list, hook: Callable):
        self.hooks, self.hook = hooks, hook

    def remove(self) -> None:
        """Forgets the hook, if the logits were not computed meanwhile."""
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


def _register_hook(x, hook):
    """FSDP2 hangs one on every output: that must not make the logits."""
    if x._value is not None or not x.requires_grad:
        return NotImplemented
    x._hooks.append(hook)
    return _Handle(x._hooks, hook)


_FOLLOWED: dict[Callable, Callable] = {
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), _times),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__), _over),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _tanh),
    **dict.fromkeys((Tensor.view, Tensor.reshape), _view),
    Tensor.to: _to,
    Tensor.type: _to,
    Tensor.float: _float,
    Tensor.contiguous: _same,
    Tensor.__getitem__: _cut,
    Tensor.register_hook: _register_hook,
    F.cross_entropy: _cross_entropy,
}

#: What is known without the logits, and read from the empty tensor that stands for them.
_FACTS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "_base")
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.get_device, torch.is_floating_point, torch.is_complex, torch.numel),
}  # fmt: skip
