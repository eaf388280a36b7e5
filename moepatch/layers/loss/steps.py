"""What is done to a head's output on the way to its loss, as a formula over hidden states.

The rules are by operator, not by Python function, and sound whoever calls the operator: a step says which operator on a gradient leads from
the gradient of its values to the gradient of the values before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .chunked import Formula
from .head import Head, expected_items

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Steps:
    """Where values are between a head and its loss.

    Attributes:
        head: the head's call.
        shape, dtype: of the values, ``[..., V]``.
        cuts: what gives the hidden states that belong to these rows, one after the other.
        scale, cap: the values are ``scale·z``, or with a cap ``cap·tanh(scale·z)``.
        tanh: whether a tanh has been applied (`cap` counts only then).
        before: one step before; None for the head's own output.
        undoes: whether an operator, called with these arguments on the gradient of these values, gives the gradient of those before.
    """

    head: Head
    shape: tuple[int, ...]
    dtype: torch.dtype
    cuts: tuple[Callable[[Tensor], Tensor], ...] = ()
    scale: float = 1.0
    cap: float = 1.0
    tanh: bool = False
    before: Steps | None = None
    undoes: Callable[[Callable, tuple, dict], bool] = field(default=lambda func, args, kwargs: False)

    def formula(self, ignore_index: int, mean: bool) -> Formula:
        """The same as the loss wants it."""
        scale, softcap = (self.scale * self.cap, self.cap) if self.tanh else (self.scale, None)
        return Formula(ignore_index, scale, softcap, mean, None if mean else expected_items(self.head.hidden.device))

    def rows(self, hidden: Tensor) -> Tensor:
        """The hidden states of these rows, ``[..., H]`` of the head's ``[..., H]``."""
        for cut in self.cuts:
            hidden = cut(hidden)
        return hidden

    def then(self, undoes: Callable, cut: Callable | None = None, **changes: Any) -> Steps:
        """The next step."""
        return replace(self, before=self, undoes=undoes, cuts=self.cuts if cut is None else (*self.cuts, cut), **changes)


def follow(steps: Steps, func: Callable, args: tuple, kwargs: dict) -> Steps | None:
    """The steps after an operator whose first argument they lead to: the same for copies and aliases, None for what no loss can follow."""
    rule = _RULES.get(func)
    return None if rule is None else rule(steps, *args[1:], **kwargs)


# A rule has the arguments of the operator after the first.


def _same(steps, *, memory_format=None):
    return steps


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _called_with(funcs: tuple, number: float) -> Callable:
    return lambda func, args, kwargs: func in funcs and not kwargs and len(args) == 2 and _number(args[1]) and args[1] == number


_MUL, _DIV = (aten.mul.Tensor, aten.mul.Scalar), (aten.div.Tensor, aten.div.Scalar)


def _is_factor(value: Any) -> bool:
    """One that can be taken back: a formula divides by its cap."""
    return _number(value) and value != 0 and math.isfinite(value)


def _times(steps, number):
    if not _is_factor(number):
        return None
    return steps.then(_called_with(_MUL, number), **({"cap": steps.cap * number} if steps.tanh else {"scale": steps.scale * number}))


def _over(steps, number):
    if not _is_factor(number):
        return None
    return steps.then(_called_with(_DIV, number), **({"cap": steps.cap / number} if steps.tanh else {"scale": steps.scale / number}))


def _tanh(steps):
    if steps.tanh:
        return None

    def undoes(func, args, kwargs):
        if func is not aten.tanh_backward.default:
            return False
        grad, values = args
        return getattr(values, "_steps", None) is grad._steps

    return steps.then(undoes, tanh=True)


def _cast(steps, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    """Casts that lose nothing."""
    if dtype != torch.float32 or steps.dtype not in (torch.bfloat16, torch.float16) or pin_memory or device not in (None, steps.head.hidden.device):
        return None

    def undoes(func, args, kwargs):
        return func is aten._to_copy.default and kwargs.get("dtype") == steps.dtype and kwargs.get("device") in (None, args[0].device)

    return steps.then(undoes, dtype=dtype)


_VIEWS = (aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.unsqueeze.default, aten.squeeze.dim)


def _shape(func: Callable, shape: tuple[int, ...], args: tuple) -> tuple[int, ...]:
    return tuple(func(torch.empty(shape, dtype=torch.float32, device="meta"), *args).shape)


def _view(func):
    def rule(steps, *args):
        args = args[:1]  # the strides of `_reshape_alias` are those of a tensor in memory
        shape = _shape(aten.view.default if func is aten._reshape_alias.default else func, steps.shape, args)
        if shape == steps.shape:
            return steps
        vocab, hidden = steps.head.weight.shape
        if not shape or shape[-1] != vocab:
            return None

        def undoes(func, args, kwargs):
            own = aten.reshape.default if func is aten._reshape_alias.default else func
            return func in _VIEWS and _shape(own, tuple(args[0].shape), args[1:2]) == steps.shape

        return steps.then(undoes, lambda x: x.reshape(*shape[:-1], hidden), shape=shape)

    return rule


def _slice(steps, dim=0, start=None, end=None, step=1):
    dim %= len(steps.shape)
    size = steps.shape[dim]
    indices = range(size)[start:end:step]
    if len(indices) == size:
        return steps
    if dim == len(steps.shape) - 1:
        return None

    def undoes(func, args, kwargs):
        if func is not aten.slice_backward.default or tuple(args[1]) != steps.shape or args[2] % len(steps.shape) != dim:
            return False
        return range(size)[args[3] : args[4] : args[5]] == indices

    shape = (*steps.shape[:dim], len(indices), *steps.shape[dim + 1 :])
    return steps.then(undoes, lambda x: aten.slice.Tensor(x, dim, start, end, step), shape=shape)


def _select(steps, dim, index):
    dim, size = dim % len(steps.shape), steps.shape[dim]
    if dim == len(steps.shape) - 1:
        return None

    def undoes(func, args, kwargs):
        if func is not aten.select_backward.default or tuple(args[1]) != steps.shape:
            return False
        return args[2] % len(steps.shape) == dim and args[3] % size == index % size

    return steps.then(undoes, lambda x: x.select(dim, index), shape=(*steps.shape[:dim], *steps.shape[dim + 1 :]))


_RULES: dict[Callable, Callable] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.clone.default), _same),
    **dict.fromkeys(_MUL, _times),
    **dict.fromkeys(_DIV, _over),
    **{func: _view(func) for func in _VIEWS},
    aten.tanh.default: _tanh,
    aten._to_copy.default: _cast,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}
