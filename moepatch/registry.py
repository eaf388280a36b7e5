"""Three tables that others may add to: kinds of modules, matchers, which recognise them, and backends, which compute.

Third parties register by call or decorator, or through the entry points ``moepatch.matchers`` and ``moepatch.backends``, each of which names
a module whose import registers. Nothing optional is imported before it is used: a backend's factory holds its imports.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import BackendUnavailable, MoePatchError
from .site import Left, Refusal, Site
from .surgery import Patched

if TYPE_CHECKING:
    from .kind import Kind
    from .scan import Found, Scan

#: Every kind by name, moepatch's own (see `kinds`) first.
KINDS: dict[str, Kind] = {}
#: What `optimize` and `plan` take besides a backend by table: no table can be called so.
RESERVED = frozenset({"model", "mesh", "plan", "verify", "strict", "fsdp", "dispatch", "optimizer", "dense", "numerics", "measure", "compile"})
_MATCHERS: dict[str, Matcher] = {}
_BACKENDS: dict[tuple[str, str], Backend] = {}
_LOADED: dict[tuple[str, str], Callable[..., Any]] = {}
_ENTRIES = threading.RLock()
_entries_are_loaded = False


@dataclass(frozen=True)
class Matcher:
    """Recognises modules of one kind.

    Attributes:
        name: unique.
        priority: matchers are asked from the highest to the lowest; the first that answers wins.
        match: ``(found, scan, memo) -> Site | Refusal | Left | None``; pure. `memo` is a dict that lives as long as one scan.
        around: it is asked about modules that hold sites of others too, and a site of its own takes nothing but the module itself.
    """

    name: str
    priority: int
    match: Callable[..., Any]
    around: bool = False


@dataclass(frozen=True)
class Backend:
    """A way to compute one kind of module.

    Attributes:
        table: which kind it serves: ``experts``, ``parallel_linear``.
        name: unique in its table.
        rank: among those that are available the highest is chosen. One below 0 is never chosen, only asked for by name.
        serves: one line for people.
        why_not: ``(spec, dtype, device) -> None`` if it serves there, else the reason; spec is None to ask about the machine alone.
        exact: ``(spec) -> bool``: whether it rounds where the module does. One that does not is chosen with ``numerics="relaxed"`` only.
        rounded: for backends of a lower precision than the module's dtype: makes a copy of the family's module round as such a precision
            must, and returns it. Verification compares with that copy. None: with the family's module as it is.
        load: the lazy factory; returns the compute function. Call `compute` instead, which calls it once.
    """

    table: str
    name: str
    rank: int
    serves: str
    why_not: Callable[[Any, torch.dtype, torch.device], str | None]
    load: Callable[[], Callable[..., Any]]
    exact: Callable[[Any], bool] = lambda spec: True
    rounded: Callable[[nn.Module], nn.Module] | None = None


def register_kind(kind: Kind) -> Kind:
    """Adds a kind of module, which sites of a matcher may then have; returns it.

    Raises:
        MoePatchError: it is no `Kind`, its name is taken, or its table cannot be an option of `optimize`.
    """
    from .kind import Kind

    if not isinstance(kind, Kind):
        raise MoePatchError(f"register_kind() takes a moepatch.Kind; this is a {type(kind).__name__}.")
    for field in ("name", "pattern", "backends"):
        if not isinstance(getattr(kind, field), str) or not getattr(kind, field):
            raise MoePatchError(f"The kind {kind.name!r}: its {field} is {getattr(kind, field)!r}; it has to be a text.")
    if kind.name in KINDS:
        raise MoePatchError(f"There is a kind named {kind.name!r} already. Choose another name.")
    if not kind.backends.isidentifier() or kind.backends in RESERVED:
        unwritable = "users write it as optimize(model, <table>=…), so it has to be a name of Python"
        why = "optimize() has an argument of that name" if kind.backends in RESERVED else unwritable
        raise MoePatchError(f"The kind {kind.name!r}: its table of backends cannot be called {kind.backends!r}: {why}.")
    for field in fields(kind):
        if field.name not in ("name", "pattern", "backends") and not isinstance(field.default, int) and not callable(getattr(kind, field.name) or len):
            raise MoePatchError(f"The kind {kind.name!r}: its {field.name} is {getattr(kind, field.name)!r}; it has to be a function or None.")
    KINDS[kind.name] = kind
    return kind


def register_matcher(name: str, *, priority: int = 100, around: bool = False) -> Callable:
    """Adds a matcher; the decorator returns the function.

    >>> @register_matcher("example", priority=1)
    ... def match_nothing(found, scan, memo):
    ...     return None
    >>> unregister("example")

    Raises:
        MoePatchError: the name is taken, or what is decorated does not take ``(found, scan, memo)``.
    """
    _check_names(f"The matcher {name!r}", name, priority)

    def decorate(match):
        if name in _MATCHERS:
            raise MoePatchError(f"There is a matcher named {name!r} already, {_MATCHERS[name].match}. Choose another name.")
        if not _takes(match, 3):
            raise MoePatchError(f"The matcher {name!r}: {match!r} cannot be called as match(found, scan, memo).")
        _MATCHERS[name] = Matcher(name, priority, match, around)
        return match

    return decorate


def register_backend(
    table: str,
    name: str,
    *,
    rank: int,
    serves: str = "",
    why_not: Callable[..., str | None] | None = None,
    exact: Callable[[Any], bool] = lambda spec: True,
    rounded: Callable[[nn.Module], nn.Module] | None = None,
) -> Callable:
    """Adds a backend; decorates its factory, which is called at first use, and returns it.

    Args:
        table: that of the kind it serves (`Kind.backends`). An ``experts`` factory returns a function with the arguments and the result of
            `moepatch.experts.reference.reference_experts`.
        name: how users call it.
        rank: `reference` has 0, `torch` 50.
        serves: one line for people.
        why_not: see `Backend`; None means always available.
        exact, rounded: see `Backend`.

    Raises:
        MoePatchError: the name is taken in this table, or one of the functions cannot be called as it will be.
    """
    what = f"The backend {name!r} for {table!r}"
    _check_names(what, name, rank)
    for label, function, count, call in (("why_not", why_not, 3, "(spec, dtype, device)"), ("exact", exact, 1, "(spec)"), ("rounded", rounded, 1, "(module)")):
        if function is not None and not _takes(function, count):
            raise MoePatchError(f"{what}: {function!r} cannot be called as {label}{call}.")

    def decorate(factory):
        if not _takes(factory, 0):
            raise MoePatchError(f"{what}: {factory!r} is not a factory, which is called without arguments and returns the function that computes.")
        if (table, name) in _BACKENDS:
            raise MoePatchError(f"There is a backend named {name!r} for {table!r} already. Choose another name.")
        _BACKENDS[table, name] = Backend(table, name, rank, serves, why_not or (lambda spec, dtype, device: None), factory, exact, rounded)
        return factory

    return decorate


def _check_names(what: str, name: Any, order: Any) -> None:
    if not isinstance(name, str) or not name:
        raise MoePatchError(f"{what}: its name is {name!r}; it has to be a text.")
    if isinstance(order, bool) or not isinstance(order, (int, float)):
        raise MoePatchError(f"{what}: its rank or priority is {order!r}; it has to be a number.")


def _takes(function: Any, count: int) -> bool:
    """Whether something can be called with so many positional arguments, as far as it says what it takes."""
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:  # built in: it does not say
        return True
    except TypeError:
        return False
    return True


def unregister(name: str, table: str | None = None) -> None:
    """Removes a matcher or a kind, or a backend of `table`. For tests and notebooks."""
    if table is None:
        found = _MATCHERS.pop(name, None), KINDS.pop(name, None)
        if found == (None, None):
            raise MoePatchError(f"There is no matcher and no kind named {name!r}.")
    else:
        backend(table, name)
        del _BACKENDS[table, name]
        _LOADED.pop((table, name), None)


def matchers() -> list[Matcher]:
    """All matchers, the first to ask first."""
    _load_entry_points()
    return sorted(_MATCHERS.values(), key=lambda m: (-m.priority, m.name))


def backends(table: str) -> list[Backend]:
    """All backends of a table, the preferred first."""
    _load_entry_points()
    return sorted((b for b in _BACKENDS.values() if b.table == table), key=lambda b: (-b.rank, b.name))


def tables() -> list[str]:
    """The tables that have backends."""
    _load_entry_points()
    return sorted({table for table, _ in _BACKENDS})


def backend(table: str, name: str) -> Backend:
    """One backend by name.

    Raises:
        BackendUnavailable: there is none of that name; the message lists those that exist.
    """
    if (table, name) not in _BACKENDS:
        _load_entry_points()
    if (table, name) not in _BACKENDS:
        known = ", ".join(b.name for b in backends(table)) or "none"
        raise BackendUnavailable(f"No backend named {name!r} for {table!r}. There are: {known}.")
    return _BACKENDS[table, name]


#: Tables whose plain torch form torch.compile fuses by itself, where it could not follow every library's kernels.
FUSED_BY_COMPILE = ("norm", "residual", "mlp", "attention_block", "latent")


def compute(table: str, name: str) -> Callable[..., Any]:
    """The compute function of a backend, loaded at first use; while torch.compile traces, plain torch for the tables of `FUSED_BY_COMPILE`.

    Raises:
        BackendUnavailable: as `backend`.
    """
    if torch.compiler.is_compiling() and table in FUSED_BY_COMPILE:
        name = "reference"
    if (table, name) not in _LOADED:
        _LOADED[table, name] = _load(backend(table, name))
    return _LOADED[table, name]


def _load(found: Backend) -> Callable[..., Any]:
    what = f"The backend {found.name!r} for {found.table!r} could not be loaded"
    try:
        made = found.load()
    except MoePatchError:
        raise
    except Exception as error:  # a factory imports a library, which may fail in any way
        raise BackendUnavailable(f"{what}: {type(error).__name__}: {error}. Choose another one: optimize(model, {found.table}=…).") from error
    if made is None:
        raise BackendUnavailable(f"{what}: its factory returned None in the place of what computes.")
    return made


def reason_against(candidate: Backend, spec: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """`Backend.why_not`, in words also where that fails itself: it may be somebody else's, or be asked about a spec of somebody else's."""
    try:
        reason = candidate.why_not(spec, dtype, device)
    except Exception as error:
        return f"its why_not failed ({type(error).__name__}: {error})"
    return reason if reason is None or isinstance(reason, str) else f"its why_not answered {reason!r}, which is neither a reason nor None"


def asked(matcher: Matcher, found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """What a matcher answers about a module.

    Raises:
        MoePatchError: it fails, or answers what nobody can use; the message names it, the module and what to do.
    """
    where = f"The matcher {matcher.name!r} ({matcher.match.__module__}), asked about {found.fqn or 'the model'!r} ({type(found.module).__name__}),"
    hint = f"Tell whoever registered it; until then moepatch.registry.unregister({matcher.name!r}) does without it."
    try:
        answer = matcher.match(found, scan, memo)
    except Exception as error:
        raise MoePatchError(f"{where} failed: {type(error).__name__}: {error}. {hint}") from error
    wrong = _what_is_wrong(answer, found)
    if wrong is not None:
        raise MoePatchError(f"{where} {wrong}. {hint}")
    return answer


def _what_is_wrong(answer: Any, found: Found) -> str | None:
    if not isinstance(answer, Site | Refusal | Left | None):
        return f"answered {answer!r}; it can answer a Site, a Refusal, a Left or None"
    if answer is None:
        return None
    if tuple(answer.fqns) != tuple(found.fqns):
        return f"answered about {', '.join(map(repr, answer.fqns))}; fqns has to be found.fqns"
    if isinstance(answer, Refusal):
        return None
    if answer.kind not in KINDS:
        known = ", ".join(KINDS)
        first = f"call moepatch.register_kind(moepatch.Kind(name={answer.kind!r}, …)) first"
        return f"answered with the kind {answer.kind!r}, which nobody has registered: {first}. There are: {known}"
    return _what_is_wrong_with(answer, found.module) if isinstance(answer, Site) else None


def _what_is_wrong_with(site: Site, module: nn.Module) -> str | None:
    """What keeps a site from being planned and patched; asked of every site, because later there is nobody to name."""
    kind, spec = KINDS[site.kind], site.spec
    try:
        hash(spec)
        said, facts = spec.describe(), spec.to_dict()
        injections = kind.injections(spec, "", None)
    except Exception as error:
        return f"answered with a spec ({type(spec).__name__}) that the kind {site.kind!r} cannot use: {type(error).__name__}: {error}"
    if not isinstance(said, str) or not isinstance(facts, dict):
        return f"answered with a spec ({type(spec).__name__}) whose describe() is not a text or whose to_dict() is not a dict"
    if not isinstance(getattr(torch, str(site.dtype), None), torch.dtype):
        return f"answered with the dtype {site.dtype!r}; it has to be the name of a dtype of torch, such as 'bfloat16'"
    if not isinstance(injections, Mapping):
        return f"answered with the kind {site.kind!r}, whose injections are a {type(injections).__name__} and not a dict from names to (mixin, state)"
    for name, injection in injections.items():
        inner = module
        for part in name.split(".") if name else ():
            inner = inner._modules.get(part) if inner is not None else None
        if inner is None:
            return f"answered with the kind {site.kind!r}, which patches {name!r} inside it, and there is no such module"
        if not (isinstance(injection, tuple) and len(injection) == 2 and isinstance(injection[0], type) and issubclass(injection[0], Patched)):
            return f"answered with the kind {site.kind!r}, which injects {injection!r} in the place of a (subclass of moepatch.Patched, state)"
    return None


def _load_entry_points() -> None:
    """Imports what other packages name, once. A package that fails is warned of, and what it had registered until then is taken back."""
    global _entries_are_loaded
    with _ENTRIES:
        if _entries_are_loaded:
            return
        _entries_are_loaded = True  # what is imported may ask for matchers itself
        for group in ("moepatch.matchers", "moepatch.backends"):
            for entry in importlib.metadata.entry_points(group=group):
                _load_entry(entry)


def _load_entry(entry: importlib.metadata.EntryPoint) -> None:
    tables_before = [(table, dict(table)) for table in (KINDS, _MATCHERS, _BACKENDS)]
    try:
        entry.load()
    except Exception as error:  # somebody else's code, which may fail in any way
        for table, before in tables_before:
            for key in table.keys() - before.keys():
                del table[key]
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "of unknown name"
        warnings.warn(
            f"moepatch goes on without the package {package}: its entry point {entry.group}: {entry.name} = {entry.value} cannot be imported "
            f"({type(error).__name__}: {error}). Update it or uninstall it.",
            stacklevel=2,
        )
