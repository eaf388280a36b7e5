"""Recognises pre-norm layers (see `layers.residual`) by running their own code on stand-ins.

The layer is copied with its children replaced: what is not a norm becomes a cheap linear function that writes down how it is called. From
that the arguments of each child are read, and the layer's own forward and the patched one are compared: results, gradients, and every
argument that a child gets. Residual multipliers, norms after a branch, parallel branches and dropout show as differences. A child may
return its tokens alone or as the first of a tuple; which of these forms the layer takes apart is tried, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import trial
from ..layers.norm import NormSpec
from ..layers.residual import RESIDUAL, Branch, ResidualSpec, Source
from ..registry import register_matcher
from ..replica import random_fill, replica
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from ..surgery import MadeClasses, original_class
from .experts import left, make_site
from .known import known
from .norm import read_norm
from .probe import fingerprint
from .settled import settled
from .witness import Witness, lengths_named, moved, scaled, strided, words_of

_POSING = MadeClasses()
_SHAPE = (3, 4)  # no branch can be unpacked into two by mistake
#: Other sequences, as long as limits of length may be.
_SHAPES = ((1, 1), (1, 2), (1, 3), (5, 5), (2, 48), (1, 600), (1, 4200))
#: The width at which wide layers are tried.
_NARROW = 16
#: What a child may return, see `layers.residual.form_of_branch`; the first ones are tried on all children at once.
_RETURNS = ("tensor", "tuple2", "tuple1", "flat tensor", "tuple3", "tuple4", "list1", "list2", "flat tuple2")
_EXTRA = "moepatch_extra"  # a keyword that no layer has a name for
_NOT_RUN = "its own code cannot be run with stand-ins for its children"
_PLAIN = (type(None), bool, int, float, str)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@register_matcher("residual", priority=10, around=True)
def match_residual(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring. What is no element of a list of layers is not said to be nearly one."""
    layer = found.module
    norms = _norms(layer, memo)
    if not norms or len(layer._modules) <= len(norms):
        return None
    reading: ResidualSpec | str = f"it has {len(norms)} norms; pre-norm layers have one for each of one or two branches"
    if len(norms) <= 2:
        key = ("residual", fingerprint(_without_unused_numbers(_stand_in(layer, norms, "tensor", _Log()))), tuple(map(type, layer.children())))
        if key not in memo:
            memo[key] = known("residual", layer, _read, norms, of=norms.items())
        reading = memo[key]
    if isinstance(reading, str):
        return left(found, "residual", reading) if any(isinstance(parent, nn.ModuleList) for parent, _ in found.parents) else None
    site = make_site(found, "residual", reading, tuple(f"{b.norm}.{norms[b.norm].weight}" for b in reading.branches))
    return site if isinstance(site, Site) else left(found, "residual", site.reason)


def _norms(layer: nn.Module, memo: dict) -> dict[str, NormSpec]:
    """The children that are norms with a weight and without gate."""
    specs = {name: read_norm(child, memo) for name, child in layer._modules.items() if child is not None}
    return {name: spec for name, spec in specs.items() if spec is not None and spec.weight is not None and spec.gate is None}


class _Argument:
    """Stands for the argument of a name. Layers that do more with it than pass it on fail."""

    def __init__(self, name: str):
        self.name = name

    def __bool__(self):
        raise TypeError(f"{self.name} decides what the layer does")


@dataclass
class _Written:
    """A call of a child: what went in (of norms it is not needed) and what came out."""

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    out: Any = None


class _Log(list):
    """Calls in order; a list that replicas share."""


class _Child(nn.Module):
    """A linear function of the first tensor that it gets, returned in one of the forms of `_RETURNS`."""

    def __init__(self, name: str, form: str, width: int, written: _Log):
        super().__init__()
        self.name, self.form, self._moepatch_written = name, form, written
        self.scale, self.shift = (nn.Parameter(torch.empty(width, device="meta", dtype=torch.float32)) for _ in range(2))

    def forward(self, *args, **kwargs):
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        y = _in_form(self.form, x * self.scale + x.roll(1, -1) * self.shift, x)
        self._moepatch_written.append(_Written(self.name, args, kwargs, y))
        return y


def _in_form(form: str, y: Tensor, x: Tensor) -> Any:
    """Tokens and, where there is room for it, something else that comes of x."""
    kind = form.removeprefix("flat ")
    y = y.flatten(0, -2) if kind != form else y
    if kind == "tensor":
        return y
    items = [y, *(x.exp() * i for i in range(1, int(kind[-1])))]
    return tuple(items) if kind.startswith("tuple") else items


def _posing_as(cls: type[nn.Module]) -> type[_Child]:
    """`_Child` as a subclass of what it stands for: layers may ask for the class of a child before they call it."""
    return _POSING.get(cls, None, lambda: type(f"StandIn{cls.__name__}", (_Child, cls), {}))


def _stand_in(layer: nn.Module, norms: dict[str, NormSpec], form: dict[str, str] | str, written: _Log) -> nn.Module:
    """The layer's code and plain attributes over its norms and over `_Child` in the place of all others; on the meta device."""
    width = next(iter(norms.values())).width
    copy = object.__new__(original_class(layer))
    copy.__dict__.update(layer.__dict__)
    forms = dict.fromkeys(layer._modules, form) if isinstance(form, str) else form
    copy._modules = dict(layer._modules)
    for name, child in layer._modules.items():
        if child is not None and name not in norms:
            copy._modules[name] = _Child(name, forms[name], width, written)
            copy._modules[name].__class__ = _posing_as(original_class(child))
    copy.training = True  # dropout counts
    if "gradient_checkpointing" in vars(copy):  # it stands around the forward, and acts on keywords that are tried here
        copy.gradient_checkpointing = False
    return copy


def _without_unused_numbers(copy: nn.Module) -> nn.Module:
    """A stand-in without the integers that its forward does not mention, such as the layer's own number: layers that differ in those are equal.

    Where the forward calls methods of its class nothing is left out, for they may read anything.
    """
    names = set(trial.eager_forward(copy).__code__.co_names)
    own = {name for cls in type(copy).__mro__[: type(copy).__mro__.index(nn.Module)] for name, value in vars(cls).items() if inspect.isroutine(value)}
    if not names & own:
        for name in [name for name, value in vars(copy).items() if type(value) is int and name not in names]:
            del copy.__dict__[name]
    return copy


def _narrow(norms: dict[str, NormSpec]) -> dict[int, int]:
    """Sizes of a scale model: a layer does the same at every width."""
    width = next(iter(norms.values())).width
    return {width: _NARROW} if width > 2 * _NARROW and not any(spec.group for spec in norms.values()) else {}


def _made(layer: nn.Module, norms: dict[str, NormSpec], forms: dict[str, str], spec: ResidualSpec | None = None) -> tuple[nn.Module, _Log]:
    """A scale model on stand-ins, with a spec the patched one, and what it writes down."""
    written, sizes = _Log(), _narrow(norms)
    copy = replica(_stand_in(layer, norms, forms, written), sizes, random_fill(torch.Generator().manual_seed(0)))
    for name in norms:
        copy._modules[name].register_forward_hook(lambda module, args, out, name=name: written.append(_Written(name, args, out=out)))
    return (copy if spec is None else trial.inject(copy, RESIDUAL.injections(spec.resized(sizes), "reference", None))), written


def _call(norms: dict[str, NormSpec], arguments: dict[str, Any], shape: tuple[int, int] = _SHAPE) -> trial.Call:
    width = next(iter(norms.values())).width
    width = _narrow(norms).get(width, width)
    return trial.Call((torch.randn(*shape, width, generator=torch.Generator().manual_seed(1), dtype=torch.float32),), arguments)


def _read(layer: nn.Module, norms: dict[str, NormSpec]) -> ResidualSpec | str:
    """The spec that computes what a layer does, or why there is none."""
    signature = list(inspect.signature(trial.eager_forward(layer)).parameters.values())[1:]
    named = [p for p in signature if p.kind in _NAMED]
    takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)
    if len(named) + takes_rest != len(signature) or not named or named[0].kind is inspect.Parameter.KEYWORD_ONLY:
        return "it does not take its tokens first and everything else by name"
    defaults = tuple((p.name, p.default) for p in named if p.default is not inspect.Parameter.empty)
    odd = [name for name, value in defaults if not isinstance(value, _PLAIN)]
    if odd:
        return f"the default of its argument `{odd[0]}` is no plain value"
    if len({spec.width for spec in norms.values()}) != 1:
        return "its norms have different widths"
    extras = _keywords(layer, {p.name for p in named}) if takes_rest else []
    everything = {name: _Argument(name) for name in [*(p.name for p in named[1:]), *extras]}
    reasons = []
    for forms in _forms(layer, norms):
        found = _shown(layer, norms, forms, everything, extras)
        if isinstance(found, str):
            reasons.append(found)
            continue
        branches, result = found
        spec = ResidualSpec(
            width=next(iter(norms.values())).width,
            parameters=tuple(p.name for p in named),
            defaults=defaults,
            takes_rest=takes_rest,
            branches=tuple(replace(branch, returns=(forms[branch.child],)) for branch in branches),
            norms=tuple(norms[branch.norm] for branch in branches),
            result=result,
        )
        reason = _disagreement(layer, norms, forms, spec, everything)
        if reason is None:
            return _with_forms(layer, norms, forms, spec, everything)
        reasons.insert(0, reason)  # got further than what could not be read
    # Forms that the layer does not take apart say nothing about it.
    return next((reason for reason in reasons if not reason.startswith(_NOT_RUN)), reasons[0])


def _shown(layer, norms, forms, everything: dict[str, _Argument], extras: list[str]) -> tuple[tuple[Branch, ...], tuple[Source, ...] | None] | str:
    """The branches that a call of the family's code shows, and what it returns; or why it shows none."""
    copy, written = _made(layer, norms, forms)
    call = _call(norms, everything)
    try:
        with torch.no_grad(), trial.torch_formulas(copy, trial.eager_forward(copy)) as forward:
            returned = forward(copy, *call.args, **call.kwargs)
    except Exception as error:  # the layer wants another form, or is no such layer
        return f"{_NOT_RUN} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    branches = _branches(written, norms, extras)
    if branches is None:
        return f"it does not call its norms and children by turns, each norm for the child after it ({', '.join(w.name for w in written)})"
    if isinstance(returned, Tensor):
        return branches, None
    if type(returned) is not tuple:
        return f"it returns a {type(returned).__name__}"
    result = tuple(_returned(item, [w.out for w in written if w.name not in norms]) for item in returned)
    return "it returns something in a tuple that is neither its tokens nor what a child returned" if None in result else (branches, result)


def _returned(item: Any, outs: list[Any]) -> Source | None:
    """Where an item of the tuple that a layer returns comes from."""
    for i, out in enumerate(outs):
        for place, other in enumerate(out if isinstance(out, (tuple, list)) else ()):
            if item is other:
                return Source("output", (i, place))
    if isinstance(item, Tensor):
        return Source("stream")
    return Source("constant", item) if isinstance(item, _PLAIN) else None


def _keywords(layer: nn.Module, named: set[str]) -> list[str]:
    """Keywords that the layer has no name for: one that nobody knows, and all strings of its code, which it might look for."""
    code = trial.eager_forward(layer).__code__
    return [_EXTRA, *sorted({c for c in code.co_consts if isinstance(c, str) and c.isidentifier()} - named)]


def _forms(layer: nn.Module, norms: dict[str, NormSpec]) -> Iterator[dict[str, str]]:
    """What the children may return: all the same, or one a tuple and the others tensors, and the other way round."""
    names = [name for name in layer._modules if name not in norms]
    for form in _RETURNS[:4]:
        yield dict.fromkeys(names, form)
    for odd in names if len(names) > 1 else []:
        for form, others in (("tuple2", "tensor"), ("tensor", "tuple2"), ("tuple1", "tensor"), ("flat tensor", "tuple2")):
            yield {**dict.fromkeys(names, others), odd: form}


def _with_forms(layer, norms, forms: dict[str, str], spec: ResidualSpec, everything: dict[str, _Argument]) -> ResidualSpec:
    """The spec with every form of what a child may return that the layer takes apart as the patched one does."""
    branches = []
    for i, branch in enumerate(spec.branches):
        accepted = list(branch.returns)
        for form in _RETURNS:
            if form not in accepted and not any(source.kind == "output" and source.value[0] == i for source in spec.result or ()):
                other = replace(spec, branches=(*spec.branches[:i], replace(branch, returns=(form,)), *spec.branches[i + 1 :]))
                if _witness(layer, norms, {**forms, branch.child: form}, other).unlike(_call(norms, everything), True, must_run=True) is None:
                    accepted.append(form)
        branches.append(replace(branch, returns=tuple(sorted(accepted))))
    return replace(spec, branches=tuple(branches))


def _witness(layer, norms, forms: dict[str, str], spec: ResidualSpec) -> Witness:
    original, twin = _made(layer, norms, forms)[0], _made(layer, norms, forms, spec)[0]
    return Witness(original, twin, trial.eager_forward(original))


def _branches(written: list[_Written], norms: dict[str, NormSpec], extras: list[str]) -> tuple[Branch, ...] | None:
    """The branches that calls show, norm and child by turns; None if they are called otherwise."""
    pairs = list(zip(written[::2], written[1::2], strict=False))
    if len(written) != 2 * len(norms) or any(norm.name not in norms or child.name in norms for norm, child in pairs):
        return None
    branches = []
    for norm, child in pairs:
        passed = {key for key in child.kwargs if key in extras}
        rest = passed == set(extras) and all(isinstance(child.kwargs[key], _Argument) and child.kwargs[key].name == key for key in passed)
        if passed and not rest:
            return None
        args = tuple(_source(value, norm.out) for value in child.args)
        kwargs = tuple((key, _source(value, norm.out)) for key, value in child.kwargs.items() if key not in passed)
        if None in args or None in dict(kwargs).values():
            return None
        branches.append(Branch(norm=norm.name, child=child.name, args=args, kwargs=kwargs, rest=bool(extras) and rest))
    return tuple(branches)


def _source(value: Any, normed: Tensor) -> Source | None:
    if value is normed:
        return Source("normed")
    if isinstance(value, _Argument):
        return Source("argument", value.name)
    return Source("constant", value) if isinstance(value, _PLAIN) else None


def _disagreement(layer, norms, forms, spec: ResidualSpec, everything: dict[str, _Argument]) -> str | None:
    """What is not the same, in words: what is computed and passed on, with all arguments, with none that may be left out, and with each of
    those alone; then whatever a second witness finds."""
    optional = {name for name, _ in spec.defaults} | (everything.keys() - set(spec.parameters))
    required = {name: value for name, value in everything.items() if name not in optional}
    for arguments in (everything, required, *({**required, name: everything[name]} for name in optional)):
        (original, written), (twin, rewritten) = _made(layer, norms, forms), _made(layer, norms, forms, spec)
        call = _call(norms, arguments)
        try:
            theirs = trial.run(original, call, forward=trial.eager_forward(original), hidden=arguments is everything)
            ours = trial.run(twin, call, hidden=arguments is everything)
        except Exception as error:  # it does more with its arguments than pass them on
            return f"it does more with its arguments than pass them on ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        reason = words_of(trial.differences(theirs, ours))
        if reason is not None:
            return f"it computes something else than h + {spec.branches[0].child}({spec.branches[0].norm}(h)): {reason}"
        if len(written) != len(rewritten) or not all(map(_same_call, written, rewritten)):
            return "it does not hand on its arguments as they are"
    known = (spec, tuple(forms.items()), tuple(everything))
    witness = _witness(layer, norms, forms, spec)
    return settled(witness, known, _call(norms, everything), lambda: _calls(norms, everything, witness.original))


def _calls(norms: dict[str, NormSpec], arguments: dict[str, Any], layer: nn.Module) -> Iterator[tuple[str, trial.Call, bool]]:
    ordinary = _call(norms, arguments)
    yield "", ordinary, True
    for factor in (30.0, 1e-3, 1e5):
        yield f"with inputs × {factor:g}", scaled(ordinary, factor), False
    yield "with inputs that have a mean", moved(ordinary), False
    yield "with an input that is laid out otherwise", strided(ordinary), False
    for shape in _SHAPES:
        yield f"with {shape[0] * shape[1]} token{'s' if shape[1] > 1 else ''}", _call(norms, arguments, shape), shape in (_SHAPES[0], _SHAPES[-1])
    for tokens in lengths_named(layer, _SHAPES[-1][1]):
        yield f"with one sequence of {tokens} tokens", _call(norms, arguments, (1, tokens)), False


def _same_call(a: _Written, b: _Written) -> bool:
    same = a.name == b.name and len(a.args) == len(b.args) and a.kwargs.keys() == b.kwargs.keys()
    return same and all(map(_same, a.args, b.args)) and all(_same(a.kwargs[key], b.kwargs[key]) for key in a.kwargs)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    return a is b or type(a) is type(b) and isinstance(a, _PLAIN) and a == b
