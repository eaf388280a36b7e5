"""What a module computes with that is no part of it: its classes, their functions, whatever these name, enclose and have for defaults, and
torch's settings. Two modules that are equal in themselves and in this compute the same.

What can be compared is compared by value, so that a list or a registry that somebody fills otherwise counts; the rest is equal to itself only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..stand_in import CLOSED, content, names_in
from .functions import classes_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device)
#: Larger containers and tensors count as the objects that they are.
_MOST_ITEMS = 1000
_DEPTH = 4


class Same:
    """An object as a part of a key: equal to itself only, and not kept alive by the key where that can be avoided."""

    __slots__ = ("_get", "_hash")

    def __init__(self, value: Any):
        self._hash = id(value)
        try:
            self._get = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        # What is gone is equal to nothing. Nobody makes one of None.
        value = self._get() if isinstance(other, Same) else None
        return value is not None and other._get() is value


def around(module: nn.Module, configs: Iterable[PreTrainedConfig] = (), functions: Iterable[FunctionType] = ()) -> tuple:
    """Equal, and hashable, for modules around which everything is equal.

    Args:
        module: its attributes and tensors are not looked at, but for functions.
        configs: of the module; their values are not looked at.
        functions: others that count.
    """
    walk = _Walk()
    for cls in dict.fromkeys(cls for part in module.modules() for cls in classes_of(part)):
        walk.of_class(cls)
    for cls in dict.fromkeys(type(config) for config in configs):
        for above in cls.__mro__[: cls.__mro__.index(PreTrainedConfig)]:
            walk.of_class(above)
    for part in module.modules():
        walk.todo += [value for value in vars(part).values() if isinstance(value, FunctionType)]
    walk.todo += functions
    return (*settings(), *walk.found())


def settings() -> tuple:
    """Those of torch that a family's code may ask for, or make tensors by, and that hold while moepatch works."""
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
    )


class _Walk:
    """Goes through functions and what they reach.

    Attributes:
        todo: functions to be looked at.
    """

    def __init__(self):
        self.todo: list[FunctionType] = []
        self._found: list[Any] = []
        self._seen: set[int] = set()

    def of_class(self, cls: type) -> None:
        """Everything that a class says itself."""
        # Python, and ABCs, keep notes on a class; some of them come later.
        said = [(n, v) for n, v in vars(cls).items() if isinstance(v, FunctionType) or not n.startswith(("__", "_abc_", "_moepatch"))]
        self._found.append((Same(cls), *((name, self._meaning(value, _DEPTH)) for name, value in said)))

    def found(self) -> Iterator[Any]:
        """All of it."""
        while self.todo:
            function = self.todo.pop()
            if id(function) not in self._seen:
                self._seen.add(id(function))
                self._found += self._of_function(function)
        yield from self._found

    def _of_function(self, function: FunctionType) -> Iterator[Any]:
        yield Same(function)
        yield Same(function.__code__)
        yield self._meaning(function.__defaults__, _DEPTH)
        yield self._meaning(function.__kwdefaults__, _DEPTH)
        for cell in function.__closure__ or ():
            yield self._meaning(content(cell), _DEPTH)
        if _package(function.__globals__.get("__name__")) in CLOSED:
            return
        names = names_in(function.__code__)
        for name in names:
            value = function.__globals__.get(name)
            yield self._meaning(value, _DEPTH)
            # ``library.SCALE``: which of the names come after which, the names do not tell.
            if isinstance(value, (ModuleType, type)) and _package(value.__name__ if isinstance(value, ModuleType) else value.__module__) not in CLOSED:
                scopes = [vars(value)] if isinstance(value, ModuleType) else [vars(cls) for cls in value.__mro__]
                yield from (self._meaning(next((s[n] for s in scopes if n in s), None), _DEPTH) for n in names)

    def _meaning(self, value: Any, depth: int) -> Any:
        """What is equal for equal values."""
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, FunctionType):
            self.todo.append(value)
            return Same(value)
        if isinstance(value, (staticmethod, classmethod)):
            return type(value), self._meaning(value.__func__, depth)
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if not depth or isinstance(value, (type, ModuleType, CodeType)):
            return Same(value)
        if isinstance(value, property):
            inner: Iterable[Any] = (value.fget,)
        elif isinstance(value, functools.cached_property):
            inner = (value.func,)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            inner = (value.func, value.args, value.keywords)
        elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
            if len(value) > _MOST_ITEMS:
                return Same(value), len(value)
            if isinstance(value, Mapping):
                return type(value), *self._of_items(value.items(), depth)
            inner = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        elif isinstance(value, SimpleNamespace) or _package(type(value).__module__) not in CLOSED:
            return Same(value), *self._of_items(sorted(_attributes(value).items()), depth)
        else:
            return Same(value)
        return type(value), *(self._meaning(item, depth - 1) for item in inner)

    def _of_items(self, items: Iterable[tuple[Any, Any]], depth: int) -> list[tuple[str, Any]]:
        return [(str(key), self._meaning(item, depth - 1)) for key, item in items]

    def _of_tensor(self, value: Tensor) -> Any:
        numbers = numbers_of(value, _MOST_ITEMS)
        if numbers is None:
            return Same(value), None if value.is_inference() else value._version
        return type(value), repr(numbers)  # in words, NaN equals itself


def numbers_of(value: Tensor, most: int) -> tuple | None:
    """Shape, dtype and numbers of a small tensor; None where they cannot be had for nothing: many, on the meta device, sharded, packed."""
    if value.is_meta or value.numel() > most or type(value) not in (Tensor, nn.Parameter):
        return None
    return tuple(value.shape), value.dtype, tuple(value.flatten().tolist())


def _attributes(value: Any) -> dict[str, Any]:
    """`vars`, unseen by an object that writes down what it is asked for."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}


def _package(name: Any) -> str:
    return str(name).partition(".")[0]
