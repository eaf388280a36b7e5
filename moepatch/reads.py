"""What the code of a module may read when it is called, found in the code itself: attributes, config values, methods, functions of its file.

Nothing is run, so branches that no trial takes count as well. The names are those that the code mentions; which of them are anything on a
module, the module says.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from .stand_in import CLOSED, content

#: What Python values are compared by what they are, not by which object they are.
PLAIN = (bool, int, float, complex, str, bytes, type(None))
#: Longer lists are no settings.
_MOST_ITEMS = 64
#: Files whose functions stand around the forward of every class, patched ones too.
_AROUND = ("transformers.modeling_layers",)
#: Packages whose files have nothing to do with each other.
_LARGE = ("", "transformers", "torch.nn.modules")
#: Steps of Python's code between a value and what is read of it.
_NOTHING = ("CACHE", "PUSH_NULL", "COPY", "DUP_TOP", "NOP", "EXTENDED_ARG")


@dataclass(frozen=True)
class Reads:
    """What the forward of a class may read.

    Attributes:
        names: everything that its code mentions, strings included: they may be names of attributes.
        methods: those names that the class defines.
        functions: of the files that the class is written in, and of those beside them: the module of the file, the name, the value now. Constants, too.
        registries: tables of functions that transformers keeps, such as those of attention and experts.
        off: from a name to the names that the code reads of what has that name: ``self.config.x`` is ``x`` of ``config``.
    """

    names: frozenset[str]
    off: Mapping[str, frozenset[str]]
    methods: frozenset[str]
    functions: tuple[tuple[ModuleType, str, Any], ...]
    registries: tuple[Any, ...]


def family_classes(cls: type) -> list[type]:
    """A class and those above it that say what a module of it computes, and not what modules are."""
    return [base for base in cls.__mro__ if base not in nn.Module.__mro__ and base.__module__ not in ("typing", "abc")]


def reads_of(cls: type) -> Reads:
    """What the forward of a class may read, with everything that it calls by name."""
    bases = family_classes(cls)
    return _reads([f for base in bases for f in functions_in(vars(base).get("forward"))], bases, {base.__module__ for base in bases})


def reads_of_function(function: FunctionType) -> Reads:
    """What a function may read, with everything that it calls by name."""
    return _reads([function], [], {str(function.__globals__.get("__name__"))})


def _reads(starts: list[FunctionType], bases: list[type], files: set[str]) -> Reads:
    packages = {package for file in files if (package := file.rpartition(".")[0]) not in _LARGE}
    todo = [(function, True) for function in starts]
    seen: dict[int, FunctionType] = {}
    names: set[str] = set()
    off: dict[str, frozenset[str]] = {}
    functions: dict[tuple[str, str], tuple[ModuleType, str, Any]] = {}
    registries: dict[int, Any] = {}
    while todo:
        function, own = todo.pop()
        if id(function) in seen:
            continue
        seen[id(function)] = function
        file = str(function.__globals__.get("__name__"))
        mentioned = mentions(function.__code__) if file not in _AROUND else frozenset()
        names |= mentioned
        for holder, read in read_off(function.__code__).items() if own else ():
            off[holder] = off.get(holder, frozenset()) | read
        todo += [(f, own) for name in mentioned for base in bases if not name.startswith("__") for f in functions_in(vars(base).get(name))]
        scope = function.__globals__ if file.partition(".")[0] not in CLOSED else {}
        known = {name: scope[name] for name in globals_of(function.__code__) if name in scope}
        if (file in files or file.rpartition(".")[0] in packages) and vars(sys.modules.get(file, object)) is scope:
            functions |= {(file, name): (sys.modules[file], name, value) for name, value in known.items() if _may_be_replaced(value)}
        for value in (*known.values(), *map(content, function.__closure__ or ())):
            todo += [(f, own) for f in functions_in(value)]
            if is_registry(value):  # one of its functions runs, and what they all read of a configuration the others do not
                registries[id(value)] = value
                todo[:0] = [(f, False) for f in {**value._global_mapping, **value._local_mapping}.values() if isinstance(f, FunctionType)]
    methods = frozenset(name for name in names if not name.startswith("__") for base in bases if any(True for _ in functions_in(vars(base).get(name))))
    return Reads(frozenset(names), off, methods, tuple(functions.values()), tuple(registries.values()))


@functools.lru_cache(maxsize=4096)
def mentions(code: CodeType) -> frozenset[str]:
    """Names and strings in a function's code and in functions inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= mentions(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def globals_of(code: CodeType) -> frozenset[str]:
    """The names that a function's code, and functions inside it, look for in their module."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(found).union(*(globals_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


@functools.lru_cache(maxsize=4096)
def read_off(code: CodeType) -> Mapping[str, frozenset[str]]:
    """What a function's code reads of what has a name: an attribute of an attribute or of a variable, also by `getattr` with a constant."""
    found: dict[str, set[str]] = {}
    also: dict[str, str] = {}  # variables that were given an attribute
    holder = None
    for step in dis.get_instructions(code):
        name = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if holder is not None:
                found.setdefault(also.get(holder, holder), set()).add(name)
            holder = name
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME", "LOAD_GLOBAL")):
            holder = name
        elif step.opname.startswith("STORE_FAST"):
            stored = step.argval[0] if isinstance(step.argval, tuple) else step.argval
            if holder is not None:
                also[stored] = also.get(holder, holder)
            holder = name if step.opname.endswith("LOAD_FAST") else None  # one step for both, from Python 3.13 on
        elif step.opname in ("LOAD_CONST", "RETURN_CONST") and isinstance(name, str) and holder is not None:
            found.setdefault(also.get(holder, holder), set()).add(name)
            holder = None
        elif step.opname not in _NOTHING:
            holder = None
    for constant in code.co_consts:
        for holder, read in read_off(constant).items() if isinstance(constant, CodeType) else ():
            found.setdefault(holder, set()).update(read)
    return {holder: frozenset(read) for holder, read in found.items()}


def functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions that a value of a class or a module is made of."""
    value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value.fget if isinstance(value, property) else value
    if isinstance(value, FunctionType):
        yield value


def is_registry(value: Any) -> bool:
    """Whether it is a table of functions by name as transformers keeps them."""
    return isinstance(value, Mapping) and hasattr(value, "_global_mapping") and hasattr(value, "_local_mapping")


def _may_be_replaced(value: Any) -> bool:
    """Whether code that calls it by name would do something else if the name meant something else."""
    if isinstance(value, (list, tuple, dict, set)):
        return len(value) <= _MOST_ITEMS and all(isinstance(item, PLAIN) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, (FunctionType, BuiltinFunctionType, nn.Module, *PLAIN)) or callable(value) and not isinstance(value, type)
