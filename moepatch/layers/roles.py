"""Which part each argument of a family's forward plays, whatever it is called, and one call's arguments by their parts.

The matchers find the parts by what a scale model does with each argument (see `moepatch.match.roles`); nothing here knows a name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from ..surgery import Patched, original_class

#: The default of an argument that has to be given.
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """An argument that the family gives to the attention function or to the cache.

    Attributes:
        name: of the argument; empty for a positional one.
        source: ``constant``, ``attribute`` or ``config`` (of the module); ``training attribute``, ``training config`` (else 0.0);
            ``argument`` (of the forward), ``table`` (one of the two of the rotary embedding) or ``extra`` (the dict of the forward's other keywords).
        value: the constant, the name of the attribute or argument, or the place of the table.
    """

    name: str
    source: str
    value: Any

    def of(self, module: nn.Module, given: Given | None = None) -> Any:
        """Its value now, in a call with what was `given`."""
        if self.source == "constant":
            return self.value
        if self.source == "argument":
            return given.named.get(self.value, given.roles.default(self.value))
        if self.source == "table":
            return None if given.tables is None else given.tables[self.value]
        if self.source == "extra":
            return given.extra
        if self.source.startswith("training") and not module.training:
            return 0.0
        return getattr(module.config if self.source.endswith("config") else module, self.value)


class Given(NamedTuple):
    """The arguments of one call.

    Attributes:
        roles: that sorted them.
        tokens, tables, mask, cache: by their parts; None for what the forward does not know.
        named: the arguments of the forward that were given, by its names.
        handed: keywords of the attention function.
        extra: the other keywords, one dict of this call: caches may change it.
    """

    roles: Roles
    tokens: Any
    tables: Any
    mask: Any
    cache: Any
    named: dict[str, Any]
    handed: dict[str, Any]
    extra: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The arguments of a forward.

    Attributes:
        names, defaults: of all that have a name; `REQUIRED` for those without a default.
        positional: how many of them may be given by position.
        tokens: the hidden states.
        tables, mask, cache: the tables of the rotary embedding, what hides keys or tokens, and the cache; None without one.
        handed: the arguments that are given on to the attention function, each with the keyword that it becomes.
        extra: whether keywords that have no name in the forward are given on to it, too.
        open: whether there may be such keywords.
        updates: the methods of the cache that are called, in order, and what each is given after the states that it keeps.
        former: names that the decorators around the forward translate.
    """

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    positional: int
    tokens: str
    tables: str | None = None
    mask: str | None = None
    cache: str | None = None
    handed: tuple[tuple[str, str], ...] = ()
    extra: bool = False
    open: bool = True
    updates: tuple[tuple[str, tuple[Argument, ...]], ...] = ()
    former: tuple[str, ...] = ()

    def default(self, name: str | None) -> Any:
        """What an argument is if it is not given; None for a part that the forward does not know."""
        return None if name is None else self.defaults[self.names.index(name)]

    def absent(self) -> dict[str, None]:
        """None for all arguments but the tokens that have to be given."""
        return {name: None for name, default in zip(self.names, self.defaults, strict=True) if default is REQUIRED and name != self.tokens}

    def sort(self, args: tuple, kwargs: dict[str, Any]) -> Given | None:
        """A call's arguments by their parts; None for a call that the forward cannot be called with."""
        named = dict(zip(self.names, args))
        if len(args) > self.positional or any(name in kwargs for name in named):
            return None
        extra = {}
        for name, value in kwargs.items():
            (named if name in self.names else extra)[name] = value
        if (extra and not self.open) or any(default is REQUIRED and name not in named for name, default in zip(self.names, self.defaults, strict=True)):
            return None
        tokens, tables, mask, cache = (named.get(name, self.default(name)) for name in (self.tokens, self.tables, self.mask, self.cache))
        handed = {keyword: named.get(name, self.default(name)) for name, keyword in self.handed}
        return Given(self, tokens, tables, mask, cache, named, handed, extra)

    def updated(self, module: nn.Module, given: Given, *states: Any, place: int = 0) -> Any:
        """What the cache makes of states; its method is called as the family calls it."""
        method, arguments = self.updates[place]
        args = [argument.of(module, given) for argument in arguments if not argument.name]
        return getattr(given.cache, method)(*states, *args, **{argument.name: argument.of(module, given) for argument in arguments if argument.name})

    def layer(self, module: nn.Module, given: Given) -> Any:
        """Under which index the cache knows the module: transformers' caches take it after the states. None if they are not told."""
        arguments = self.updates[0][1] if self.updates else ()
        first = next((argument for argument in arguments if argument.name in ("", "layer_idx")), None)
        return None if first is None else first.of(module, given)


def followed(spec: Any) -> frozenset[str]:
    """Attributes and config values that are read at each call for an argument of the attention function or of the cache."""
    arguments = (*vars(spec).get("arguments", ()), *(argument for _, arguments in spec.roles.updates for argument in arguments))
    return frozenset(argument.value for argument in arguments if argument.source.endswith(("attribute", "config")))


class ByRole(Patched):
    """Base of mixins whose `_moepatch.spec.roles` say what each argument of the forward is."""

    def forward(self, *args, **kwargs):
        """Takes what the family's forward takes, under its former names too, and computes from that by role."""
        if any(name in kwargs for name in self._moepatch.spec.roles.former):
            # The family's own decorators translate such names, warn of them and say which of two counts.
            return decorated(original_class(self).forward, _forward)(self, *args, **kwargs)
        return _forward(self, *args, **kwargs)

    def as_the_family(self, given: Given) -> Any:
        """What the family's own forward returns."""
        return super().forward(**given.named, **given.extra)

    def computed(self, given: Given) -> Any:
        """What the forward returns."""
        raise NotImplementedError


def _forward(self: ByRole, *args, **kwargs):
    given = self._moepatch.spec.roles.sort(args, kwargs)
    # The family's own forward says best what is wrong with a call.
    return super(ByRole, self).forward(*args, **kwargs) if given is None else self.computed(given)


_forward.__name__ = "forward"  # decorators name it in their warnings


@functools.cache
def decorated(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner` with the decorators that stand around the innermost function of `outer`."""
    if not hasattr(outer, "__wrapped__"):
        return inner
    below = decorated(outer.__wrapped__, inner)
    cells = tuple(CellType(below) if value is outer.__wrapped__ else cell for cell, value in zip(outer.__closure__ or (), _closure(outer), strict=True))
    around = FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, cells)
    around.__kwdefaults__ = outer.__kwdefaults__
    return around


def former_names(outer: Callable[..., Any]) -> Iterator[str]:
    """Names that the decorators around a function speak of."""
    while hasattr(outer, "__wrapped__"):
        yield from (value for value in _closure(outer) if type(value) is str and value.isidentifier())
        outer = outer.__wrapped__


def _closure(function: Callable[..., Any]) -> list[Any]:
    """What a function sees of those around it; None for what is not there yet."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            values.append(None)
    return values
