"""The functions that a module's forward may run, and what these keep outside of the module: closures, globals, attributes of classes."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from ..stand_in import CLOSED, content
from ..surgery import original_class

#: What may be changed, or count something, where a function keeps it.
_KEPT = (bool, int, float, list, dict, set, deque, Tensor)


def functions_of(module: nn.Module) -> Iterator[FunctionType]:
    """The functions of a module's own classes, above those of torch."""
    for cls in classes_of(module):
        yield from (value for value in map(_unwrapped, vars(cls).values()) if isinstance(value, FunctionType))


def called_by(function: FunctionType) -> Iterator[FunctionType]:
    """The functions of its module that a function names."""
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    yield from (value for value in named if isinstance(value, FunctionType))


def reached_from(module: nn.Module) -> list[FunctionType]:
    """The functions of a module's classes and among its attributes, those that they name, and those in the closures of all of these."""
    own = [*functions_of(module), *(value for value in vars(module).values() if isinstance(value, FunctionType))]
    found: dict[int, FunctionType] = {}
    todo = [*own, *(called for function in own for called in called_by(function))]
    while todo:
        function = todo.pop()
        if id(function) not in found and not _is_closed(function):
            found[id(function)] = function
            todo += [inner for _, inner in _enclosed(function) if isinstance(inner, FunctionType)]
    return list(found.values())


def numbers_in(function: FunctionType) -> Iterator[int]:
    """The whole numbers that a function computes with: those in its code, its defaults, its closure and under the names that it mentions."""
    yield from _constants(function.__code__)
    values = (*(function.__defaults__ or ()), *(value for _, value in _enclosed(function)), *map(function.__globals__.get, function.__code__.co_names))
    yield from (value for value in values if type(value) is int)


def kept_outside(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the functions of a module could change beside the module: what they name, enclose and have for defaults, and what its classes have."""
    for cls in classes_of(module):
        yield from ((f"{cls.__name__}.{name}", value) for name, value in vars(cls).items() if isinstance(value, _KEPT))
    for function in reached_from(module):
        yield from ((name, value) for name, value in _enclosed(function) if isinstance(value, _KEPT))
        named = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
        yield from ((name, value) for name, value in named if isinstance(value, _KEPT))
        yield from ((f"a default of {function.__name__}", value) for value in function.__defaults__ or () if isinstance(value, _KEPT[3:]))


def classes_of(module: nn.Module) -> Iterator[type]:
    """A module's own classes, above those of torch."""
    for cls in original_class(module).__mro__:
        if cls is nn.Module:
            break
        if not cls.__module__.startswith("torch."):
            yield cls


def _enclosed(function: FunctionType) -> list[tuple[str, Any]]:
    return [(name, content(cell)) for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)]


def _is_closed(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).partition(".")[0] in CLOSED


def _unwrapped(value: Any) -> Any:
    return inspect.unwrap(value) if isinstance(value, FunctionType) else value


def _constants(code: CodeType) -> Iterator[int]:
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _constants(value)
        elif type(value) is int:
            yield value
