"""Changing a model step by step, with the way back written down first.

The module object stays: a patch swaps its class for a subclass made of a mixin and the class it had. Parents, hooks, ``isinstance``,
output recorders and shared references go on working, and undoing it is putting the class back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn


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
        # The class was made at run time and cannot be found by name: rebuild it from the two that can.
        mixin, base = type(self)._moepatch_parts
        return _rebuild, (mixin, base), self.__getstate__()


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls = patched_class(mixin, base)
    return cls.__new__(cls)


@functools.cache
def patched_class(mixin: type[Patched], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose behaviour `mixin` overrides; one class for each pair."""
    name = base.__name__ if mixin.keeps_name else f"Patched{base.__name__}"
    return type(name, (mixin, base), {"__module__": base.__module__, "__qualname__": name, "__doc__": base.__doc__, "_moepatch_parts": (mixin, base)})


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was patched, or its class."""
    return type(module)._moepatch_parts[1] if isinstance(module, Patched) else type(module)


@functools.cache
def _unpatched(cls: type) -> type:
    """A class without the patch in it. What was put over the patched class since (``fully_shard``, a parametrization) stays."""
    if "_moepatch_parts" in vars(cls):
        return cls._moepatch_parts[1]
    bases = tuple(_unpatched(base) if issubclass(base, Patched) else base for base in cls.__bases__)
    mixin, base = cls._moepatch_parts
    name = cls.__name__.replace(patched_class(mixin, base).__name__, base.__name__)
    return type(name, bases, {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")})


def is_bare(module: nn.Module) -> bool:
    """Whether not calling a module's ``__call__``, but computing what it does, leaves nothing out."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


@dataclass
class InjectClass:
    """The step that turns a module into a patched one.

    Attributes:
        module: the module.
        mixin: what to put over its class.
        state: becomes ``module._moepatch``.
    """

    module: nn.Module
    mixin: type[Patched]
    state: Any

    def do(self) -> None:
        """Patches."""
        cls = patched_class(self.mixin, type(self.module))
        self.module._moepatch = self.state
        self.module.__class__ = cls

    def undo(self) -> None:
        """Puts the class back. Parameters, buffers, hooks and flags were never touched."""
        self.module.__class__ = _unpatched(type(self.module))
        del self.module._moepatch


@dataclass
class ReplaceState:
    """The step that gives a patched module another mixin and state, over the same class.

    Attributes:
        module: a patched module.
        mixin, state: the new ones.
        before: the old ones.
    """

    module: nn.Module
    mixin: type[Patched]
    state: Any
    before: tuple[type, Any] | None = None

    def do(self) -> None:
        """Replaces."""
        self.before = type(self.module), self.module._moepatch
        self.module._moepatch = self.state
        self.module.__class__ = patched_class(self.mixin, original_class(self.module))

    def undo(self) -> None:
        """Puts the earlier mixin and state back."""
        self.module.__class__, self.module._moepatch = self.before


class Step(Protocol):
    """Something that was done to a model and can be undone."""

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
        """Does a step and remembers it. A step that fails half-way is undone by the step itself or did nothing yet."""
        step.do()
        self.steps.append(step)

    def commit(self) -> None:
        """Lets steps release what only a failure would have needed. After it, undoing a sharded model communicates."""
        for step in self.steps:
            if isinstance(step, Committing):
                step.commit()

    def undo(self, to: int = 0) -> None:
        """Undoes everything, last step first, until so many steps are left."""
        while len(self.steps) > to:
            self.steps.pop().undo()
