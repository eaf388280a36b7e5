"""Recognises attention modules with latents: down- and up-projections of keys and values, of queries too or not, one key shared by all heads.

The form of the children gives the sizes. How parts of heads are rotated, what is multiplied by a number on the way and what the cache is given
is found by calling a scale model of the module in the family's own code; see `attention_block`, whose way this is. A module that does more,
such as choosing the keys that a query sees, calls more than these children and is left as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .. import trial
from ..layers.latent import LATENT, LatentSpec
from ..layers.latent_heads import TURNS, LatentHeads
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from .attention_block import arguments_of, fitting, most_telling, odd_linears, odd_module, taken
from .attention_calls import Subject, same
from .known import known
from .layer_index import looks_once, remembered
from .probe import finite_numbers
from .roles import base_roles

#: Names of what queries go through, and of the rest: to the latent and the shared key, the latent's norm, its up-projection, the result's.
_QUERIES = (("q_proj",), ("q_a_proj", "q_a_layernorm", "q_b_proj"))
_OTHERS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
#: Sizes of scale models: the greatest common divisor of the parts of heads, and of the rest at most.
_SMALL_PART, _SMALL_HEADS, _SMALL_LATENT, _SMALL_RANK, _SMALL_HIDDEN = 4, 6, 24, 20, 40


@register_matcher("latent", priority=40, around=True)
def match_latent(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring."""
    module = found.module
    form = _form(module)
    if isinstance(form, LatentSpec):
        form = remembered(memo, ("latent", id(module.config)), module, lambda: known("latent", module, _read, form, of=(form,)))
    return taken(found, "latent", form)


def _form(module: nn.Module) -> LatentSpec | str | None:
    """The sizes and parts of a module that has the form, without rotation, scales and arguments; what is odd about them; or None."""
    children, attributes = {name: child for name, child in module._modules.items() if child is not None}, vars(module)
    queries = next((names for names in _QUERIES if all(name in children for name in names)), None)
    if queries is None or any(name not in children for name in _OTHERS):
        return None
    names = [name for name in dict.fromkeys((queries[0], queries[-1], *_OTHERS)) if "norm" not in name]
    gates = [name for name in children if name not in (*queries, *_OTHERS)]
    if len(gates) > 1:
        return f"what it does with {', '.join(f'`{name}`' for name in gates)} is not known"
    if gates and type(children[gates[0]]) is not nn.Linear:
        return f"what it does with `{gates[0]}` is not known"
    reason = odd_module(module) or odd_linears(names, [children[name] for name in names])
    tensors = [name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
    if reason is not None or tensors:
        return reason or f"what it does with its parameter `{tensors[0]}` is not known"
    sizes = [attributes.get(name) for name in _SIZES]
    heads = None
    if all(type(size) is int for size in sizes):
        heads = _heads(*sizes, *(children[name] for name in (queries[-1], *_OTHERS) if "norm" not in name))
    if heads is None:
        shapes = ", ".join(f"{name} {list(children[name].weight.shape)}" for name in names)
        return f"no number of heads explains its projections ({shapes})"
    if gates and children[gates[0]].out_features not in (heads.heads, heads.heads * heads.value_dim):
        return f"its child `{gates[0]}` is no gate of the heads"
    roles = base_roles(module, "")
    if isinstance(roles, str):
        return roles
    down, norm, up, output = _OTHERS
    return LatentSpec(
        hidden=children[down].in_features, heads=heads, kv_rank=children[up].in_features, queries=queries, down=down, norm=norm, up=up,
        output=output, gate=gates[0] if gates else None, roles=roles,
    )  # fmt: skip


def _heads(nope: int, rope: int, value: int, q: nn.Linear, down: nn.Linear, up: nn.Linear, output: nn.Linear) -> LatentHeads | None:
    """The number of heads that explains the shapes of the projections."""
    if min(nope, rope, value) < 1 or rope % 2 or q.out_features % (nope + rope):
        return None
    heads = q.out_features // (nope + rope)
    widths = down.out_features, up.out_features, output.in_features
    if widths != (up.in_features + rope, heads * (nope + value), heads * value):
        return None
    return LatentHeads(heads=heads, nope=nope, rope_dim=rope, value_dim=value, rope="none")


def _read(module: nn.Module, form: LatentSpec) -> tuple[LatentSpec | str, bool]:
    """The spec that computes what the module does, or why there is none; and whether that holds for all layers."""
    sizes = _sizes(form, module)
    scaled = form.resized(sizes)
    numbers = [n for n in finite_numbers(module) if n not in (0.0, 1.0)]
    reasons = []
    for complex_tables in (False, True):
        original = Subject.made(module, sizes, scaled.hidden, scaled.heads.rope_dim, complex_tables, LATENT)
        arguments = original if isinstance(original, str) else arguments_of(original)
        if isinstance(arguments, str):
            reasons.append(arguments)
            continue
        spec = fitting(_readings(replace(form, roles=original.roles, arguments=arguments), complex_tables, numbers), partial(_misses, original, sizes))
        if not isinstance(spec, str):
            return spec, original.hands_on_index()
        reasons.append(spec)
        if original.roles.tables is None:
            break
    return most_telling(reasons), looks_once(module)


def _misses(original: Subject, sizes: dict[int, int], spec: LatentSpec) -> list[str]:
    missed = original.misses(spec.resized(sizes))
    return missed or ([] if _keeps_the_same(original, spec.resized(sizes)) else ["its cache"])


def _sizes(spec: LatentSpec, module: nn.Module) -> dict[int, int]:
    """From the sizes of the module to those of its scale model. Empty if that is not to be had."""
    h = spec.heads
    common = math.gcd(h.nope, h.rope_dim, h.value_dim)
    if common <= _SMALL_PART or common % _SMALL_PART:
        return {}
    times = common // _SMALL_PART
    sizes = {n: n // times for n in (h.nope, h.rope_dim, h.value_dim)}
    heads = sizes.setdefault(h.heads, min(h.heads, _SMALL_HEADS))
    for width in (h.head_dim, h.nope + h.value_dim, h.value_dim):
        if sizes.setdefault(width, width // times) != width // times or sizes.setdefault(h.heads * width, heads * width // times) != heads * width // times:
            return {}
    latent = sizes.setdefault(spec.kv_rank, _SMALL_LATENT)
    if sizes.setdefault(spec.kv_rank + h.rope_dim, latent + h.rope_dim // times) != latent + h.rope_dim // times:
        return {}
    if len(spec.queries) > 1:
        sizes.setdefault(module._modules[spec.queries[0]].out_features, _SMALL_RANK)
    sizes.setdefault(spec.hidden, _SMALL_HIDDEN)
    return sizes


def _readings(form: LatentSpec, complex_tables: bool, numbers: list[float]) -> Iterator[LatentSpec]:
    """Every way to rotate by such tables and to scale by numbers that the module has."""
    ways = [name for name, turn in TURNS.items() if turn.complex == complex_tables] if form.roles.tables is not None else []
    ways += [] if complex_tables else ["none"]
    for q_scale, kv_scale in itertools.product((1.0, *numbers), repeat=2):
        for rope in ways:
            yield replace(form, heads=replace(form.heads, rope=rope, q_scale=q_scale), kv_scale=kv_scale)


def _keeps_the_same(original: Subject, spec: LatentSpec) -> bool:
    """Whether an empty cache is told and holds the same after a call of the module and of its twin."""
    if spec.roles.cache is None:
        return True
    twin = original.twin(spec)
    try:
        theirs, ours = _cached(original, original.module, trial.eager_forward(original.module)), _cached(original, twin, type(twin).forward)
    except Exception:  # a family may ask more of a cache
        return False
    return same(theirs, ours)


def _cached(subject: Subject, module: nn.Module, forward: Any) -> list[Any]:
    """What an empty cache is given besides keys and values, and what it holds after a call."""
    cache, told = DynamicCache(), []
    update = cache.update

    def listening(key, value, *args, **kwargs):
        told.append((args, {name: dict(v) if isinstance(v, dict) else v for name, v in kwargs.items()}))
        return update(key, value, *args, **kwargs)

    cache.update = listening
    module._moepatch_given = []
    with torch.no_grad(), trial.torch_formulas(module, forward) as forward:
        forward(module.eval(), **{**subject.call.kwargs, subject.roles.cache: cache})
    return [told, module._moepatch_given, [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]]
