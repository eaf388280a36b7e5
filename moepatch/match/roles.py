"""Finding out which part each argument of a forward plays, by running a scale model with stand-ins and seeing what becomes of them.

A stand-in answers what a cache and a pair of tables are asked, and writes it down. Whatever else the forward wants to know of one decides
what the module does. What is only handed on never notices that it is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import trial
from ..layers.roles import REQUIRED, Argument, Roles, former_names
from ..surgery import original_class

#: A keyword that no forward knows.
EXTRA = "moepatch_extra"
#: What a cache adds to the keywords of a call, as those of continuous batching do.
FROM_CACHE = "moepatch_from_cache"
#: What is asked of a number or a tensor.
_OPERATORS = (
    "__bool__ __call__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ __setitem__ __index__ __int__ __float__ __neg__ __invert__ "
    "__enter__ __exit__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __mod__ __pow__ __matmul__ "
    "__rmatmul__ __and__ __rand__ __or__ __ror__"
).split()
#: An index that no layer of a scale model has.
_ELSEWHERE = 9973
_PLAIN = (int, float, bool, str, type(None))


class Recording:
    """Base of caches that write down how they are updated, and add to dicts that they are given, as those of continuous batching do.

    Attributes:
        given: of each call the method, the states, and what else it got by position and by name.
    """

    def __init__(self):
        self.given: list[tuple[str, tuple, tuple, dict[str, Any]]] = []

    def note(self, method: str, states: tuple, args: tuple, kwargs: dict[str, Any]) -> None:
        """Writes down a call."""
        self.given.append((method, states, tuple(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()}))
        for value in (*args, *kwargs.values()):
            if issubclass(type(value), dict):
                value[FROM_CACHE] = "of a cache"


def _kept(value: Any) -> Any:
    """What a cache was given, as it was then."""
    return dict(value) if issubclass(type(value), dict) else value


class Looked(AttributeError):
    """The forward wants to know more of a stand-in than it can say."""


class StandIn:
    """An argument that is nothing in particular.

    Attributes:
        moepatch_name: of the argument.
        moepatch_tables: what it is taken apart into.
        moepatch_cache: answers what a cache is asked.
        moepatch_unpacked: whether it was taken apart.
        moepatch_looks: what else the forward asked.
    """

    def __init__(self, name: str, tables: tuple[Tensor, Tensor] | None = None, cache: Recording | None = None):
        self.moepatch_name, self.moepatch_tables, self.moepatch_cache = name, tables, cache
        self.moepatch_unpacked, self.moepatch_looks = False, []

    def __iter__(self) -> Iterator[Tensor]:
        if self.moepatch_tables is None:
            self.moepatch_look("__iter__")
        self.moepatch_unpacked = True
        return iter(self.moepatch_tables)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, place: Any) -> Tensor:
        if type(place) is not int or place not in (0, 1):
            self.moepatch_look("__getitem__")
        return tuple(self)[place]

    def __getattr__(self, name: str) -> Any:
        # Only what a class offers is answered, not what it happens to hold.
        if self.moepatch_cache is None or name.startswith("_") or not hasattr(type(self.moepatch_cache), name):
            self.moepatch_look(name)
        return getattr(self.moepatch_cache, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, StandIn):
                value.moepatch_look(getattr(function, "__name__", str(function)))
        raise Looked("a stand-in inside a list")

    __hash__ = object.__hash__

    def moepatch_look(self, what: str):
        """Writes down what was asked; the forward gets an error."""
        self.moepatch_looks.append(what)
        raise Looked(f"{self.moepatch_name} has no {what}")


def _asks(what: str) -> Callable[..., Any]:
    return lambda self, *args: self.moepatch_look(what)


for _operator in _OPERATORS:
    setattr(StandIn, _operator, _asks(_operator))


@dataclass
class Attempt:
    """A run of the scale model with stand-ins that went through.

    Attributes:
        tokens: the name of the argument that was given tokens.
        values: all arguments, by name.
    """

    tokens: str
    values: dict[str, Any]

    def stand_ins(self) -> list[StandIn]:
        """Those arguments that still are."""
        return [value for value in self.values.values() if isinstance(value, StandIn)]

    def caches(self) -> list[StandIn]:
        """Those that were updated."""
        return [s for s in self.stand_ins() if s.moepatch_cache is not None and s.moepatch_cache.given]

    def name_of(self, value: Any) -> str | None:
        """The argument that has this value; None for anything else."""
        return next((name for name, given in self.values.items() if given is value), None)


def named_parameters(module: nn.Module) -> list[inspect.Parameter] | str:
    """The arguments of a module's innermost forward that have a name, or why it cannot be called by name."""
    parameters = list(inspect.signature(trial.eager_forward(module)).parameters.values())[1:]
    unnamed = {inspect.Parameter.VAR_POSITIONAL: "any number of arguments by position", inspect.Parameter.POSITIONAL_ONLY: "arguments by position only"}
    for kind, words in unnamed.items():
        if any(p.kind is kind for p in parameters):
            return f"its forward takes {words}"
    return [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]


def base_roles(module: nn.Module, tokens: str) -> Roles | str:
    """What the signature alone says, or why that cannot be kept."""
    parameters = named_parameters(module)
    if isinstance(parameters, str):
        return parameters
    odd = next((p.name for p in parameters if p.default is not REQUIRED and type(p.default) not in _PLAIN), None)
    if odd is not None:
        return f"the default of the argument `{odd}` is not a plain value"
    names = tuple(p.name for p in parameters)
    cls = original_class(module)
    return Roles(
        names=names,
        defaults=tuple(p.default for p in parameters),
        positional=sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters),
        tokens=tokens,
        open=takes_others(module),
        former=tuple(name for name in dict.fromkeys(former_names(cls.forward)) if name not in names),
    )


def takes_others(module: nn.Module) -> bool:
    """Whether a module's innermost forward takes keywords that it has no names for."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(trial.eager_forward(module)).parameters.values())


def attempt(
    module: nn.Module, tokens: Callable[[], Tensor], stand_in: Callable[[str], StandIn], tensors: Sequence[Callable[[], Any]], run: Callable[[dict], Any]
) -> Attempt | str:
    """Calls `run` with a stand-in for each argument but the tokens, until it goes through, or says what is in the way.

    Args:
        module: whose forward `run` calls.
        tokens: makes hidden states.
        stand_in: makes a stand-in by name.
        tensors: makers of what is tried for an argument that the forward computes with.
        run: calls the forward with keywords.
    """
    parameters = named_parameters(module)
    if isinstance(parameters, str):
        return parameters
    names, stuck = [p.name for p in parameters], {}
    for first in names:
        found = _settled({name: tokens() if name == first else stand_in(name) for name in names}, first, tensors, run)
        if isinstance(found, Attempt):
            return found
        stuck[first] = found
    if not stuck:
        return "its forward takes no arguments by name"
    # Where the forward looks into another argument than the first, and not into the first if that one has tokens, that one has the tokens.
    other = stuck[names[0]].argument
    return stuck[other if other is not None and stuck[other].argument not in (None, names[0]) else names[0]].reason


class _Stuck(NamedTuple):
    """Why a run did not go through, and the argument that was in the way, if one was."""

    reason: str
    argument: str | None = None


def _settled(values: dict[str, Any], tokens: str, tensors: Sequence[Callable[[], Any]], run: Callable[[dict], Any]) -> Attempt | _Stuck:
    values, error = _fresh(values), None
    try:
        with torch.no_grad():
            run(values)
    except Exception as caught:  # a family's code may fail in any way on what is not its own
        error = caught
    looked = next((v for v in values.values() if isinstance(v, StandIn) and v.moepatch_looks), None)
    if looked is None:
        if error is None:
            return Attempt(tokens, values)
        return _Stuck(f"a scale model of it cannot be run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
    for made in tensors:
        found = _settled({**values, looked.moepatch_name: made()}, tokens, tensors, run)
        if isinstance(found, Attempt):
            return found
    return _Stuck(f"the argument `{looked.moepatch_name}` decides what the module does", looked.moepatch_name)


def _fresh(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with stand-ins that were asked nothing yet."""
    return {
        name: StandIn(name, v.moepatch_tables, v.moepatch_cache and type(v.moepatch_cache)()) if isinstance(v, StandIn) else v for name, v in values.items()
    }


def updates_of(model: nn.Module, found: Attempt, run: Callable[[dict], Any], extra: StandIn | None) -> tuple[tuple[str, tuple[Argument, ...]], ...] | str:
    """The methods of the cache that a scale model calls, with what it gives them besides states, or what of it comes from nowhere.

    Args:
        model: it is run again with other attributes.
        found: how it was run.
        run: as for `attempt`.
        extra: what `run` gives it under the name `EXTRA`, if it does.
    """
    updates = []
    for cache in found.caches():
        calls = cache.moepatch_cache.given
        if len({method for method, *_ in calls}) < len(calls):
            return f"it updates the cache `{cache.moepatch_name}` {len(calls)} times"
        for call, (method, _, args, kwargs) in enumerate(calls):
            arguments = []
            for place, (name, value) in enumerate([*(("", value) for value in args), *kwargs.items()]):
                argument = _source(found, name, value, extra)
                if type(value) is int:
                    argument = _followed(model, found, run, (cache.moepatch_name, call, place), Argument(name, "constant", value))
                if argument is None:
                    return f"the cache gets {f'`{name}`' if name else f'argument {place + 2}'}, which comes from nowhere that is known"
                arguments.append(argument)
            updates.append((method, tuple(arguments)))
    return tuple(updates)


def _source(found: Attempt, name: str, value: Any, extra: StandIn | None) -> Argument | None:
    """Where something that the cache was given comes from; None if that is not known."""
    if isinstance(value, StandIn):
        return Argument(name, "argument", value.moepatch_name)
    if isinstance(value, dict):
        return Argument(name, "extra", None) if value.keys() == {EXTRA} and value[EXTRA] is extra else None
    if isinstance(value, Tensor):
        pairs = [s.moepatch_tables for s in found.stand_ins() if s.moepatch_unpacked]
        return next((Argument(name, "table", place) for pair in pairs for place, table in enumerate(pair) if table is value), None)
    return Argument(name, "constant", value) if type(value) in _PLAIN else None


def _followed(model: nn.Module, found: Attempt, run: Callable[[dict], Any], where: tuple[str, int, int], constant: Argument) -> Argument:
    """The attribute that a number follows that the cache is given, or the number."""
    cache, call, place = where
    for attribute in [key for key, v in vars(model).items() if type(v) is int and v == constant.value]:
        again = _fresh(found.values)
        setattr(model, attribute, _ELSEWHERE)
        try:
            with torch.no_grad():
                run(again)
            _, _, args, kwargs = again[cache].moepatch_cache.given[call]
            follows = [*args, *kwargs.values()][place] == _ELSEWHERE
        except Exception:  # it is not only the cache that needs this number
            follows = False
        finally:
            setattr(model, attribute, constant.value)
        if follows:
            return Argument(constant.name, "attribute", attribute)
    return constant
