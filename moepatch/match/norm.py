"""Recognises RMS norms: a module without children, with one vector as weight or none, and a float that is its eps.

What it computes is found by trying: in fp32 the formula, in bf16 where it rounds, on the scale model forward and backward.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import trial
from ..layers.norm import CASTS, GATES, NORM, NormSpec, reference_norm
from ..registry import register_matcher
from ..replica import random_fill, replica
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from .experts import left, make_site
from .known import known
from .near import in_the_way, named
from .probe import fingerprint, finite_numbers, misfit

#: The largest eps that anybody uses.
_LARGEST_EPS = 1e-2
#: How many numbers of a bf16 result may round differently. A norm that rounds somewhere else differs in a quarter or more of them.
_ROUNDING_SLACK = 0.02


@register_matcher("norm", priority=30)
def match_norm(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring."""
    module = found.module
    reason = _why_no_form(module)
    if reason is not None and not _looks_like_norm(found):
        return None
    spec = reason or _reading(module, memo)
    if isinstance(spec, str):
        return left(found, "norm", spec) if _looks_like_norm(found) else None
    if spec.weight is not None:
        return make_site(found, "norm", spec, (spec.weight,))
    near = _nearest_parameter(found, scan)
    if near is None:
        return left(found, "norm", "it has no weight, and nothing around it has one whose dtype it could compute in") if _looks_like_norm(found) else None
    return Site(
        kind="norm",
        fqns=found.fqns,
        class_name=type(module).__name__,
        spec=spec,
        now="own forward",
        dtype=str(near.dtype).removeprefix("torch."),
        device=str(near.device),
    )


def read_norm(module: nn.Module, memo: dict) -> NormSpec | None:
    """The norm that a module computes, or None."""
    reading = None if _why_no_form(module) is not None else _reading(module, memo)
    return reading if isinstance(reading, NormSpec) else None


def _reading(module: nn.Module, memo: dict) -> NormSpec | str:
    """The norm that a module of the form computes, or why it is none that is known."""
    key = ("norm", fingerprint(module))
    if key not in memo:
        memo[key] = known("norm", module, _read)
    return memo[key]


def _looks_like_norm(found: Found) -> bool:
    """Whether it is called a norm and holds vectors, or nothing, as norms do."""
    module = found.module
    return named(found, "norm") and not module._modules and all(p is None or p.ndim == 1 for p in module._parameters.values())


def _why_no_form(module: nn.Module) -> str | None:
    """None for no children, no buffers, at most one parameter and that a vector, and a possible eps; else what of that is amiss."""
    parameters = module._parameters
    if isinstance(module, nn.LayerNorm):
        return "it is a LayerNorm, which subtracts the mean"
    for name, held in (("children", module._modules), ("buffers", module._buffers)):
        if held:
            return f"it has {name} ({', '.join(held)})"
    if len(parameters) > 1:
        return f"it has {len(parameters)} parameters ({', '.join(parameters)}), and an RMS norm has one"
    odd = next((name for name, p in parameters.items() if p is None or p.ndim != 1), None)
    if odd is not None:
        return f"its {odd} is no vector"
    reason = in_the_way(module)
    if reason is not None:
        return reason
    return None if _eps(module) else f"none of its numbers is an eps between 0 and {_LARGEST_EPS}"


def _eps(module: nn.Module) -> list[float]:
    return [number for number in finite_numbers(module) if 0 < number <= _LARGEST_EPS]


def _nearest_parameter(found: Found, scan: Scan) -> nn.Parameter | None:
    """A parameter of the closest holder that has any: a norm without a weight computes in that one's dtype."""
    for parent, _ in found.parents:
        near = next((p for p in parent.parameters() if p.is_floating_point()), None)
        return near if near is not None else _nearest_parameter(scan.of(parent), scan)
    return None


def _read(module: nn.Module) -> NormSpec | str:
    """The spec that computes what the module does, or why there is none."""
    gated = _takes_gate(module)
    if gated is None:
        return f"it is called with ({', '.join(inspect.signature(trial.eager_forward(module)).parameters)}), not with rows and at most a gate"
    formula = next((spec for spec in _formulas(module, gated) if _same_numbers(module, spec)), None)
    if formula is None:
        return "it computes something else than the RMS norms that are known"
    spec = _rounded(module, formula)
    if spec is None:
        return "in bfloat16 it rounds elsewhere than the RMS norms that are known"
    if not _mixes(module, spec):
        return "where its weight and its rows differ in dtype it rounds elsewhere than the RMS norms that are known"
    reason = misfit(module, "norm", spec, _narrow(spec))
    return spec if reason is None else f"patched it would compute something else: {reason}"


def _narrow(spec: NormSpec) -> dict[int, int]:
    """Sizes of a scale model, whose rows may be many; at its own width a norm has been compared already."""
    return {} if spec.group or spec.width <= 64 else {spec.width: 32}


def _takes_gate(module: nn.Module) -> bool | None:
    """Whether its forward takes ``(x, gate)`` and not only ``x``; None if it takes something else."""
    parameters = list(inspect.signature(trial.eager_forward(module)).parameters.values())[1:]
    if len(parameters) not in (1, 2) or any(p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    return len(parameters) == 2


def _formulas(module: nn.Module, gated: bool) -> Iterator[NormSpec]:
    """Every norm that the form of the module allows, before rounding."""
    name, width = next(((name, p.shape[0]) for name, p in module._parameters.items()), (None, 0))
    integers = sorted({v for v in vars(module).values() if type(v) is int and 1 < v < width and width % v == 0})
    groups = [0, *dict.fromkeys(size for v in integers for size in (v, width // v))]
    gates = list(itertools.product(GATES, (True, False))) if gated else [(None, False)]
    offsets = (0,) if name is None else (0, 1)
    for eps, offset, group, (gate, first) in itertools.product(_eps(module), offsets, groups, gates):
        yield NormSpec(width=width, eps=eps, weight=name, cast="after", offset=offset, gate=gate, gate_first=first, group=group)


def _same_numbers(module: nn.Module, spec: NormSpec) -> bool:
    theirs, ours = _both(module, spec, torch.float32)
    return theirs is not None and theirs.shape == ours.shape and theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def _rounded(module: nn.Module, formula: NormSpec) -> NormSpec | None:
    """The formula with the place where the module rounds, told by the numbers of a bf16 result that come out differently."""
    unequal = {}
    for cast in CASTS if formula.weight is not None else CASTS[1:]:  # without a weight there is no before
        spec = replace(formula, cast=cast)
        unequal[spec] = _unequal(*_both(module, spec, torch.bfloat16))
    best = min(unequal, key=unequal.get)
    return best if unequal[best] <= _ROUNDING_SLACK else None


def _mixes(module: nn.Module, spec: NormSpec) -> bool:
    """Whether it also rounds alike where weight and rows differ in dtype, as they do with fp32 weights under autocast."""
    dtypes = (torch.bfloat16, torch.float32)
    return spec.weight is None or all(_unequal(*_both(module, spec, x, w)) <= _ROUNDING_SLACK for x, w in (dtypes, dtypes[::-1]))


def _unequal(theirs: Tensor | None, ours: Tensor) -> float:
    """The share of numbers that differ by more than fp32 rounding; 1 for results of another dtype or none."""
    if theirs is None or theirs.dtype != ours.dtype:
        return 1.0
    return 1 - torch.isclose(theirs, ours, rtol=1e-5, atol=0).float().mean().item()


def _both(module: nn.Module, spec: NormSpec, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> tuple[Tensor | None, Tensor | None]:
    """What the family's code and the reference make of the same rows, with the same random weight; None if it cannot be run."""
    generator = torch.Generator().manual_seed(0)
    copy = replica(module, {}, random_fill(generator, weight_dtype or dtype))
    call = NORM.trial(spec, dtype, torch.device("cpu"), generator)
    weight = None if spec.weight is None else copy._parameters[spec.weight]
    with torch.no_grad():
        try:
            theirs = trial.eager_forward(copy)(copy, *call.args)
        except Exception:  # whatever it is, it is not a norm
            return None, None
        if not isinstance(theirs, Tensor):
            return None, None
        return theirs, reference_norm(call.args[0], weight, spec, *call.args[1:])
