"""Changing a model step by step, with the way back written down first.

The module object stays: a patch swaps its class for a subclass made of a mixin and the class it had. Parents, hooks, ``isinstance``,
output recorders and shared references go on working, and undoing it is putting the class back.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from .pickling import reduced
from .reads import Reads
from .watch import HOOKS, Answered, Change, Watch, watch

#: torch.compile knows them all.
_compiles, _transforms, _tracing_state = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


class Patched:
    """Base of every mixin: finds the class underneath, prints what was done, copies itself patched, and pickles.

    The instance attribute ``_moepatch`` holds the patch's state, a plain value without modules or tensors.
    """

    #: False if the mixin only stands around a forward: the one underneath says whether something has changed that its family reads.
    stands_aside = True
    #: False if it takes weights of any shape.
    reads_shapes = True
    #: True if the mixin computes with weights of children without calling them, as long as they are bare (see `is_bare`).
    takes_children = False
    _moepatch: Any
    _moepatch_watch: Watch | Answered | None = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # Of mixins alone: what is made of a patched class (``fully_shard``) may find out by its forward that it is the outermost.
        if "forward" in vars(cls) and not issubclass(cls, nn.Module):
            cls.forward = _guarded(cls, cls.forward)

    def traced(self, family: Callable[..., Any], own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a call returns in the midst of ``torch.func`` transforms and of ``torch.jit.trace``: what the family's forward does.

        They see tensors that have no memory, and want to look into every function of autograd.

        Args:
            family, own: the forward underneath, and the mixin's.
            args, kwargs: of the call.
        """
        return family(*args, **kwargs)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"[moepatch: {self._moepatch}]"]
        return ", ".join(part for part in parts if part)

    def changes(self) -> tuple[Change, ...]:
        """What of that which the family reads is not what it was at the patch: as long as there is something, the family's code computes."""
        return () if self._moepatch_watch is None else self._moepatch_watch.changes(self)

    def met(self) -> tuple[Change, ...]:
        """Every change that there was so far."""
        return () if self._moepatch_watch is None else tuple(self._moepatch_watch.said.values())

    def leave_to_family(self) -> None:
        """Is called before the family's code computes what has changed.

        Raises:
            MoePatchError: that code cannot.
        """

    def __copy__(self) -> nn.Module:
        made = type(self).__new__(type(self))
        # The state of the class underneath: a parametrization over the patch lets no pickle have its own.
        super(Patched, made).__setstate__(super().__getstate__())
        return made

    def _replicate_for_data_parallel(self) -> nn.Module:
        """The copy that ``DataParallel`` calls once: its children are copies, too, and it must not be kept for the next call."""
        replica = super()._replicate_for_data_parallel()
        if self._moepatch_watch is not None:
            vars(replica)["_moepatch_watch"] = Answered(self.changes())
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._moepatch_watch is not None:
            self._moepatch_watch.adopt(self)
        self.made_again()
        if "_moepatch_patch" in vars(self):  # it was there before this module had its state
            self._moepatch_patch.copied()

    def made_again(self) -> None:
        """Is called of a deep copy, and of what was unpickled, when it has its state."""

    def __reduce_ex__(self, protocol):
        if self._moepatch_watch is not None:
            self._moepatch_watch.changed(self)  # it says of what is as it was at the patch where to find it
        # Where something was put over the patch (``fully_shard``), that one's way of pickling is asked, or its refusal given.
        return reduced(self, _parts(type(self))) if "_moepatch_parts" in vars(type(self)) else super().__reduce_ex__(protocol)


def _parts(cls: type) -> tuple[tuple[type[Patched], ...], type[nn.Module]]:
    """The mixins of a patched class, the innermost first, and the class underneath."""
    mixins = []
    while "_moepatch_parts" in vars(cls):
        mixin, cls = cls._moepatch_parts
        mixins.append(mixin)
    return tuple(reversed(mixins)), cls


def made_of(parts: tuple[tuple[type[Patched], ...], type[nn.Module]]) -> type[nn.Module]:
    """The class that has these mixins over a class; the opposite of what a pickle takes apart."""
    mixins, cls = parts
    for mixin in mixins:
        cls = patched_class(mixin, cls)
    return cls


def _guarded(mixin: type[Patched], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A mixin's forward, which is left to the family as long as something has changed that its code reads, and to `Patched.traced` in the midst of
    ``torch.func`` transforms and of ``torch.jit.trace``."""

    @functools.wraps(forward)
    def guarded(self, *args, **kwargs):
        compiling, watch = _compiles(), self._moepatch_watch
        if watch is not None and mixin.stands_aside and (watch.changed_in_graph(self) if compiling else watch.changed(self)):
            self.leave_to_family()
            return super(Patched, self).forward(*args, **kwargs)
        if _transforms() or _tracing_state() is not None:
            return self.traced(super(mixin, self).forward, functools.partial(forward, self), args, kwargs)
        return forward(self, *args, **kwargs)

    return guarded


def is_traced() -> bool:
    """Whether a ``torch.func`` transform or ``torch.jit.trace`` is at work on this thread, for which modules run their family's code."""
    return _transforms() or _tracing_state() is not None


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


class _Unnamed(type):
    """The type of patched classes, which stand for the class underneath wherever somebody has got hold of one by ``type(module)``.

    To make an object of such a class makes an ordinary one, a class statement over it extends the class underneath, and the objects of the
    class underneath are objects of it: layers of one class are, though not all of them may be patched.
    """

    def __new__(meta, name: str, bases: tuple[type, ...], body: dict[str, Any], **kwargs: Any):
        # What is made without a statement (``fully_shard``, a parametrization) is made to be put over a patched object.
        if "__qualname__" in body and not any(key.startswith("_moepatch") for key in body):
            bases = tuple(_parts(base)[1] for base in bases)
            meta = max((type(base) for base in bases), key=lambda kind: len(kind.__mro__))
            return meta(name, bases, body, **kwargs)
        return super().__new__(meta, name, bases, body, **kwargs)

    def __call__(cls, *args, **kwargs):
        plain = cls
        while issubclass(plain, Patched):
            plain = _unpatched(plain)
        return plain(*args, **kwargs) if plain is not cls else super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        return inspect.signature(original_of(cls))

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or ("_moepatch_parts" in vars(cls) and isinstance(instance, _parts(cls)[1]))

    def __subclasscheck__(cls, other: type) -> bool:
        # Not ``issubclass``: an abstract class asks all its subclasses, and so this one.
        return super().__subclasscheck__(other) or ("_moepatch_parts" in vars(cls) and type.__subclasscheck__(_parts(cls)[1], other))


def patched_class(mixin: type[Patched], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose behaviour `mixin` overrides; one class for each pair. It goes by the name of `base`, for classes are looked
    up by their names (FSDP's wrapping, device maps, ``architectures`` of a config)."""
    described = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_moepatch_parts": (mixin, base)}
    return _MADE.get(base, mixin, lambda: _type_over(type(base))(base.__name__, (mixin, base), described))


@functools.cache
def _type_over(kind: type) -> type:
    """The type of patched classes over a class of some type."""
    return _Unnamed if kind is type else kind if issubclass(kind, _Unnamed) else type(kind.__name__, (_Unnamed, kind), {})


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was patched, or its class."""
    return original_of(type(module))


def original_of(cls: type) -> type:
    """The class underneath all patches of a class, and what was put over them; or the class."""
    while issubclass(cls, Patched):
        cls = cls._moepatch_parts[1]
    return vars(cls).get("_moepatch_stands_for", cls)


def _unpatched(cls: type) -> type:
    """A class without the last patch in it. What was put over the patched class since (``fully_shard``, a parametrization) stays."""
    if "_moepatch_parts" in vars(cls):
        return cls._moepatch_parts[1]
    bases = tuple(_unpatched(c) if issubclass(c, Patched) else c for c in cls.__bases__)
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return _MADE.get(cls, _unpatched, lambda: type(cls.__name__, bases, body))


def is_bare(module: nn.Module) -> bool:
    """Whether not calling a module's ``__call__``, but computing what it does, leaves nothing out: hooks, which may even bring its weights."""
    if _has_any_global_hook():
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and not is_shadowed(module) and is_as_patched(module)


def is_shadowed(module: nn.Module) -> bool:
    """Whether an instance's own ``forward`` hides that of its class. accelerate leaves the class's own there when it takes its hooks away."""
    if "forward" not in module.__dict__:
        return False
    forward = module.__dict__["forward"]
    return not (isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward)


def _forget_own_forward(module: nn.Module) -> None:
    """Takes a ``forward`` from an instance that is its class's own, before the class becomes another."""
    if not is_shadowed(module):
        module.__dict__.pop("forward", None)


def is_as_patched(module: nn.Module) -> bool:
    """Whether what a patch knows of a module still holds; also of a module that is not patched."""
    watch = module._moepatch_watch if isinstance(module, Patched) else None
    return watch is None or not (watch.changed_in_graph(module) if _compiles() else watch.changed(module))


def what_is_hung_on(module: nn.Module, name: str) -> str | None:
    """Words for the first hook, parametrization or forward of its own of a module or one inside it: what is left out where it is not called.

    Args:
        name: of the module, for the words.
    """
    for path, inner in module.named_modules(prefix=name):
        if is_parametrized(inner):
            weight, ((made, *_), *_) = next(iter(inner.parametrizations.keys())), inner.parametrizations.values()
            return f"{path} has a parametrized {weight} ({type(made).__name__})"
        for attribute, words in HOOKS.items():
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
        state: becomes ``module._moepatch``; None: that of the patch underneath stays.
        before: the state of the patch underneath.
        needless: whether another site that shares the module had patched it so.
    """

    module: nn.Module
    mixin: type[Patched]
    state: Any
    before: Any = None
    needless: bool = False

    def do(self) -> None:
        """Patches."""
        if isinstance(self.module, self.mixin) and self.module._moepatch == self.state:
            self.needless = True
            return
        self.before = vars(self.module).get("_moepatch")
        cls = patched_class(self.mixin, type(self.module))
        _forget_own_forward(self.module)
        if self.state is not None:
            self.module._moepatch = self.state
        self.module.__class__ = cls

    def undo(self) -> None:
        """Puts the class back. Parameters, buffers, hooks and flags were never touched."""
        if self.needless:
            return
        _forget_own_forward(self.module)
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


@dataclass
class WatchModule:
    """The step that has a patched module notice what changes of that which its family reads.

    Attributes:
        module: a patched module.
        followed: what it reads itself, see `watch`.
        inside: whether the patch knows something of children.
        memo: shared by the modules of a model; not kept.
    """

    module: Patched
    followed: Collection[str]
    inside: bool
    memo: dict[type, Reads] | None

    def do(self) -> None:
        """Writes down what is read, as it is now."""
        module = self.module
        vars(module)["_moepatch_watch"] = watch(module, original_class, Patched, self.followed, self.inside, module.reads_shapes, self.memo)
        self.memo = None

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
