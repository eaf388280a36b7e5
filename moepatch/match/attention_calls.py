"""Scale models of attention modules that write down how they call the attention function and the cache.

The attention function that writes is registered with transformers under a name of moepatch's own; a scale model gets a copy of its config
that asks for it.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .. import trial
from ..kind import Kind
from ..layers.attention_block import attention_functions
from ..layers.roles import REQUIRED, Roles
from ..replica import random_fill, replica
from ..surgery import original_class
from ..trial import Call
from .attention_witness import attention_objection
from .layer_index import is_handed_on
from .roles import EXTRA, Recording, StandIn, attempt, base_roles, takes_others, updates_of
from .witness import Objection

_RECORDER = "moepatch_recorder"
#: The arguments that every attention function has, in order.
_FIRST = ("module", "query", "key", "value", "attention_mask")
#: Makes a limit that clamps projections show.
_LOUD = 100.0
_BATCH, _SEQUENCE = 2, 6
#: How many calls have all arguments; records of the others say which one is left out.
_ALWAYS, _WITHOUT = 3, "moepatch_without"


@functools.cache
def _register_recorder() -> None:
    AttentionInterface.register(_RECORDER, _record)


def _record(*args, **kwargs):
    """The family's eager attention without dropout; what it is given is kept on the module."""
    given = {**dict(zip(_FIRST, args)), **{f"argument {place}": value for place, value in enumerate(args[len(_FIRST) :], len(_FIRST))}, **kwargs}
    module = given.pop("module")
    module._moepatch_given.append(dict(given))
    query, key, value, mask = (given.pop(name) for name in _FIRST[1:])
    if isinstance(mask, StandIn) or module._moepatch_attempt:
        batch, heads, sequence, _ = query.shape
        return query.new_zeros(batch, sequence, heads, value.shape[-1]), None
    _, eager = attention_functions(original_class(module))
    known = {name: value for name, value in given.items() if not isinstance(value, StandIn)}
    return eager(module, query, key, value, mask, **{**known, "dropout": 0.0})


class RecordingCache(Recording):
    """Writes down how it is updated, and doubles what it is given."""

    def update(self, key, value, *args, **kwargs):
        self.note("update", (), args, kwargs)
        return torch.cat([key, key], 2), torch.cat([value, value], 2)


@dataclass
class Subject:
    """A scale model in the family's own code, and what it did.

    Attributes:
        module: the scale model.
        kind: how its twins are patched.
        roles: what its arguments are.
        call: an ordinary call, of a module in training.
        results: outputs and gradients of that call.
        given: what its attention function was given: in that call, in a loud one, in evaluation with a cache, and with each argument left out
            or None; None where that fails.
    """

    module: nn.Module
    kind: Kind
    roles: Roles
    call: Call
    results: dict[str, Tensor]
    given: list[Any]

    @classmethod
    def made(cls, module: nn.Module, sizes: Mapping[int, int], hidden: int, table: int, complex_tables: bool, kind: Kind) -> Subject | str:
        """Or why the family's code cannot be run at these sizes with tables of `table` columns, or what it is given has no known part."""
        _register_recorder()
        generator = torch.Generator().manual_seed(0)
        model = replica(module, sizes, random_fill(generator))
        for name in [name for name, value in vars(model).items() if type(value) is float and "dropout" in name]:
            setattr(model, name, 0.25)
        model.config = copy.copy(module.config)
        model.config._attn_implementation_internal = _RECORDER
        if "attention_dropout" in vars(model.config):
            model.config.attention_dropout = 0.125
        inputs = _Inputs(hidden, table, complex_tables, generator)
        roles = roles_of(model, inputs)
        if isinstance(roles, str):
            return roles
        call = inputs.call(roles)
        try:
            return cls(model, kind, roles, call, *_run(model, roles, call, trial.eager_forward(model)))
        except Exception as error:  # a family's code may fail in any way on tables that are not its own
            return f"a scale model of it cannot be run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"

    def misses(self, spec: Any) -> list[str]:
        """What is not the same of a patched twin: arguments of the attention function by name, or the result; or what a second witness
        has found (an `Objection`). Empty if it does the same."""
        twin = self.twin(spec)
        try:
            results, given = _run(twin, self.roles, self.call, None)
        except Exception as error:  # a reading may be wrong in any way
            return [type(error).__name__, *self.given[0]]
        missed = [_unlike(theirs, ours) for theirs, ours in zip(self.given, given, strict=True)]
        for theirs, names in zip(self.given[_ALWAYS:], missed[_ALWAYS:], strict=True):
            if theirs is not None and theirs[_WITHOUT] != self.roles.tables and bool(names) != any(missed[:_ALWAYS]):
                return [f"the argument `{theirs[_WITHOUT]}`"]
        missed = list(dict.fromkeys(sum(missed, [])))
        if missed:
            return missed
        odd = [f"its {d.what}" for d in trial.differences(self.results, results) if not d.ok]
        if odd:
            return [self._drawn() or odd[0]]
        objection = attention_objection(self.module, twin, spec, self.call, _SEQUENCE)
        return [] if objection is None else [objection]

    def _drawn(self) -> Objection | None:
        """That the results are not the same twice, if they are not, and what makes them so."""
        if not self._draws():
            return None
        for name, probability in [(name, value) for name, value in vars(self.module).items() if type(value) is float and "dropout" in name]:
            setattr(self.module, name, 0.0)
            alone = not self._draws()
            setattr(self.module, name, probability)
            if alone:
                return Objection(f"its result goes through a dropout of its own (`{name}`)")
        return Objection("it draws random numbers")

    def _draws(self) -> bool:
        first, second = (_run(self.module, self.roles, self.call, trial.eager_forward(self.module))[0] for _ in range(2))
        return not all(d.ok for d in trial.differences(first, second))

    def hands_on_index(self) -> bool:
        """See `layer_index`."""
        with torch.no_grad(), trial.torch_formulas(self.module, trial.eager_forward(self.module)) as forward:

            def run() -> None:
                for training, cached in itertools.product((True, False), (True, False)):
                    kwargs = dict(self.call.kwargs)
                    if cached and self.roles.cache is not None:
                        kwargs[self.roles.cache] = RecordingCache()
                        if self.roles.mask is not None:
                            kwargs[self.roles.mask] = kwargs[self.roles.mask].repeat(1, 1, 1, 2)
                    forward(self.module.train(training), **kwargs)

            return is_handed_on(self.module, run)

    def twin(self, spec: Any) -> nn.Module:
        """A patched copy, of the same size and with the same weights."""
        copied = replica(self.module, {}, lambda tensor, shape: tensor.detach().clone())
        return trial.inject(copied, self.kind.injections(spec, "reference", None))


@dataclass
class _Inputs:
    """What a module of `hidden` wide tokens is called with; the numbers have nothing to do with each other, so that it shows which are read."""

    hidden: int
    table: int
    complex_tables: bool
    generator: torch.Generator

    def _made(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def tokens(self) -> Tensor:
        return self._made(_BATCH, _SEQUENCE, self.hidden)

    def mask(self) -> Tensor:
        return self._made(_BATCH, 1, _SEQUENCE, _SEQUENCE)

    def tables(self) -> Any:
        pair = self._made(_BATCH, _SEQUENCE, self.table), self._made(_BATCH, _SEQUENCE, self.table)
        return torch.complex(*(t[..., ::2].contiguous() for t in pair)) if self.complex_tables else pair

    def stand_in(self, name: str) -> StandIn:
        return StandIn(name, None if self.complex_tables else self.tables(), RecordingCache())

    def call(self, roles: Roles) -> Call:
        kwargs: dict[str, Any] = {name: None if name == roles.cache else StandIn(name) for name in roles.names}
        kwargs[roles.tokens] = self.tokens()
        if roles.mask is not None:
            kwargs[roles.mask] = self.mask()
        if roles.tables is not None:
            kwargs[roles.tables] = self.tables()
        if roles.open:
            kwargs |= {"position_ids": torch.arange(_SEQUENCE)[None], EXTRA: StandIn(EXTRA)}
        return Call(kwargs=kwargs)


def roles_of(model: nn.Module, inputs: _Inputs) -> Roles | str:
    """The parts of the arguments of a scale model that calls the recorder, or why one has none."""
    extra = StandIn(EXTRA)

    def run(values: dict[str, Any]) -> None:
        model._moepatch_given, model._moepatch_attempt = [], True
        try:
            with trial.torch_formulas(model, trial.eager_forward(model)) as forward:
                forward(model.eval(), **values, **({EXTRA: extra} if takes_others(model) else {}))
        finally:
            model._moepatch_attempt = False

    # A tensor is a mask, or a complex table.
    found = attempt(model, inputs.tokens, inputs.stand_in, [inputs.mask, *([inputs.tables] if inputs.complex_tables else [])], run)
    if isinstance(found, str):
        return found
    roles = base_roles(model, found.tokens)
    if isinstance(roles, str):
        return roles
    if len(model._moepatch_given) != 1:
        return f"it calls the attention function {len(model._moepatch_given)} times"
    given = model._moepatch_given[0]
    odd = next((name for name in given if name.startswith("argument ")), None)
    if odd is not None:
        return f"the attention function gets {odd} by position"
    mask = given["attention_mask"]
    mask_name = found.name_of(mask)
    if mask_name is None and isinstance(mask, Tensor):  # cut to the number of keys
        mask_name = next((n for n, v in found.values.items() if isinstance(v, Tensor) and v.shape == mask.shape and torch.equal(v, mask)), None)
    if mask_name is None and mask is not None:
        return "it computes with its mask"
    tables = [s.moepatch_name for s in found.stand_ins() if s.moepatch_unpacked]
    tables += [name for name, value in found.values.items() if isinstance(value, Tensor) and name not in (found.tokens, mask_name)]
    caches = found.caches()
    if len(tables) > 1 or len(caches) > 1:
        what, names = ("pair of tables", tables) if len(tables) > 1 else ("cache", [s.moepatch_name for s in caches])
        return f"it takes more than one {what} ({', '.join(names)})"
    updates = updates_of(model, found, run, extra)
    model._moepatch_given = [given]
    if isinstance(updates, str):
        return updates
    handed = [(value.moepatch_name, name) for name, value in given.items() if isinstance(value, StandIn) and name not in ("attention_mask", EXTRA)]
    return replace(
        roles, tables=tables[0] if tables else None, mask=mask_name, cache=caches[0].moepatch_name if caches else None, handed=tuple(handed),
        extra=given.get(EXTRA) is extra, updates=updates,
    )  # fmt: skip


def _run(module: nn.Module, roles: Roles, call: Call, forward: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Results and records of the calls that `Subject` describes."""
    module._moepatch_given, module._moepatch_attempt = [], False
    results = trial.run(module.train(), call, forward=forward, hidden=True)
    forward = type(module).forward if forward is None else forward
    with torch.no_grad(), trial.torch_formulas(module, forward) as forward:
        forward(module, **{**call.kwargs, roles.tokens: call.kwargs[roles.tokens] * _LOUD})
        kwargs, cache = dict(call.kwargs), RecordingCache()
        if roles.cache is not None:
            kwargs[roles.cache] = cache
        if roles.cache is not None and roles.mask is not None:
            kwargs[roles.mask] = kwargs[roles.mask].repeat(1, 1, 1, 2)
        forward(module.eval(), **kwargs)
        module._moepatch_given[-1]["moepatch_cache"] = cache.given
        for name, default in zip(roles.names, roles.defaults, strict=True):
            if name in (roles.tokens, roles.cache):
                continue
            _without(name, module, forward, {**call.kwargs, name: None})
            if default is not REQUIRED:
                _without(name, module, forward, {key: value for key, value in call.kwargs.items() if key != name})
    return results, module._moepatch_given


def _without(name: str, module: nn.Module, forward: Any, kwargs: dict[str, Any]) -> None:
    """One more call, which may fail."""
    known = len(module._moepatch_given)
    try:
        forward(module, **kwargs)
        module._moepatch_given[-1][_WITHOUT] = name
    except Exception:  # families need some arguments that have a default
        del module._moepatch_given[known:]
        module._moepatch_given.append(None)


def _unlike(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> list[str]:
    """The names under which two records differ; none where the family's own call failed."""
    if theirs is None:
        return []
    if ours is None:
        return list(theirs)
    return [name for name in {**theirs, **ours} if not (name in theirs and name in ours and same(theirs[name], ours[name]))]


def same(a: Any, b: Any) -> bool:
    """Whether two records say the same; numbers to fp32 rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or (type(a) is type(b) and not isinstance(a, (Tensor, StandIn)) and a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.linalg.vector_norm(a.double() - b.double()) <= trial.FP32_LIMIT * torch.linalg.vector_norm(a.double()))
