"""Recognises pre-norm layers (see `layers.residual`) by running their own code on stand-ins.

The layer is copied with its children replaced: what is not a norm becomes a cheap linear function that writes down how it is called. From
that the arguments of each child are read, and the layer's own forward and the patched one are compared: results, gradients, and every
argument that a child gets. Residual multipliers, norms after a branch, parallel branches and dropout show as differences.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from .norm import read_norm
from .probe import fingerprint

_POSING = MadeClasses()
_SHAPE = (3, 4)  # no branch can be unpacked into two by mistake
_EXTRA = "moepatch_extra"  # a keyword that no layer has a name for
_PLAIN = (type(None), bool, int, float, str)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@register_matcher("residual", priority=10, around=True)
def match_residual(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring."""
    layer = found.module
    norms = _norms(layer, memo)
    if not norms or len(norms) > 2 or len(layer._modules) <= len(norms):
        return None
    key = ("residual", fingerprint(_without_unused_numbers(_stand_in(layer, norms, "tensor", []))), tuple(map(type, layer.children())))
    if key not in memo:
        memo[key] = _read(layer, norms)
    spec = memo[key]
    if not isinstance(spec, ResidualSpec):
        listed = any(isinstance(parent, nn.ModuleList) for parent, _ in found.parents)
        return left(found, "residual", spec or "it adds up something else than h + child(norm(h))") if listed else None
    site = make_site(found, "residual", spec, tuple(f"{b.norm}.{norms[b.norm].weight}" for b in spec.branches))
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
    """A call of a child: of a norm what came out, of others what went in."""

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    out: Tensor | None = None


class _Child(nn.Module):
    """A linear function of the first tensor that it gets, returned alone or as the first of a tuple."""

    def __init__(self, name: str, form: str, width: int, written: list[_Written]):
        super().__init__()
        self.name, self.form, self.written = name, form, written
        self.scale, self.shift = nn.Parameter(torch.empty(width, device="meta")), nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, *args, **kwargs):
        self.written.append(_Written(self.name, args, kwargs))
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        y = x * self.scale + x.roll(1, -1) * self.shift
        return y if self.form == "tensor" else (y, x.exp())


def _posing_as(cls: type[nn.Module]) -> type[_Child]:
    """`_Child` as a subclass of what it stands for: layers may ask for the class of a child before they call it."""
    return _POSING.get(cls, None, lambda: type(f"StandIn{cls.__name__}", (_Child, cls), {}))


def _stand_in(layer: nn.Module, norms: dict[str, NormSpec], form: dict[str, str] | str, written: list[_Written]) -> nn.Module:
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


def _trial(layer, norms, forms, arguments, spec: ResidualSpec | None = None) -> tuple[dict[str, Tensor], list[_Written]]:
    """Results, gradients and calls: of the family's code, or with a spec of the patched layer's."""
    written: list[_Written] = []
    generator = torch.Generator().manual_seed(0)
    copy = replica(_stand_in(layer, norms, forms, written), {}, random_fill(generator))
    for name in norms:
        copy._modules[name].register_forward_hook(lambda module, args, out, name=name: written.append(_Written(name, args, out=out)))
    width = next(iter(norms.values())).width
    call = trial.Call((torch.randn(*_SHAPE, width, generator=generator),), arguments)
    if spec is None:
        return trial.run(copy, call, forward=trial.eager_forward(copy)), written
    return trial.run(trial.inject(copy, RESIDUAL.injections(spec, "reference", None)), call), written


def _read(layer: nn.Module, norms: dict[str, NormSpec]) -> ResidualSpec | None:
    signature = list(inspect.signature(trial.eager_forward(layer)).parameters.values())[1:]
    named = [p for p in signature if p.kind in _NAMED]
    takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)
    if len(named) + takes_rest != len(signature) or not named or named[0].kind is inspect.Parameter.KEYWORD_ONLY:
        return None
    defaults = tuple((p.name, p.default) for p in named if p.default is not inspect.Parameter.empty)
    if not all(isinstance(value, _PLAIN) for _, value in defaults) or len({spec.width for spec in norms.values()}) != 1:
        return None
    extras = _keywords(layer, {p.name for p in named}) if takes_rest else []
    everything = {name: _Argument(name) for name in [*(p.name for p in named[1:]), *extras]}
    for forms in _forms(layer, norms):
        try:
            results, written = _trial(layer, norms, forms, everything)
        except Exception:  # the layer wants another form, or is no such layer
            continue
        branches = _branches(written, norms, extras)
        if branches is None:
            continue
        spec = ResidualSpec(
            width=next(iter(norms.values())).width,
            parameters=tuple(p.name for p in named),
            defaults=defaults,
            takes_rest=takes_rest,
            branches=branches,
            norms=tuple(norms[branch.norm] for branch in branches),
        )
        if _agrees(layer, norms, forms, spec, everything):
            return spec
    return None


def _keywords(layer: nn.Module, named: set[str]) -> list[str]:
    """Keywords that the layer has no name for: one that nobody knows, and all strings of its code, which it might look for."""
    code = trial.eager_forward(layer).__code__
    return [_EXTRA, *sorted({c for c in code.co_consts if isinstance(c, str) and c.isidentifier()} - named)]


def _forms(layer: nn.Module, norms: dict[str, NormSpec]) -> Iterator[dict[str, str]]:
    """What the children may return: tensors, tuples, or the first a tuple and the others tensors, and the other way round."""
    names = [name for name in layer._modules if name not in norms]
    yield dict.fromkeys(names, "tensor")
    yield dict.fromkeys(names, "tuple")
    for odd in names if len(names) > 1 else []:
        for form, others in (("tuple", "tensor"), ("tensor", "tuple")):
            yield {**dict.fromkeys(names, others), odd: form}


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


def _agrees(layer, norms, forms, spec: ResidualSpec, everything: dict[str, _Argument]) -> bool:
    """Whether both compute the same and pass on the same, with all arguments, with none that may be left out, and with each of those alone."""
    optional = {name for name, _ in spec.defaults} | (everything.keys() - set(spec.parameters))
    required = {name: value for name, value in everything.items() if name not in optional}
    for arguments in (everything, required, *({**required, name: everything[name]} for name in optional)):
        try:
            theirs, written = _trial(layer, norms, forms, arguments)
            ours, rewritten = _trial(layer, norms, forms, arguments, spec)
        except Exception:  # it does more with its arguments than pass them on
            return False
        if theirs.keys() != ours.keys() or not all(d.ok for d in trial.differences(theirs, ours)):
            return False
        if len(written) != len(rewritten) or not all(map(_same_call, written, rewritten)):
            return False
    return True


def _same_call(a: _Written, b: _Written) -> bool:
    same = a.name == b.name and len(a.args) == len(b.args) and a.kwargs.keys() == b.kwargs.keys()
    return same and all(map(_same, a.args, b.args)) and all(_same(a.kwargs[key], b.kwargs[key]) for key in a.kwargs)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    return a is b or type(a) is type(b) and isinstance(a, _PLAIN) and a == b
