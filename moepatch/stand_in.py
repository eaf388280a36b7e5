"""Copies of functions that call something else in the place of a function, however deep; nothing that exists is changed.

A family's forward reaches some functions of transformers by several steps. To have one of them answer otherwise for one model, or for one
trial, the functions on the way are copied, each with globals of its own in which the name stands for something else. The originals, and
whoever else calls them, know nothing of it: other models, other threads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

#: Whose functions are not looked into: they call no family's code by name. What they wrap is.
CLOSED = sys.stdlib_module_names | {"moepatch", "numpy", "torch", "triton"}
_EMPTY = object()


class StandIns:
    """What stands in the place of what.

    Args:
        names: from a module and the name of a function as that module's own functions call it, to what they call instead.

    >>> import textwrap
    >>> wrap = StandIns({(textwrap, "TextWrapper"): lambda width, **kwargs: textwrap.TextWrapper(width=5)})
    >>> wrap.copied(textwrap.wrap)("of ten and two", 70), textwrap.wrap("of ten and two", 70)
    (['of', 'ten', 'and', 'two'], ['of ten and two'])
    """

    def __init__(self, names: Mapping[tuple[ModuleType, str], Callable]):
        self._names = {(id(vars(module)), name): stand_in for (module, name), stand_in in names.items()}

    def copied(self, function: FunctionType) -> FunctionType:
        """A copy of a function, or the function itself where it does not come by any of the names."""
        return self._copies([function]).get(id(function), function)

    def remembered(self, function: FunctionType, memory: dict[FunctionType, Any]) -> FunctionType:
        """As `copied`, of a function that is called again and again.

        Args:
            memory: where copies are kept. One is made anew when a name that the copied functions call has another meaning than it had.
        """
        kept = memory.get(function)
        if kept is None or any(scope.get(name, _EMPTY) is not value for scope, name, value in kept.meanings):
            copies = self._copies([function])
            sources = [source for source in copies.sources if isinstance(source, FunctionType)]
            meanings = [(f.__globals__, name, f.__globals__.get(name, _EMPTY)) for f in sources or [function] for name in names_in(f.__code__)]
            kept = memory[function] = _Kept(copies.get(id(function), function), tuple(meanings))
        return kept.function

    @contextlib.contextmanager
    def within(self, module: nn.Module, *functions: Callable, memory: dict | None = None) -> Iterator[tuple[Callable, ...]]:
        """While this is entered, the methods of a module and of those inside it are copies; the module must be nobody else's.

        Args:
            module: its class, and its functions among its attributes, are exchanged meanwhile.
            functions: others that will be called.
            memory: where copies are kept for the next time, as long as nobody gives the names that functions call another meaning.

        Returns:
            Copies of `functions`.
        """
        parts = list(module.modules())
        plain = [f for f in functions if isinstance(f, FunctionType)]
        values = [v for part in parts for v in vars(part).values() if isinstance(v, FunctionType)]
        classes = tuple(dict.fromkeys(type(part) for part in parts))
        copies = None if memory is None else memory.get((classes, *plain, *values))
        if copies is None:
            copies = self._copies([*plain, *values, *(f for cls in classes for f in _methods(cls))])
            if memory is not None:
                memory[classes, *plain, *values] = copies
        before = [(part, part.__class__, dict(part.__dict__)) for part in parts]
        try:
            for part, cls, attributes in before if copies else ():
                part.__class__ = copies.of_class(cls)
                part.__dict__.update({name: copies[id(value)] for name, value in attributes.items() if id(value) in copies})
            yield tuple(copies.get(id(f), f) for f in functions)
        finally:
            for part, cls, attributes in before if copies else ():
                part.__class__ = cls
                part.__dict__.update({name: value for name, value in attributes.items() if id(value) in copies})

    def _copies(self, starts: list[Any]) -> _Copies:
        """Copies of everything on a way from `starts` to one of the names."""
        seen: dict[int, Any] = {}
        callers: dict[int, list[int]] = {}
        reaching: list[int] = []
        todo = list(starts)
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, FunctionType) and any((id(value.__globals__), name) in self._names for name in names_in(value.__code__)):
                reaching.append(id(value))
            for called in mentioned(value):
                callers.setdefault(id(called), []).append(id(value))
                todo.append(called)
        found: dict[int, Any] = {}
        while reaching:
            at = reaching.pop()
            if at not in found:
                found[at] = seen[at]
                reaching += callers.get(at, ())
        return _Copies(list(found.values()), self._names)


@dataclass(frozen=True)
class _Kept:
    """A copy, and what the names meant that it and the copies under it call: the scope, the name, the value."""

    function: FunctionType
    meanings: tuple[tuple[dict[str, Any], str, Any], ...]


class _Copies(dict[int, Any]):
    """From the ids of functions, and of modules that are called like functions, to their copies.

    Attributes:
        sources: what was copied; it has to live as long as its id is used.
    """

    def __init__(self, sources: list[Any], names: Mapping[tuple[int, str], Callable]):
        self.sources = sources
        self._classes: dict[type, type] = {}
        functions = [source for source in sources if isinstance(source, FunctionType)]
        scopes = {id(f.__globals__): dict(f.__globals__) for f in functions}
        for function in functions:
            cells = tuple(_fresh(cell) for cell in function.__closure__) if function.__closure__ else None
            made = FunctionType(function.__code__, scopes[id(function.__globals__)], function.__name__, function.__defaults__, cells)
            made.__kwdefaults__, made.__qualname__, made.__module__ = function.__kwdefaults__, function.__qualname__, function.__module__
            made.__dict__.update(function.__dict__)
            self[id(function)] = made
        for source in sources:
            if isinstance(source, nn.Module):
                self[id(source)] = copy.copy(source)
                self[id(source)].__class__ = self.of_class(type(source))
        for function in functions:
            self._fill(function, scopes[id(function.__globals__)], names)

    def _fill(self, function: FunctionType, scope: dict[str, Any], names: Mapping[tuple[int, str], Callable]) -> None:
        """Has the names and the closure of a copy mean copies."""
        for name in names_in(function.__code__):
            if (id(function.__globals__), name) in names:
                scope[name] = names[id(function.__globals__), name]
            elif id(function.__globals__.get(name)) in self:
                scope[name] = self[id(function.__globals__[name])]
        for cell in self[id(function)].__closure__ or ():
            if id(content(cell)) in self:
                cell.cell_contents = self[id(content(cell))]

    def of_class(self, cls: type) -> type:
        """A subclass with copies of the methods in it and above it; the class itself where there are none.

        Copies of a parent's methods stand between the class and the parent, where ``super()`` finds them.
        """
        if cls not in self._classes:
            own = {name: _rewrapped(value, self[id(_function(value))]) for name, value in vars(cls).items() if id(_function(value)) in self}
            above = [self.of_class(base) for base in cls.__bases__]
            changed = tuple(made for made, base in zip(above, cls.__bases__, strict=True) if made is not base)
            described = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_moepatch_stands_for": cls}
            self._classes[cls] = type(cls)(cls.__name__, (cls, *changed), {**described, **own}) if own or changed else cls
        return self._classes[cls]


def _fresh(cell: CellType) -> CellType:
    """A cell of its own for a function or a module, which a copy may have to replace; state is shared."""
    held = content(cell)
    return CellType(held) if isinstance(held, (FunctionType, nn.Module)) else cell


def content(cell: CellType) -> Any:
    """What a function's cell holds; an object of its own for one that holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return _EMPTY


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[str, ...]:
    """The names that a function's code mentions, in functions inside it too; attributes are among them."""
    inner = (name for constant in code.co_consts if isinstance(constant, CodeType) for name in names_in(constant))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def mentioned(value: Any) -> Iterator[Any]:
    """What a function may call: functions, and modules that stand for functions, among its names and what it encloses."""
    if isinstance(value, nn.Module):
        yield from _methods(type(value))
        return
    cells = [content(cell) for cell in value.__closure__ or ()]
    package = str(value.__globals__.get("__name__")).partition(".")[0]
    named = [value.__globals__.get(name) for name in names_in(value.__code__)] if package not in CLOSED else []
    for called in (*cells, *named):
        if isinstance(called, (FunctionType, nn.Module)):
            yield called


def _methods(cls: type) -> Iterator[FunctionType]:
    """The functions in a class and above it, but for torch's."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield from (f for f in map(_function, vars(base).values()) if f is not None)


def _function(value: Any) -> FunctionType | None:
    """The function in an entry of a class, or None."""
    value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return value if isinstance(value, FunctionType) else None


def _rewrapped(value: Any, function: FunctionType) -> Any:
    return type(value)(function) if isinstance(value, (staticmethod, classmethod)) else function
