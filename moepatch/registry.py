"""Two ordered tables that others may add to: matchers, which recognise modules, and backends, which compute.

Third parties register by decorator, or through the entry points ``moepatch.matchers`` and ``moepatch.backends``, each of which names a
module whose import registers. Nothing optional is imported before it is used: a backend's factory holds its imports.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import BackendUnavailable, MoePatchError

_MATCHERS: dict[str, Matcher] = {}
_BACKENDS: dict[tuple[str, str], Backend] = {}
_LOADED: dict[tuple[str, str], Callable[..., Any]] = {}


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


def register_matcher(name: str, *, priority: int = 100, around: bool = False) -> Callable:
    """Adds a matcher; the decorator returns the function.

    >>> @register_matcher("example", priority=1)
    ... def match_nothing(found, scan, memo):
    ...     return None
    >>> unregister("example")

    Raises:
        MoePatchError: the name is taken.
    """

    def decorate(match):
        if name in _MATCHERS:
            raise MoePatchError(f"There is a matcher named {name!r} already, {_MATCHERS[name].match}. Choose another name.")
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
        table: the kind it serves, ``experts`` or ``parallel_linear``. An ``experts`` factory returns a function with the arguments
            and the result of `moepatch.experts.reference.reference_experts`.
        name: how users call it.
        rank: `reference` has 0, `torch` 50.
        serves: one line for people.
        why_not: see `Backend`; None means always available.
        exact, rounded: see `Backend`.

    Raises:
        MoePatchError: the name is taken in this table.
    """

    def decorate(factory):
        if (table, name) in _BACKENDS:
            raise MoePatchError(f"There is a backend named {name!r} for {table!r} already. Choose another name.")
        _BACKENDS[table, name] = Backend(table, name, rank, serves, why_not or (lambda spec, dtype, device: None), factory, exact, rounded)
        return factory

    return decorate


def unregister(name: str, table: str | None = None) -> None:
    """Removes a matcher, or a backend of `table`. For tests and notebooks."""
    if table is None:
        del _MATCHERS[name]
    else:
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
        _LOADED[table, name] = backend(table, name).load()
    return _LOADED[table, name]


@functools.cache
def _load_entry_points() -> None:
    for group in ("moepatch.matchers", "moepatch.backends"):
        for entry in importlib.metadata.entry_points(group=group):
            entry.load()
