"""Recognises attention modules: linear layers to queries, keys and values, an attention function by name, a linear layer out of it.

The form of the children gives the sizes. What the module does with them is found by calling a scale model of it in the family's own code
with an attention function that writes down what it is given: where each keyword comes from is read off, how heads are normalised and
rotated is tried. A reading is taken if its patched twin gives the attention function the same arguments and returns the same numbers and
gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..layers.attention_block import ATTENTION_BLOCK, AttentionBlockSpec, attention_functions
from ..layers.roles import Argument
from ..layers.rope import ROPES, HeadNorm, HeadsSpec
from ..quantized import kept
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from ..surgery import original_class
from .attention_calls import Subject
from .experts import left, make_site
from .layer_index import looks_once, remembered
from .near import in_the_way
from .norm import match_norm
from .witness import Objection
from .roles import base_roles

_INPUTS = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj")
_SMALL_HEAD = 16
_SMALL_HIDDEN = 40


@register_matcher("attention_block", priority=40, around=True)
def match_attention_block(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring."""
    module = found.module
    form = _form(module)
    if isinstance(form, _Form):
        form = remembered(memo, ("attention_block", id(module.config)), module, lambda: _read(form, module, scan, memo))
    return taken(found, "attention_block", form)


def taken(found: Found, kind: str, reading: Any) -> Site | Left | None:
    """What a matcher returns for a spec, for a reason or for None."""
    if reading is None or isinstance(reading, str):
        return None if reading is None else left(found, kind, in_the_way(found.module) or reading)
    site = make_site(found, kind, reading, reading.parameter_names())
    return site if isinstance(site, Site) else left(found, kind, site.reason)


@dataclass(frozen=True)
class _Form:
    """What the children say: a spec without norm, rope and arguments, and the norms' names by projection."""

    spec: AttentionBlockSpec
    norms: tuple[str, ...]


def _form(module: nn.Module) -> _Form | str | None:
    """The sizes and parts of a module that has the form, what is odd about them, or None."""
    children = module._modules
    output = next((name for name in _OUTPUTS if children.get(name) is not None), None)
    if output is None or any(children.get(name) is None for name in _INPUTS):
        return None
    layers = [children[name] for name in (*_INPUTS, output)]
    others = [name for name in children if name not in (*_INPUTS, output) and children[name] is not None]
    norms = tuple(name for first in "qk" for name in others if name.startswith(first) and "norm" in name)
    gates = [name for name in others if name not in norms and next(children[name].parameters(), None) is not None]
    if len(norms) not in (0, 2) or len(gates) > 1 or any(type(children[name]) is not nn.Linear for name in gates):
        return f"what it does with {', '.join(f'`{name}`' for name in others)} is not known"
    reason = odd_module(module) or odd_linears((*_INPUTS, output), layers)
    if reason is not None or module._buffers:
        return reason or f"what it does with its buffer `{next(iter(module._buffers))}` is not known"
    biased = {layer.bias is not None for layer in layers[:3]}
    heads = _heads(*layers, vars(module).get("head_dim"))
    if heads is None or len(biased) > 1:
        shapes = ", ".join(f"{name} {list(layer.weight.shape)}" for name, layer in zip((*_INPUTS, output), layers, strict=True))
        return f"no number of heads explains its projections ({shapes})" if heads is None else "some of its projections have a bias, and some have none"
    gate = gates[0] if gates else None
    if gate is not None and children[gate].out_features not in (heads.heads, heads.heads * heads.value_dim):
        return f"its child `{gate}` is no gate of the heads"
    roles = base_roles(module, "")
    if isinstance(roles, str):
        return roles
    spec = AttentionBlockSpec(
        hidden=layers[0].in_features, heads=heads, bias=biased.pop(), inputs=_INPUTS, output=output, norms=norms, gate=gate, roles=roles,
        norm_class=original_class(children[norms[0]]) if norms else None,
    )  # fmt: skip
    return _Form(spec, norms)


def odd_module(module: nn.Module) -> str | None:
    """What keeps a module with the children of an attention module from being called with an attention function that writes, or None."""
    if attention_functions(original_class(module)) is None:
        return "it does not go through transformers' attention interface"
    return None if "config" in vars(module) else "it has no `config`"


def odd_linears(names: Iterable[str], layers: Iterable[nn.Module]) -> str | None:
    """The first of the projections that is something else than torch's linear layer with plain weights, in words, or None."""
    for name, layer in zip(names, layers, strict=True):
        words = kept(layer)
        if words is not None or type(layer) is not nn.Linear:
            return f"its projection `{name}` is {words or f'{type(layer).__name__}, not Linear'}"
    return None


def _heads(q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, head_dim: Any) -> HeadsSpec | None:
    """The numbers of heads that explain the shapes of the projections."""
    if type(head_dim) is not int or head_dim < 1 or k.out_features % head_dim or len({q.in_features, k.in_features, v.in_features}) > 1:
        return None
    kv_heads = k.out_features // head_dim
    if v.out_features % kv_heads or o.in_features % (v.out_features // kv_heads):
        return None
    value_dim = v.out_features // kv_heads
    heads = o.in_features // value_dim
    gated = q.out_features == 2 * heads * head_dim
    if heads % kv_heads or (q.out_features != heads * head_dim and not gated):
        return None
    return HeadsSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, norm=None, rope="none", gated=gated)


def _read(form: _Form, module: nn.Module, scan: Scan, memo: dict) -> tuple[AttentionBlockSpec | str, bool]:
    """The spec that computes what the module does, or why there is none; and whether that holds for all layers."""
    norms = _norms(form, module, scan, memo)
    if norms is None:
        return f"what its norms ({', '.join(form.norms)}) compute is not known", looks_once(module)
    reasons = []
    for sizes in dict.fromkeys((tuple(_sizes(form.spec).items()), ())):
        for narrow in (2, 1):
            scaled = form.spec.resized(dict(sizes))
            original = Subject.made(module, dict(sizes), scaled.hidden, scaled.heads.head_dim // narrow, False, ATTENTION_BLOCK)
            arguments = original if isinstance(original, str) else arguments_of(original)
            if isinstance(arguments, str):
                reasons.append(arguments)
                continue
            readings = [replace(spec, arguments=arguments) for spec in _readings(replace(form.spec, roles=original.roles), norms, narrow)]
            spec = fitting(readings, lambda spec, original=original, sizes=dict(sizes): original.misses(spec.resized(sizes)))
            if not isinstance(spec, str):
                return spec, original.hands_on_index()
            reasons.append(spec)
    return most_telling(reasons), looks_once(module)


def fitting(readings: Iterable[Any], misses: Callable[[Any], list[str]]) -> Any:
    """The first reading that misses nothing, or what the best one misses, in words."""
    least = None
    for reading in readings:
        missed = misses(reading)
        if not missed:
            return reading
        if isinstance(missed[0], Objection):  # the numbers are those of this reading, and no other one explains the rest
            return missed[0]
        least = missed if least is None or len(missed) < len(least) else least
    if least is not None and least[0].startswith("the argument"):
        return f"{least[0]} decides what the module does"
    what = ", ".join(name if name.startswith("its ") else f"`{name}`" for name in least or ["its result"])
    return f"how it makes {what} is not known"


def most_telling(reasons: list[str]) -> str:
    """That a scale model fails says less than what another one showed; of two that fail, the later one had usual tables."""
    return next((reason for reason in reasons if "cannot be run" not in reason), reasons[-1])


def _norms(form: _Form, module: nn.Module, scan: Scan, memo: dict) -> tuple[HeadNorm | None, ...] | None:
    """The ways the norms may be used, ``(None,)`` without norms; None if they are of no kind that is known."""
    if not form.norms:
        return (None,)
    spec, children = form.spec.heads, [module._modules[name] for name in form.norms]
    sites = [match_norm(scan.of(child), scan, memo) for child in children]
    if any(not isinstance(site, Site) for site in sites) or len({original_class(child) for child in children}) > 1:
        return None
    q, k = (site.spec for site in sites)
    if q != replace(k, width=q.width) or q.weight != "weight" or q.gate is not None or q.group or q.cast not in ("before", "after"):
        return None
    places = {(spec.head_dim, spec.head_dim): ("head", "after"), (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim): ("full",)}
    return tuple(HeadNorm(place, q.eps, float(q.offset), q.cast == "before") for place in places.get((q.width, k.width), ())) or None


def _sizes(spec: AttentionBlockSpec) -> dict[int, int]:
    """From the sizes of the module to those of its scale model, which has as many heads where that can be. Empty if it is not to be had."""
    h = spec.heads
    if h.head_dim <= 2 * _SMALL_HEAD:
        return {}
    dims = {h.head_dim: _SMALL_HEAD, h.value_dim: _SMALL_HEAD if h.value_dim == h.head_dim else _SMALL_HEAD // 2}
    counts = _fewer_heads(h, dims[h.heads]) if h.heads in dims else {h.heads: h.heads, h.kv_heads: h.kv_heads}
    sizes = {**counts, **dims}
    if any(sizes[count] != few for count, few in counts.items()):
        return {}
    for count, times, dim in itertools.product((h.heads, h.kv_heads), (1, 2), dims):
        if sizes.setdefault(times * count * dim, times * sizes[count] * dims[dim]) != times * sizes[count] * dims[dim]:
            return {}
    sizes.setdefault(spec.hidden, _SMALL_HIDDEN)
    return sizes


def _fewer_heads(h: HeadsSpec, heads: int) -> dict[int, int]:
    """Counts of heads, of those of keys, and of heads that share one, where there are to be `heads`: as many as they are wide, before and after."""
    group = h.heads // h.kv_heads
    for kv_heads in (n for n in (*range(heads // 2, 0, -1), heads) if heads % n == 0):
        counts = {1: 1, h.heads: heads}
        if counts.setdefault(h.kv_heads, kv_heads) == kv_heads and counts.setdefault(group, heads // kv_heads) == heads // kv_heads:
            return counts
    return {h.heads: h.heads}


def _readings(spec: AttentionBlockSpec, norms: tuple[HeadNorm | None, ...], narrow: int) -> Iterator[AttentionBlockSpec]:
    """Every way to normalise and rotate with tables of D / `narrow` columns."""
    ways = [(name, False) if rope.width == narrow else (name, True) for name, rope in ROPES.items() if rope.width <= narrow]
    for (rope, partial), norm in itertools.product(ways if spec.roles.tables is not None else [], norms):
        yield replace(spec, heads=replace(spec.heads, rope=rope, norm=norm), partial=partial)
    if narrow == 1:
        for norm in norms:
            yield replace(spec, heads=replace(spec.heads, rope="none", norm=norm))


def arguments_of(subject: Subject) -> tuple[Argument, ...] | str:
    """Where each keyword of the attention function comes from, or what comes from nowhere that is known."""
    training, evaluation = subject.given[0], subject.given[2]
    handed = {keyword for _, keyword in subject.roles.handed}
    arguments = []
    for name, value in training.items():
        if name in ("query", "key", "value", "attention_mask") or name in handed or (name in subject.call.kwargs and name not in subject.roles.names):
            continue
        found = _source(subject.module, name, value, evaluation[name]) if name in evaluation else None
        if found is None:
            return f"the attention function gets `{name}`, which comes from nowhere that is known"
        arguments.append(found)
    used = {argument.value for argument in arguments if argument.source == "attribute"}
    unused = sorted(name for name, p in subject.module._parameters.items() if p is not None and name not in used)
    return f"what it does with its parameter `{unused[0]}` is not known" if unused else tuple(arguments)


def _source(module: nn.Module, name: str, value: Any, in_evaluation: Any) -> Argument | None:
    places = {"attribute": vars(module), "config": vars(module.config)}
    if isinstance(value, Tensor):
        return next((Argument(name, "attribute", key) for key, p in module._parameters.items() if p is value), None)
    if type(value) not in (int, float, bool, str, type(None)):
        return None
    if value != in_evaluation:
        places = {f"training {place}": values for place, values in places.items()}
        return next((Argument(name, place, key) for place, values in places.items() for key, v in values.items() if v == value and "dropout" in key), None)
    for place, values in places.items():
        if name in values and values[name] == value:
            return Argument(name, place, name)
    if type(value) in (int, float) and value not in (0, 1):
        for place, values in places.items():
            for key, other in values.items():
                if type(other) is type(value) and other == value:
                    return Argument(name, place, key)
    return Argument(name, "constant", value)
