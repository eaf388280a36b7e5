"""Changing a model step by step, with the way back written down first.

The module object stays: a patch swaps its class for a subclass made of a mixin and the class it had. Parents, hooks, ``isinstance``,
output recorders and shared references go on working, and undoing it is putting the class back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import MoePatchError


class Patched:
    """Base of every mixin: finds the class underneath, prints what was done, and pickles.

    The instance attribute ``_moepatch`` holds the patch's state, a plain value without modules or tensors.
    """

    #: True if the patched class goes by the name of the class underneath, for classes whose name is data.
    keeps_name = False
    _moepatch: Any

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"[moepatch: {self._moepatch}]"]
        return ", ".join(part for part in parts if part)

    def __reduce_ex__(self, protocol):
        # The class was made at run time and cannot be found by name: rebuild it from those that can.
        mixins, base = [], type(self)
        while "_moepatch_parts" in vars(base):
            mixin, base = base._moepatch_parts
            mixins.append(mixin)
        return _rebuild, (*reversed(mixins), base), self.__getstate__()


def _rebuild(*parts: type) -> nn.Module:
    *mixins, cls = parts
    for mixin in mixins:
        cls = patched_class(mixin, cls)
    return cls.__new__(cls)


class MadeClasses:
    """Classes that were made at run time, each once, for as long as somebody uses it; threads may ask at once.

    A class that was made for another one refers to it, so what keeps either alive would keep both for ever.
    """

    def __init__(self):
        self._made: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Any, type]] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def get(self, base: type, key: Any, make: Callable[[], type]) -> type:
        """The class that was made for `base` under `key`, or what `make` returns."""
        with self._lock:
            made = self._made.setdefault(base, weakref.WeakValueDictionary())
            cls = made.get(key)
            if cls is None:
                cls = made[key] = make()
            return cls


_MADE = MadeClasses()


def patched_class(mixin: type[Patched], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose behaviour `mixin` overrides; one class for each pair."""
    name = base.__name__ if mixin.keeps_name else f"Patched{base.__name__}"
    described = {"__module__": base.__module__, "__qualname__": name, "__doc__": base.__doc__, "_moepatch_parts": (mixin, base)}
    return _MADE.get(base, mixin, lambda: type(name, (mixin, base), described))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was patched, or its class."""
    cls = type(module)
    while issubclass(cls, Patched):
        cls = cls._moepatch_parts[1]
    return vars(cls).get("_moepatch_stands_for", cls)


def _unpatched(cls: type) -> type:
    """A class without the last patch in it. What was put over the patched class since (``fully_shard``, a parametrization) stays."""
    if "_moepatch_parts" in vars(cls):
        return cls._moepatch_parts[1]
    mixin, base = cls._moepatch_parts
    bases = tuple(_unpatched(c) if issubclass(c, Patched) else c for c in cls.__bases__)
    name = cls.__name__.replace(patched_class(mixin, base).__name__, base.__name__)
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return _MADE.get(cls, _unpatched, lambda: type(name, bases, body))


def is_bare(module: nn.Module) -> bool:
    """Whether not calling a module's ``__call__``, but computing what it does, leaves nothing out."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def what_is_hung_on(module: nn.Module, name: str) -> str | None:
    """Words for the first hook, parametrization or forward of its own of a module or one inside it: what is left out where it is not called.

    Args:
        name: of the module, for the words.
    """
    for path, inner in module.named_modules(prefix=name):
        if is_parametrized(inner):
            weight, ((made, *_), *_) = next(iter(inner.parametrizations.keys())), inner.parametrizations.values()
            return f"{path} has a parametrized {weight} ({type(made).__name__})"
        for attribute, words in _HOOKS.items():
            for hook in vars(inner)[attribute].values():
                return f"{path} has a {words} ({_name_of(hook)})"
        if "forward" in vars(inner):
            return f"{path} has a forward of its own ({_name_of(vars(inner)['forward'])})"
    return None


def gradient_hook_on(parameter: nn.Parameter) -> str | None:
    """The name of the first hook on the gradient of a parameter; None if it has none."""
    hooks = (*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values())
    return _name_of(hooks[0]) if hooks else None


def _name_of(function: Any) -> str:
    named = function.func if isinstance(function, functools.partial) else function
    return named.__qualname__ if hasattr(named, "__qualname__") else type(named).__name__


@dataclass
class InjectClass:
    """The step that turns a module into a patched one.

    Attributes:
        module: the module.
        mixin: what to put over its class, which may be a patched one.
        state: becomes ``module._moepatch``.
        before: the state of the patch underneath.
        needless: whether another site that shares the module had patched it so.
    """

    module: nn.Module
    mixin: type[Patched]
    state: Any
    before: Any = None
    needless: bool = False

    def do(self) -> None:
        """Patches.

        Raises:
            MoePatchError: another site that shares the module has patched it with another state.
        """
        if isinstance(self.module, self.mixin):
            self.needless = True
            if self.module._moepatch != self.state:
                raise MoePatchError(f"One {original_class(self.module).__name__} is part of two modules, and would be patched in two ways: {self.module._moepatch} and {self.state}. Give both the same backend.")
            return
        self.before = vars(self.module).get("_moepatch")
        cls = patched_class(self.mixin, type(self.module))
        self.module._moepatch = self.state
        self.module.__class__ = cls

    def undo(self) -> None:
        """Puts the class back. Parameters, buffers, hooks and flags were never touched."""
        if self.needless:
            return
        if isinstance(self.module, self.mixin):  # a class has a mixin once
            self.module.__class__ = _unpatched(type(self.module))
        if self.before is None:
            vars(self.module).pop("_moepatch", None)
        else:
            self.module._moepatch = self.before


@dataclass
class ReplaceState:
    """The step that gives a patched module another mixin and state, over the same class.

    Attributes:
        module: a patched module.
        mixin, state: the new ones.
        under: a mixin that comes between the new one and the class, or None.
        before: the old ones.
    """

    module: nn.Module
    mixin: type[Patched]
    state: Any
    under: type[Patched] | None = None
    before: tuple[type, Any] | None = None

    def do(self) -> None:
        """Replaces."""
        self.before = type(self.module), self.module._moepatch
        self.module._moepatch = self.state
        base = type(self.module)._moepatch_parts[1]
        self.module.__class__ = patched_class(self.mixin, base if self.under is None else patched_class(self.under, base))

    def undo(self) -> None:
        """Puts the earlier mixin and state back."""
        if self.before is not None:
            self.module.__class__, self.module._moepatch = self.before


class Step(Protocol):
    """Something that was done to a model and can be undone: also where it was broken off half-way, and where it was undone half-way."""

    def do(self) -> None: ...

    def undo(self) -> None: ...


@runtime_checkable
class Committing(Step, Protocol):
    """A step that holds more than it needs until all steps have succeeded."""

    def commit(self) -> None: ...


class Journal:
    """Steps that were done, so that they can be undone in reverse order."""

    def __init__(self):
        self.steps: list[Step] = []

    def do(self, step: Step) -> None:
        """Remembers a step and does it, in this order: it may be broken off anywhere."""
        self.steps.append(step)
        step.do()

    def commit(self) -> None:
        """Lets steps release what only a failure would have needed. After it, undoing a sharded model communicates."""
        for step in self.steps:
            if isinstance(step, Committing):
                step.commit()

    def undo(self, to: int = 0) -> None:
        """Undoes everything, last step first, until so many steps are left."""
        while len(self.steps) > to:
            self.steps[-1].undo()
            self.steps.pop()
