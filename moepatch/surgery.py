"""Changing a model step by step, with the way back written down first.

The module object stays: a patch swaps its class for a subclass made of a mixin and the class it had. Parents, hooks, ``isinstance``,
output recorders and shared references go on working, and undoing it is putting the class back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .reads import Reads
from .watch import Change, Watch, watch


class Patched:
    """Base of every mixin: finds the class underneath, prints what was done, and pickles.

    The instance attribute ``_moepatch`` holds the patch's state, a plain value without modules or tensors.
    """

    #: True if the patched class goes by the name of the class underneath, for classes whose name is data.
    keeps_name = False
    #: True if what the mixin computes does not depend on what its family reads of the module.
    unwatched = False
    #: False if it takes weights of any shape.
    reads_shapes = True
    _moepatch: Any
    _moepatch_watch: Watch | None = None

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"[moepatch: {self._moepatch}]"]
        return ", ".join(part for part in parts if part)

    def changes(self) -> tuple[Change, ...]:
        """What of that which the family reads is not what it was at the patch: as long as there is something, the family's code computes."""
        return () if self._moepatch_watch is None else self._moepatch_watch.changes(self)

    def met(self) -> tuple[Change, ...]:
        """Every change that there was so far."""
        return () if self._moepatch_watch is None else tuple(self._moepatch_watch.said)

    def leave_to_family(self) -> None:
        """Is called before the family's code computes what has changed; raises where that code cannot."""

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
    if not mixin.unwatched:
        described["forward"] = _watched(mixin)
    return _MADE.get(base, mixin, lambda: type(name, (mixin, base), described))


def _watched(mixin: type[Patched]) -> Callable[..., Any]:
    """The forward of a mixin, as long as nothing has changed that the family reads."""
    ours = mixin.forward

    @functools.wraps(ours)
    def forward(self, *args, **kwargs):
        watch = self._moepatch_watch
        if watch is None or not watch.changed(self):
            return ours(self, *args, **kwargs)
        self.leave_to_family()
        return super(Patched, self).forward(*args, **kwargs)

    return forward


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
    if hooked or "forward" in module.__dict__:
        return False
    watch = module._moepatch_watch if isinstance(module, Patched) else None
    return watch is None or not watch.changed(module)


@dataclass
class InjectClass:
    """The step that turns a module into a patched one.

    Attributes:
        module: the module.
        mixin: what to put over its class, which may be a patched one.
        state: becomes ``module._moepatch``.
        before: the state of the patch underneath.
    """

    module: nn.Module
    mixin: type[Patched]
    state: Any
    before: Any = None

    def do(self) -> None:
        """Patches."""
        self.before = vars(self.module).get("_moepatch")
        cls = patched_class(self.mixin, type(self.module))
        self.module._moepatch = self.state
        self.module.__class__ = cls

    def undo(self) -> None:
        """Puts the class back. Parameters, buffers, hooks and flags were never touched."""
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
        self.module.__class__ = patched_class(self.mixin, type(self.module)._moepatch_parts[1])

    def undo(self) -> None:
        """Puts the earlier mixin and state back."""
        if self.before is not None:
            self.module.__class__, self.module._moepatch = self.before


@dataclass
class WatchModule:
    """The step that has a patched module notice what changes of that which its family reads.

    Attributes:
        module: a patched module.
        followed: what it reads itself, see `watch`.
        inside: whether the patch knows something of children.
        memo: shared by the modules of a model.
    """

    module: Patched
    followed: Collection[str]
    inside: bool
    memo: dict[type, Reads]

    def do(self) -> None:
        """Writes down what is read, as it is now."""
        module = self.module
        vars(module)["_moepatch_watch"] = watch(module, original_class, Patched, self.followed, self.inside, module.reads_shapes, self.memo)

    def undo(self) -> None:
        """Forgets it."""
        vars(self.module).pop("_moepatch_watch", None)


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
