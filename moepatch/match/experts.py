"""Recognises experts modules: ``forward(hidden [T, H], ids [T, K], weights [T, K]) -> [T, H]`` over weights in few large parameters.

Modules with transformers' flags (``has_gate``, ``is_transposed``, …) say how their weights lie; for all others every layout that their shapes
allow is tried. Either way a scale model has to show that the reading computes the same function, so no family is known by name.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..experts.activation import OWN, Activation
from ..experts.spec import ExpertsSpec
from ..kinds import KINDS
from ..layout.experts import ExpertsLayout, flat_layout, fused_layout
from ..quantized import QUANTIZED_HINT, kept, kept_inside
from ..registry import register_matcher
from ..replica import replica, size_map
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from .known import known
from .near import class_name
from .probe import candidates, fingerprint, finite_numbers, is_shape, misfit, misfit_of_all, recognise
from .witness import Objection

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@register_matcher("experts", priority=100)
def match_experts(found: Found, scan: Scan, memo: dict) -> Site | Refusal | None:
    """See the module's docstring."""
    module = found.module
    if not takes(module, 3) or not _holds_experts(module):
        return None
    if (words := kept(module)) is not None:
        return quantized(found, f"its weights are {words}, which no backend computes with")
    key = ("experts", fingerprint(module))
    if key not in memo:
        memo[key] = known("experts", module, _read)
    reading = memo[key]
    if reading is None:
        return None
    if isinstance(reading, str):
        return refusal(found, reading)
    return make_site(found, "experts", reading, reading.layout.parameter_names())


def takes(module: nn.Module, count: int) -> bool:
    """Whether the innermost forward of a module takes `count` positional arguments and nothing else."""
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == count and all(p.kind in positional for p in parameters)


def refusal(found: Found, reason: str) -> Refusal:
    """A refusal of a module that was tried and did not fit."""
    hint = "If its experts are ordinary ones, register a matcher for it (moepatch.register_matcher); the rest of the model is patched."
    return Refusal(fqns=found.fqns, class_name=type(found.module).__name__, reason=reason, hint=hint)


def quantized(found: Found, reason: str) -> Refusal:
    """A refusal of experts that keep their own code because only that can compute with their weights."""
    return Refusal(fqns=found.fqns, class_name=type(found.module).__name__, reason=reason, hint=QUANTIZED_HINT)


def left(found: Found, kind: str, reason: str) -> Left:
    """A module that is nearly of a kind."""
    return Left(kind=kind, fqns=found.fqns, class_name=class_name(found.module), reason=reason)


def make_site(found: Found, kind: str, spec, parameter_names: tuple[str, ...]) -> Site | Refusal:
    """The site of a module whose reading is settled, unless its weights cannot be computed with."""
    module = found.module
    parameters = {name: module.get_parameter(name) for name in parameter_names}
    owners = {name.rpartition(".")[0] for name in parameter_names} if KINDS[kind].only_itself else None
    reason = kept_inside(module, owners)
    if reason is not None:
        return quantized(found, reason)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters.values()}
    if len(dtypes) > 1:
        first: dict[torch.dtype, str] = {}
        for name, p in parameters.items():
            first.setdefault(p.dtype, name)
        listed = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for dtype, name in first.items())
        return refusal(found, f"its weights have mixed dtypes ({listed})")
    return Site(
        kind=kind,
        fqns=found.fqns,
        class_name=type(module).__name__,
        spec=spec,
        now=implementation(module) or "own forward",
        dtype=dtypes.pop(),
        device=str(next(iter(parameters.values())).device),
    )


def implementation(module: nn.Module) -> str | None:
    """What transformers' switch (``set_experts_implementation``) says for a module that has it, else None."""
    return module.config._experts_implementation if all(flag in vars(module) for flag in _FLAGS) else None


def _holds_experts(module: nn.Module) -> bool:
    """Its own parameters have an axis for experts, or it consists of three matrices of one shape."""
    if sum(p.ndim == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False)) >= 2:
        return True
    shapes = [tuple(p.shape) for p in module.parameters()]
    return len(shapes) == 3 and len(set(shapes)) == 1 and len(shapes[0]) == 2


def _read(module: nn.Module) -> ExpertsSpec | str | None:
    """The spec that computes what the module does, or why there is none, or None if there was nothing to try."""
    specs = list(_flagged(module) if all(flag in vars(module) for flag in _FLAGS) else guessed(module))
    misfits = []
    for spec in specs:
        unscaled = spec.identity_experts > 0
        sizes = {} if unscaled else size_map(num_experts=spec.num_experts, hidden=spec.hidden, intermediate=spec.intermediate)
        for reading in (spec, replace(spec, by_sequence=True)):
            reason = misfit(module, "experts", reading, sizes) or _of_all(module, reading, sizes)
            if reason is None:
                return reading
            misfits.append((not isinstance(reason, Objection), len(misfits), f"as {spec.layout.label}, {spec.activation}: {reason}"))
            if not is_shape(reason):
                break
    if not misfits:
        shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in module.named_parameters())
        return f"no layout of experts explains its parameters ({shapes})"
    more = f" (and {len(misfits) - 1} more readings)" if len(misfits) > 1 else ""
    # The reading that computes the same of ordinary numbers has most to say.
    return f"it does not compute what its parameters suggest: {min(misfits)[-1]}{more}"


def _of_all(module: nn.Module, spec: ExpertsSpec, sizes: dict[int, int]) -> str | None:
    """What is different with as many experts as there are, each of them narrow; a scale model has fewer."""
    whole = size_map(num_experts=spec.num_experts, hidden=spec.hidden, intermediate=spec.intermediate, experts=spec.num_experts)
    return misfit_of_all(module, "experts", spec, whole) if whole and sizes and whole != sizes else None


def _flagged(module: nn.Module) -> Iterator[ExpertsSpec]:
    """The one reading that transformers' flags allow."""
    flags = vars(module)
    gated, transposed = flags["has_gate"], flags["is_transposed"]
    layout = fused_layout(
        up="gate_up_proj" if gated else "up_proj",
        down="down_proj",
        gated=gated,
        transposed=transposed,
        interleaved=gated and not flags["is_concatenated"],
        bias="{}_bias".format if flags["has_bias"] else None,
    )
    post_norm = "post_expert_norm" if flags.get("has_post_expert_norm", False) else None
    if any(name not in module._parameters for name in layout.parameter_names()):
        return
    experts, *matrix = module.down_proj.shape
    hidden, intermediate = matrix[::-1] if transposed else matrix
    bare = _bare(module)
    activation = recognise(bare._apply_gate if gated else bare.act_fn, layout, finite_numbers(module)) or Activation(OWN)
    yield ExpertsSpec(
        num_experts=experts, hidden=hidden, intermediate=intermediate, layout=layout, activation=activation, post_norm=post_norm
    )


def _bare(module: nn.Module) -> nn.Module:
    """The module without the hooks on it and on its activation, which a trial is not for."""
    return replica(module, {}, lambda tensor, shape: tensor.detach())


def guessed(module: nn.Module) -> Iterator[ExpertsSpec]:
    """Every reading that the shapes of a module without flags allow."""
    for experts, hidden, intermediate, identity, layout in _shapes(module):
        for activation in _activations(module, layout):
            yield ExpertsSpec(
                num_experts=experts,
                hidden=hidden,
                intermediate=intermediate,
                layout=layout,
                activation=activation,
                identity_experts=identity,
            )


def _activations(module: nn.Module, layout: ExpertsLayout) -> Iterator[Activation]:
    if "_apply_gate" in dir(type(module)) and layout.gate_form != "none":
        yield recognise(_bare(module)._apply_gate, layout, finite_numbers(module)) or Activation(OWN)
    else:
        yield from candidates(layout.gate_form != "none", finite_numbers(module))


def _shapes(module: nn.Module) -> Iterator[tuple[int, int, int, int, ExpertsLayout]]:
    """E, H, I, Z and layout for every way to read the shapes of the parameters."""
    named = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if len(named) == 2 and all(len(shape) == 3 for shape in named.values()):
        yield from _fused_shapes(named)
    if len(named) == 3 and all(len(shape) == 2 for shape in named.values()):
        rows, hidden = next(iter(named.values()))
        counts = sorted({v for v in vars(module).values() if type(v) is int and v > 1 and rows % v == 0 and v != rows})
        for experts, (gate, up, down) in itertools.product(counts, itertools.permutations(named)):
            yield experts, hidden, rows // experts, 0, flat_layout(gate=gate, up=up, down=down, num_experts=experts)


def _fused_shapes(named: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, int, int, int, ExpertsLayout]]:
    for (up, (up_experts, *up_matrix)), (down, (experts, *down_matrix)) in itertools.permutations(named.items()):
        if up_experts < experts:
            continue
        for transposed, gated in itertools.product((False, True), (True, False)):
            rows, width = up_matrix[::-1] if transposed else up_matrix
            hidden, intermediate = down_matrix[::-1] if transposed else down_matrix
            if width != hidden or rows != intermediate * (2 if gated else 1):
                continue
            for interleaved in (False, True) if gated else (False,):
                layout = fused_layout(up=up, down=down, gated=gated, transposed=transposed, interleaved=interleaved)
                yield experts, hidden, intermediate, up_experts - experts, layout
