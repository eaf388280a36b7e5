"""Whether what the family's code of a patched module reads at each call still is what it was at the patch.

A patch knows of a module what a matcher has found out: numbers, names, an activation. The family reads them anew at each call. So each
patched module has a `Watch`: everything that its family's forward may read (see `reads`), with the value that it had. A call compares
identities, all at once; where one is another, the values are looked at, and as long as one differs the family's code computes the module.

What a patched module reads itself at each call is followed and not watched: the numbers in its weights, children that it calls.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .reads import PLAIN, Reads, family_classes, reads_of, reads_of_function


class Absent:
    """Stands for what is not there. The class itself is used: it is the same one in every process."""


class Loaded:
    """Stands in a pickle for the object that the module of the same pickle has."""


class Followed:
    """Stands for a value that may change: it says only where other things are."""


#: What of a module changes what calling it gives, beside its forward: attributes, and the words for what they hold.
HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
#: How transformers' configurations keep which function computes experts.
EXPERTS_CHOICE = "_experts_implementation_internal"
#: What every module has.
_MODULES_OWN = frozenset(vars(nn.Module())) | {"_moepatch", "_moepatch_watch"}
_MOST_ITEMS = 64
#: What a pickle says by name or value, or has once for a module and its watch.
_SAID = (*PLAIN, list, dict, set, tuple, type, FunctionType, BuiltinFunctionType, nn.Module, torch.Tensor)
#: What may change and stay the same object.
_CONTAINERS = (list, dict, set)


class Entry(NamedTuple):
    """One thing that is read.

    Attributes:
        kind: where it lies, a key of `_SCOPES`; ``class`` (of which it is an attribute), ``shape`` (of a parameter) or ``hooks``.
        path: the name of the child that has it; empty for the module itself.
        via: the attribute with the configuration, the class, the Python module or the registry that has it, if one does.
        name: of the thing.
        value: at the patch.
    """

    kind: str
    path: str
    via: Any
    name: str
    value: Any

    @property
    def words(self) -> str:
        """Its name for people."""
        via = self.via if isinstance(self.via, str | None) else getattr(self.via, "__name__", type(self.via).__name__).rpartition(".")[2]
        path = "" if self.kind in ("class", "global", "registered", "registry") else self.path
        return ".".join(part for part in (path, via, self.name) if part)


#: Where things lie of a module: the dict that has their names.
_SCOPES = {
    "attribute": lambda owner, via: owner.__dict__,
    "parameter": lambda owner, via: owner._parameters,
    "buffer": lambda owner, via: owner._buffers,
    "child": lambda owner, via: owner._modules,
    "config": lambda owner, via: getattr(owner.__dict__.get(via), "__dict__", {}),
    "choice": lambda owner, via: getattr(owner.__dict__.get(via), "__dict__", {}),
    "global": lambda owner, via: vars(via),
    "registered": lambda owner, via: via._local_mapping,
    "registry": lambda owner, via: via._global_mapping,
}


class Change(NamedTuple):
    """Something that is not what it was at the patch, in words."""

    what: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.what} is {self.now} and was {self.was} at the patch"


class _Bound(NamedTuple):
    """What a call of one module asks.

    Attributes:
        module: copies of it share a watch for a moment.
        still: whether everything is where and what it was when it was looked at; raises `_GONE` where something is gone.
        changes: what was not as at the patch then.
    """

    module: nn.Module
    still: Callable[[], bool]
    changes: tuple[Change, ...]


class _Question:
    """``a["top_k"] is b and c.forward is d and …`` as one function. A loop over what is watched takes three times as long, at every call."""

    def __init__(self):
        self.terms: list[str] = []
        self.values: dict[str, Any] = {}

    def ask(self, term: str, *values: Any) -> None:
        """Adds a term, with a value for each ``{}``."""
        names = [f"v{len(self.values) + i}" for i in range(len(values))]
        self.values.update(zip(names, values, strict=True))
        self.terms.append(term.format(*names))

    def function(self) -> Callable[[], bool]:
        """What answers it."""
        return eval(_compiled(f"lambda: {' and '.join(self.terms) or 'True'}"), self.values)


@functools.lru_cache(maxsize=512)
def _compiled(text: str) -> CodeType:
    return compile(text, "<moepatch.watch>", "eval")


#: What is raised where a key, a method or a tensor is gone, or tensors or arrays, which are neither equal nor not, stand where something else was.
_GONE = (KeyError, AttributeError, TypeError, RuntimeError, ValueError)


@dataclass(eq=False)
class Watch:
    """What one patched module's family reads.

    Attributes:
        entries: everything, as it was at the patch.
        types: the classes that the children had.
        said: every change that was met, in order; of what changes again and again the last one.
    """

    entries: tuple[Entry, ...]
    types: Mapping[str, type]
    said: dict[str, Change] = field(default_factory=dict)
    _bound: _Bound | None = field(default=None, repr=False)

    def changed(self, module: Any) -> bool:
        """Whether something is not what it was: what each call asks, for some tens of nanoseconds an entry.

        Args:
            module: whose watch it is; anything, for the watch of functions.
        """
        bound = self._bound
        if bound is not None and bound.module is module:
            try:
                still = bound.still()
            except _GONE:
                still = False
            if still:
                return bool(bound.changes)
        return bool(self.changes(module))

    def changes(self, module: nn.Module) -> tuple[Change, ...]:
        """What is not what it was."""
        bound = self._bound = self._bind(module)
        self.said.update({change.what: change for change in bound.changes})
        return bound.changes

    def without_choice(self) -> Watch:
        """The same for a module that nothing of transformers' can stand in for: which function transformers would call is no matter."""
        return Watch(tuple(entry for entry in self.entries if entry.kind not in ("choice", "registered", "registry")), self.types)

    def _owner(self, module: nn.Module, path: str) -> nn.Module | None:
        """The child that an entry speaks of, if it still is of the class that it was: it may have been wrapped."""
        if not path:
            return module
        above, _, name = path.rpartition(".")
        parent = self._owner(module, above)
        child = None if parent is None else parent._modules.get(name)
        return child if isinstance(child, self.types[path]) else None

    def _stands_in(self, parent: nn.Module, entry: Entry) -> bool:
        """Whether a child does what the one did that the patch knows: it is of that class, or wraps a weight of that shape, as adapters do."""
        child, path = parent._modules.get(entry.name), _below(entry)
        if isinstance(child, self.types[path]):
            return True
        shape = next((other.value for other in self.entries if other.path == path and other.name == "weight" and other.kind == "shape"), None)
        return shape is not None and getattr(getattr(child, "weight", None), "shape", None) == shape

    def _has(self, module: nn.Module | None, entry: Entry) -> bool:
        """Whether an attribute still is the object that it was."""
        owner = None if module is None else self._owner(module, entry.path)
        return owner is not None and vars(owner).get(entry.name) is entry.value

    def _chosen(self, module: nn.Module, entry: Entry) -> dict[str, Any]:
        """Where a choice lies; nowhere, if the child has been wrapped or exchanged."""
        owner = self._owner(module, entry.path)
        return {} if owner is None else _SCOPES["choice"](owner, entry.via)

    def _bind(self, module: nn.Module) -> _Bound:
        question, found = _Question(), []
        for entry in self.entries:
            owner = self._owner(module, entry.path)
            if owner is None:
                continue
            if entry.kind == "hooks":
                now = owner.__dict__[entry.name]
                question.ask("{}" if now else "not {}", now)
                differs = bool(now)
            elif entry.kind == "shape":
                parameter = owner._parameters.get(entry.name)
                if parameter is None:  # parametrized, or elsewhere for a while
                    continue
                now = parameter.shape  # asking for the number of numbers takes half as long
                # ZeRO-3's own kind of dict gathers a weight whose item is read, and remembers that for good.
                item = f"[{entry.name!r}]" if type(owner._parameters) is dict else f".get({entry.name!r})"
                question.ask(f"{{}}{item}.numel() == {now.numel()}", owner._parameters)
                differs = now != entry.value and now.numel() > 0  # a framework may have emptied it until it is needed
            else:
                if entry.kind == "class":
                    now, bound = _of_class(entry.via, entry.name)
                    question.ask(f"{{}}.{entry.name}{'.__func__' if bound else ''} is {{}}", entry.via, now)
                else:
                    scope = _SCOPES[entry.kind](owner, entry.via)
                    now = scope.get(entry.name, Absent)
                    question.ask(*((f"{entry.name!r} not in {{}}", scope) if now is Absent else (f"{{}}[{entry.name!r}] is {{}}", scope, now)))
                if isinstance(now, _CONTAINERS) and entry.value is not Followed:
                    question.ask("{} == {}", now, copy.copy(now))
                differs = not _same(now, entry.value, entry.kind == "choice")
                if entry.kind == "child" and entry.value is Followed and not self._stands_in(owner, entry):
                    entry, differs = entry._replace(value=self.types[_below(entry)]), True
            if differs:
                found.append(_change(entry, now))
        return _Bound(module, question.function(), tuple(dict.fromkeys(found)))

    def adopt(self, module: nn.Module) -> None:
        """After a pickle: what a configuration says now is what it said at the patch, if it is equal; which string object it was no pickle says."""
        entries = []
        for entry in self.entries:
            if entry.value is Loaded and (owner := self._owner(module, entry.path)) is not None:
                entry = entry._replace(value=vars(owner).get(entry.name, Absent))
            if entry.kind == "choice" and isinstance(entry.value, tuple):
                scope = self._chosen(module, entry)
                if (scope.get(entry.name),) == entry.value:
                    scope[entry.name] = marked(scope[entry.name])
                    entry = entry._replace(value=scope[entry.name])
            entries.append(entry)
        self.entries = tuple(entries)

    def changed_in_graph(self, module: nn.Module) -> bool:
        """As `changed`, in steps that torch.compile can follow, so that it guards what they read. Graphs are made anew for other shapes anyway, and
        which object a string is they do not know."""
        for entry in self.entries:
            if entry.value is not Followed and entry.kind != "shape":
                owner = module
                for step in entry.path.split(".") if entry.path else ():
                    owner = owner._modules.get(step)
                    if owner is None:
                        break
                if owner is not None and (not entry.path or isinstance(owner, self.types[entry.path])) and _differs_in_graph(owner, *entry):
                    return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        # Functions are those of the process that loads the module, if they are called what these are, and where things lie is for it to find out.
        kept = []
        module = self._bound and self._bound.module
        for entry in self.entries:
            if entry.kind == "choice" and (module is None or self._chosen(module, entry).get(entry.name) is entry.value):
                kept.append(entry._replace(value=(entry.value,)))  # which object it is a pickle does not say
            elif entry.kind == "attribute" and not isinstance(entry.value, _SAID) and self._has(module, entry):
                kept.append(entry._replace(value=Loaded))
            elif entry.kind == "global":
                kept.append(entry._replace(via=entry.via.__name__, value=_named(entry.value)))
            elif entry.kind in ("registered", "registry"):
                kept.append(entry._replace(via=_found_as(entry.via), value=_named(entry.value)))
            else:
                kept.append(entry._replace(value=_named(entry.value)) if entry.kind == "class" else entry)
        return {"entries": tuple(kept), "types": dict(self.types), "said": self.said}

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries = []
        for entry in state["entries"]:
            if entry.kind == "global":
                entry = entry._replace(via=sys.modules.get(entry.via))
            elif entry.kind in ("registered", "registry"):
                entry = entry._replace(via=getattr(sys.modules.get(entry.via[0]), entry.via[1], None))
            if entry.kind in ("global", "registered", "registry", "class"):
                if entry.via is None:
                    continue
                now = _of_class(entry.via, entry.name)[0] if entry.kind == "class" else _SCOPES[entry.kind](None, entry.via).get(entry.name, Absent)
                entry = entry._replace(value=_kept(now)) if _named(now) == entry.value else entry
            entries.append(entry)
        self.entries, self.types, self.said, self._bound = tuple(entries), state["types"], state["said"], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        copied = {"attribute", "child", "config"}
        entries = (entry._replace(value=copy.deepcopy(entry.value, memo)) if entry.kind in copied else entry for entry in self.entries)
        return Watch(tuple(entries), self.types, dict(self.said))


class _Named(NamedTuple):
    """What a pickle says of something that code holds: where it was written, and how it was called there."""

    file: str
    name: str


def _named(value: Any) -> Any:
    if value is Absent or isinstance(value, (*PLAIN, _Named)):
        return value
    if isinstance(value, (*_CONTAINERS, tuple)) and all(isinstance(item, PLAIN) for item in (value.values() if isinstance(value, dict) else value)):
        return value
    if isinstance(value, FunctionType):  # a decorator may have given it another's name
        return _Named(str(value.__globals__.get("__name__")), value.__code__.co_name)
    own = value if hasattr(value, "__qualname__") else type(value)
    return _Named(str(own.__module__), own.__qualname__)


def _differs_in_graph(owner: Any, kind: str, path: str, via: Any, name: str, value: Any) -> bool:
    if kind == "hooks":
        return bool(getattr(owner, name))
    if kind == "class":
        now, _ = _of_class(via, name)
    elif kind == "global":
        now = getattr(via, name, Absent)
    elif kind in ("registered", "registry"):
        now = (via._local_mapping if kind == "registered" else via._global_mapping).get(name, Absent)
    elif kind in ("config", "choice"):
        now = getattr(getattr(owner, via), name, Absent)
    elif kind == "attribute":
        now = getattr(owner, name, Absent)  # asked for in any case: that a dict does not have a key is not guarded
        now = now if name in owner.__dict__ else Absent
    else:
        now = getattr(owner, name, Absent)
    by_value = isinstance(value, (*PLAIN, *_CONTAINERS, tuple)) and not isinstance(value, _Named)
    return now != value if by_value else now is not value


class Answered:
    """Stands for the watch of a copy of a module that is made for one call: what that module said then.

    Args:
        said: its changes.
    """

    def __init__(self, said: tuple[Change, ...]):
        self.said = {change.what: change for change in said}

    def changed(self, module: Any) -> bool:
        """As of `Watch`."""
        return bool(self.said)

    changed_in_graph = changed

    def changes(self, module: Any) -> tuple[Change, ...]:
        """As of `Watch`."""
        return tuple(self.said.values())


def _of_class(cls: type, name: str) -> tuple[Any, bool]:
    """What a class has under a name, and whether it is the function of a class method, of which asking makes a new object each time."""
    value = getattr(cls, name, Absent)
    bound = isinstance(value, MethodType)
    return value.__func__ if bound else value, bound


def _kept(value: Any) -> Any:
    """What of a value is written down: of what may change and stay the same object a copy."""
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def _below(entry: Entry) -> str:
    return f"{entry.path}.{entry.name}" if entry.path else entry.name


def _found_as(registry: Any) -> tuple[str, str]:
    """The Python module that has a registry, and its name there."""
    file = type(registry).__module__
    return file, next((name for name, value in vars(sys.modules[file]).items() if value is registry), "")


def _same(now: Any, then: Any, only_itself: bool = False) -> bool:
    """Whether a value may stand for another one: Python's plain values by what they are, all others if they are the same object."""
    if now is then or then is Followed:
        return True
    if isinstance(then, _Named):
        return _named(now) == then
    if only_itself or type(now) is not type(then):
        return False
    if isinstance(now, (list, tuple)):
        return len(now) == len(then) and all(map(_same, now, then))
    if isinstance(now, (dict, set)):
        return now == then
    return isinstance(now, PLAIN) and (now == then or now != now and then != then)


def _change(entry: Entry, now: Any) -> Change:
    if entry.kind == "hooks":
        return Change(entry.path, "without hooks", "hooked")
    if entry.kind == "choice":
        was = entry.value[0] if isinstance(entry.value, tuple) else entry.value
        return Change(f"{entry.via}._experts_implementation", repr(was), f"{now!r} by choice")
    if entry.kind == "shape":
        return Change(f"the shape of {entry.words}", str(list(entry.value)), str(list(now)))
    return Change(entry.words, *(_in_words(value) for value in (entry.value, now)))


def _in_words(value: Any) -> str:
    if value is Absent:
        return "not there"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, torch.Tensor):  # to look into it would wait for the device
        return f"a tensor {list(value.shape)}"
    if isinstance(value, type):
        return value.__name__
    if callable(value):
        return "another function" if not hasattr(value, "__qualname__") else f"{value.__module__}.{value.__qualname__}"
    text = ".".join(value) if isinstance(value, _Named) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


# --- what is watched -----------------------------------------------------------------------------------------------------------------


def watch(
    module: nn.Module,
    family: Callable[[nn.Module], type],
    patched: type,
    followed: Collection[str],
    inside: bool,
    shapes: bool,
    memo: dict[type, Reads],
) -> Watch:
    """The watch of a module as it is now.

    Args:
        module: patched or not.
        family: gives the class that a module had before it was patched.
        patched: the class of modules that have a watch of their own.
        followed: names of attributes and config values that the patched module reads itself.
        inside: whether what the patch knows may come from children that have weights.
        shapes: whether it may come from the shapes of weights.
        memo: what classes read, shared by the modules of a model.
    """
    entries: list[Entry] = []
    types: dict[str, type] = {}
    todo = [("", module)]
    while todo:
        path, part = todo.pop(0)
        entries += _of_part(part, family(part), path, followed, shapes, memo)
        entries += [Entry("shape", path, None, name, p.shape) for name, p in part._parameters.items() if shapes and p is not None]
        for name, child in part._modules.items():
            if child is None:
                entries.append(Entry("child", path, None, name, None))
                continue
            below = f"{path}.{name}" if path else name
            types[below] = family(child)
            # What has weights is called by patched modules, or looked at; an activation is known from the patch alone.
            known = next(child.parameters(), None) is None
            entries.append(Entry("child", path, None, name, child if known else Followed))
            if (inside or known) and not isinstance(child, patched):
                todo.append((below, child))
                entries += [Entry("hooks", below, None, hooks, None) for hooks in HOOKS] if known else []
                entries += [Entry("attribute", below, None, "forward", Absent)] if known else []
    everywhere = ("class", "global", "registered", "registry")  # the same, whichever part of the module reads it
    once = {(e.kind, None if e.kind in everywhere else e.path, id(e.via) if e.kind in everywhere else e.via, e.name): e for e in reversed(entries)}
    return Watch(tuple(reversed(once.values())), types)


def watch_functions(registry: Any, name: str | None, eager: Collection[tuple[ModuleType, str, FunctionType]]) -> Watch:
    """The watch of what a name means that transformers looks up.

    Args:
        registry: of functions by name.
        name: of one of them; or of none, where each family has its own.
        eager: those own ones, each with the Python module and the name under which its family finds it.
    """
    if name in registry:
        tables = (("registered", registry._local_mapping), ("registry", registry._global_mapping))
        return Watch(tuple(Entry(kind, "", registry, name, table.get(name, Absent)) for kind, table in tables), {})
    found = [known for known in eager] + [called for _, _, function in eager for called in reads_of_function(function).functions]
    return Watch(tuple(dict.fromkeys(Entry("global", "", file, called, value) for file, called, value in found)), {})


def _of_part(part: nn.Module, cls: type, path: str, followed: Collection[str], shapes: bool, memo: dict[type, Reads]) -> Iterator[Entry]:
    """What the forward of a class may read, as a module of it has it."""
    yield Entry("class", path, cls, "forward", getattr(cls, "forward", Absent))
    if cls not in memo:
        memo[cls] = reads_of(cls)
    reads = memo[cls]
    for name in sorted(reads.names - _MODULES_OWN - set(followed)):
        if name in vars(part):
            yield from _of_attribute(part, path, name, reads, followed)
        elif not name.startswith("__") and any(name in vars(base) for base in family_classes(cls)):
            value, _ = _of_class(cls, name)
            if not isinstance(value, _CONTAINERS) or len(value) <= _MOST_ITEMS:
                yield Entry("class", path, cls, name, _kept(value))
            if name != "forward":
                yield Entry("attribute", path, None, name, Absent)
        elif not hasattr(cls, name):
            yield from _of_nothing(part, path, name, shapes, name in reads.off.get("self", ()))
    yield from (Entry("global", path, file, name, _kept(value)) for file, name, value in reads.functions)


def _of_nothing(part: nn.Module, path: str, name: str, shapes: bool, read: bool) -> Iterator[Entry]:
    """Under a name that a forward mentions there is no weight, or nothing at all though it is read: somebody may put something there."""
    if name in part._parameters or name in part._buffers:
        kind, tensors = ("parameter", part._parameters) if name in part._parameters else ("buffer", part._buffers)
        if tensors[name] is None and shapes and not path:  # projections are asked for their biases at each call
            yield Entry(kind, path, None, name, None)
    elif read and name not in part._modules:
        yield from (Entry(kind, path, None, name, Absent) for kind in ("attribute", "parameter", "child"))


def _of_attribute(part: nn.Module, path: str, name: str, reads: Reads, followed: Collection[str]) -> Iterator[Entry]:
    value = vars(part)[name]
    if isinstance(value, _CONTAINERS):
        if len(value) <= _MOST_ITEMS:
            yield Entry("attribute", path, None, name, _kept(value))
    elif not hasattr(value, "__dict__") or callable(value) or isinstance(value, torch.Tensor):
        yield Entry("attribute", path, None, name, value)
    else:  # a configuration, or a record of the family's own
        yield Entry("attribute", path, None, name, Followed)
        yield from (Entry("config", path, name, key, kept) for key, kept in _of_config(value, reads.off.get(name, frozenset()), followed))
        if vars(value).get(EXPERTS_CHOICE) is not None and "_experts_implementation" in reads.off.get(name, ()):
            yield from _of_choice(value, path, name, reads)


def _of_config(config: Any, names: frozenset[str], followed: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What a forward reads of a configuration, under the names that it is kept by."""
    others = getattr(type(config), "attribute_map", {})
    pending, seen = sorted(names), set()
    while pending:
        name = others.get(pending[0], pending[0])
        pending = pending[1:]
        if name in seen or name in followed:
            continue
        seen.add(name)
        computed = inspect.getattr_static(type(config), name, None)
        if isinstance(computed, property) and not computed.fget.__module__.startswith("transformers.configuration_utils"):
            pending += sorted(computed.fget.__code__.co_names)
        elif name in vars(config):
            value = vars(config)[name]
            if isinstance(value, (*PLAIN, tuple)) or isinstance(value, _CONTAINERS) and len(value) <= _MOST_ITEMS:
                yield name, _kept(value)
        elif not callable(computed) and not inspect.isdatadescriptor(computed):  # read with a default, and free for somebody to set
            yield name, Absent


def _of_choice(config: Any, path: str, via: str, reads: Reads) -> Iterator[Entry]:
    """Which function computes experts: whoever sets it, and be it to what it is, has chosen; and what that function is."""
    name = vars(config)[EXPERTS_CHOICE]
    name = vars(config)[EXPERTS_CHOICE] = marked(name)
    yield Entry("choice", path, via, EXPERTS_CHOICE, name)
    for registry in (registry for registry in reads.registries if name in registry):
        for kind, table in (("registered", registry._local_mapping), ("registry", registry._global_mapping)):
            yield Entry(kind, path, registry, str(name), table.get(name, Absent))


def marked(name: str) -> str:
    """An equal string that is another object than those that code and `sys.intern` have, so that it shows if somebody sets the value again."""
    return "".join(list(name)) if name is sys.intern(name) else name
