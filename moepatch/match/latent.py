"""Recognises attention modules with latents: down- and up-projections of keys and values, of queries too or not, one key shared by all heads.

The form of the children gives the sizes. How parts of heads are rotated, what is multiplied by a number on the way and what the cache is given
is found by calling a scale model of the module in the family's own code; see `attention_block`, whose way this is. A module that does more,
such as choosing the keys that a query sees, calls more than these children and is left as it is.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .. import trial
from ..layers.attention_block import PARAMETERS, attention_functions
from ..layers.latent import LATENT, LatentSpec
from ..layers.latent_heads import TURNS, LatentHeads
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Refusal, Site
from ..surgery import original_class
from ..trial import Call
from .attention_block import arguments_of, without_index
from .attention_calls import Subject
from .experts import make_site
from .probe import finite_numbers

#: Names of what queries go through, and of the rest: to the latent and the shared key, the latent's norm, its up-projection, the result's.
_QUERIES = (("q_proj",), ("q_a_proj", "q_a_layernorm", "q_b_proj"))
_OTHERS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
#: Sizes of scale models: the greatest common divisor of the parts of heads, and of the rest at most.
_SMALL_PART, _SMALL_HEADS, _SMALL_LATENT, _SMALL_RANK, _SMALL_HIDDEN = 4, 6, 24, 20, 40


@register_matcher("latent", priority=40, around=True)
def match_latent(found: Found, scan: Scan, memo: dict) -> Site | Refusal | None:
    """See the module's docstring."""
    module = found.module
    form = _form(module)
    if form is None:
        return None
    key = ("latent", id(module.config), without_index(module))
    if key not in memo:
        memo[key] = _read(form, module)
    spec = memo[key]
    if spec is None:
        return None
    site = make_site(found, "latent", spec, spec.parameter_names())
    return site if isinstance(site, Site) else None


def _form(module: nn.Module) -> LatentSpec | None:
    """The sizes and parts of a module that has the form, without rotation, scales and arguments; or None."""
    children, attributes = {name: child for name, child in module._modules.items() if child is not None}, vars(module)
    queries = next((names for names in _QUERIES if all(name in children for name in names)), None)
    if queries is None or any(name not in children for name in _OTHERS) or module._buffers or any(p is not None for p in module._parameters.values()):
        return None
    if "config" not in attributes or any(type(attributes.get(name)) is not int for name in _SIZES):
        return None
    if attention_functions(original_class(module)) is None:
        return None
    parameters = list(inspect.signature(trial.eager_forward(module)).parameters.values())[1:]
    keywords = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    names = tuple(p.name for p in parameters if p not in keywords)
    if names[:1] != ("hidden_states",) or not set(names) <= set(PARAMETERS) or len(keywords) != 1:
        return None
    linears = [children[name] for name in (queries[0], queries[-1], *_OTHERS) if "norm" not in name]
    gates = [name for name in children if name not in (*queries, *_OTHERS)]
    if any(type(linear) is not nn.Linear for linear in (*linears, *(children[name] for name in gates))) or len(gates) > 1:
        return None
    heads = _heads(*(attributes[name] for name in _SIZES), *linears[1:])
    if heads is None or (gates and children[gates[0]].out_features not in (heads.heads, heads.heads * heads.value_dim)):
        return None
    down, norm, up, output = _OTHERS
    return LatentSpec(
        hidden=children[down].in_features, heads=heads, kv_rank=children[up].in_features, queries=queries, down=down, norm=norm, up=up,
        output=output, gate=gates[0] if gates else None, parameters=names,
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


def _read(form: LatentSpec, module: nn.Module) -> LatentSpec | None:
    """The spec that computes what the module does, or None."""
    sizes = _sizes(form, module)
    numbers = [n for n in finite_numbers(module) if n not in (0.0, 1.0)]
    for complex_tables in (False, True) if "position_embeddings" in form.parameters else (False,):
        original = Subject.made(module, sizes, partial(_call, form.resized(sizes), complex_tables), LATENT)
        arguments = arguments_of(original) if original is not None else None
        if arguments is None:
            continue
        for spec in _readings(form, complex_tables, numbers):
            scaled = replace(spec, arguments=arguments).resized(sizes)
            if original.equals(scaled) and _keeps_the_same(original, scaled):
                return replace(spec, arguments=arguments)
    return None


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
    ways = [name for name, turn in TURNS.items() if turn.complex == complex_tables] if "position_embeddings" in form.parameters else []
    ways += [] if complex_tables else ["none"]
    for q_scale, kv_scale in itertools.product((1.0, *numbers), repeat=2):
        for rope in ways:
            yield replace(form, heads=replace(form.heads, rope=rope, q_scale=q_scale), kv_scale=kv_scale)


def _call(spec: LatentSpec, complex_tables: bool, generator: torch.Generator) -> Call:
    """Tables have columns that have nothing to do with each other, so that it shows which are read."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, sequence = 2, 6
    kwargs = {"hidden_states": made(batch, sequence, spec.hidden), "attention_mask": made(batch, 1, sequence, sequence), "position_ids": torch.arange(6)[None]}
    if "position_embeddings" in spec.parameters:
        tables = made(batch, sequence, spec.heads.rope_dim), made(batch, sequence, spec.heads.rope_dim)
        kwargs["position_embeddings"] = torch.complex(*(t[..., ::2].contiguous() for t in tables)) if complex_tables else tables
    return Call(kwargs=kwargs)


def _keeps_the_same(original: Subject, spec: LatentSpec) -> bool:
    """Whether an empty cache holds the same after a call of the module and of its twin."""
    if "past_key_values" not in spec.parameters:
        return True
    twin = original.twin(spec)
    try:
        theirs, ours = _cached(original, original.module, trial.eager_forward(original.module)), _cached(original, twin, type(twin).forward)
    except Exception:  # a family may ask more of a cache
        return False
    return len(theirs) == len(ours) and all(a.shape == b.shape and _close(a, b) for a, b in zip(theirs, ours, strict=True))


def _cached(subject: Subject, module: nn.Module, forward: Any) -> list[Tensor]:
    """What an empty cache holds after a call."""
    cache = DynamicCache()
    module._moepatch_given = []
    with torch.no_grad(), trial.torch_formulas(module, forward) as forward:
        forward(module.eval(), **{**subject.call.kwargs, "past_key_values": cache})
    return [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= trial.FP32_LIMIT * torch.linalg.vector_norm(a))
