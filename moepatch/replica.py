"""Copies of one module at other sizes or with other weights, to try something out without touching the model.

A replica shares the code of its original, but has its own attributes, parameters and buffers, no hooks, not even those that are called for
every module of the process, and the class that the module had before any patch. Sizes are translated by value: every axis of a parameter and
every integer attribute that equals a known size of the module (experts, widths, and products of them) becomes the new size. Sizes that
coincide stay equal, so the translation is a function and a replica is never ambiguous.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .surgery import original_class


def replica(module: nn.Module, sizes: Mapping[int, int], fill: Callable[[Tensor, tuple[int, ...]], Tensor]) -> nn.Module:
    """A copy of `module`.

    Args:
        module: the original; not changed.
        sizes: from old to new sizes, see `size_map`. Empty: the same sizes.
        fill: makes the data of a parameter or buffer from the original tensor and the new shape.
    """
    copy = object.__new__(original_class(module))
    plain = {key: value for key, value in module.__dict__.items() if key not in ("_parameters", "_buffers", "_modules")}
    copy.__dict__.update({key: sizes.get(value, value) if type(value) is int else _unshared(value) for key, value in plain.items()})
    # A forward on the instance, or what is called in its place, belongs to the original and would act on it.
    for shadow in ("_moepatch", "forward", "_compiled_call_impl"):
        copy.__dict__.pop(shadow, None)
    for hooks in [name for name, value in copy.__dict__.items() if "_hooks" in name and isinstance(value, dict)]:
        copy.__dict__[hooks] = OrderedDict()

    def remade(tensor: Tensor) -> Tensor:
        made = fill(tensor, tuple(sizes.get(n, n) for n in tensor.shape))
        return made.clone() if made.is_inference() else made  # a parameter that was made in inference mode can have no gradient

    copy._parameters = {
        name: None if p is None else nn.Parameter(remade(p), requires_grad=p.is_floating_point()) for name, p in module._parameters.items()
    }
    copy._buffers = {name: None if b is None else remade(b) for name, b in module._buffers.items()}
    copy._modules = {name: None if child is None else replica(child, sizes, fill) for name, child in module._modules.items()}
    return unseen(copy)


def unseen(module: nn.Module) -> nn.Module:
    """The module, which must be nobody else's, out of sight of hooks on all modules of the process; those in it are as they were.

    Such hooks count a step's FLOPs or print what is called. A trial is no part of a step, and they may change what it finds.
    """
    if torch_module._has_any_global_hook():
        module._compiled_call_impl = functools.partial(_call, module)  # what ``module(…)`` asks for first
    return module


def _without_global_hooks(function: FunctionType) -> FunctionType:
    """A copy of one of torch's functions for which there are no hooks on all modules."""
    empty = {name: type(value)() for name, value in vars(torch_module).items() if name.startswith("_global_") and isinstance(value, dict)}
    return FunctionType(function.__code__, {**vars(torch_module), **empty}, function.__name__, function.__defaults__, function.__closure__)


_call = _without_global_hooks(nn.Module._call_impl)


def _unshared(value: Any) -> Any:
    """A tensor or a container that a forward of the replica may change; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, set, deque):
        return type(value)(map(_unshared, value)) if type(value) is not deque else deque(map(_unshared, value), value.maxlen)
    return {key: _unshared(item) for key, item in value.items()} if type(value) is dict else value


def size_map(*, num_experts: int, hidden: int, intermediate: int, experts: int = 6, wide: int = 16, narrow: int = 12) -> dict[int, int]:
    """Sizes of a smaller model: at most `experts`, `wide` and `narrow` instead of E, H and I, and their products (2I, E·I).

    Sizes that are equal, or one twice the other, stay so. Empty, which means the same sizes, where a size has two meanings that cannot both
    be kept: that happens only in models that are tiny already. The default widths differ and suit every kernel in fp32.
    """
    if num_experts * intermediate == hidden:
        return {}
    if hidden == intermediate:
        wide = narrow
    elif hidden == 2 * intermediate:
        wide = 2 * narrow
    elif intermediate == 2 * hidden:
        narrow = 2 * wide
    widths = {2 * intermediate: 2 * narrow, intermediate: narrow, hidden: wide}
    fewer = widths.get(num_experts, min(num_experts, experts))
    if fewer < min(num_experts, experts):
        return {}
    return {num_experts * intermediate: fewer * narrow, **widths, num_experts: fewer}


def random_fill(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Fills with random numbers on the CPU: matrices of a scale that keeps activations near 1, vectors (norms) around 1."""

    def fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return (1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise).to(dtype)

    return fill


def slice_fill(dtype: torch.dtype) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Fills with the leading slice of the original's own numbers, on its device, in `dtype` (integers keep theirs)."""

    def fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        part = tensor.detach()[tuple(slice(n) for n in shape)]
        return part.to(dtype, copy=True) if part.is_floating_point() else part.clone()

    return fill
