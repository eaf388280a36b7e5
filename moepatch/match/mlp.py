"""Recognises dense MLPs and shared experts: two or three linear layers with an activation between them, found by trying it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..experts.activation import Activation
from ..layers.mlp import MlpSpec
from ..layout.experts import fused_layout
from ..registry import register_matcher
from ..replica import random_fill, replica
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from .experts import left, make_site, takes
from .known import known
from .near import in_the_way, named
from .probe import fingerprint, finite_numbers, misfit, recognise
from .suspects import is_list


@register_matcher("mlp", priority=20)
def match_mlp(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring. Elements of a list of experts are no MLPs of their own."""
    module = found.module
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or any(is_list(scan.of(parent)) for parent, _ in found.parents):
        return None
    reading = _why_no_form(module)
    if reading is None:
        key = ("mlp", fingerprint(module))
        if key not in memo:
            memo[key] = known("mlp", module, _read)
        reading = memo[key]
    if isinstance(reading, str):
        linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        return left(found, "mlp", reading) if 2 <= len(linear) <= 3 and named(found, "mlp") else None
    site = make_site(found, "mlp", reading, reading.parameter_names())
    return site if isinstance(site, Site) else left(found, "mlp", site.reason)


def _why_no_form(module: nn.Module) -> str | None:
    """None for one argument, and no weights or buffers but those of two or three linear layers; else what of that is amiss."""
    linear = _linear_layers(module)
    reason = in_the_way(module) if any(isinstance(child, nn.Linear) for child in module.children()) else None
    if reason is not None:
        return reason
    if len(linear) not in (2, 3):
        return f"it has {len(linear)} projections, and an MLP that is known has two or three"
    held = {id(p) for layer in linear.values() for p in layer.parameters()}
    more = next((name for name, p in module.named_parameters() if id(p) not in held), None)
    more = more or next((name for name, _ in module.named_buffers()), None)
    if more is not None:
        return f"beside its projections it has {more}"
    if not takes(module, 1):
        return f"it is called with ({', '.join(list(inspect.signature(type(module).forward).parameters)[1:])}), not with tokens alone"
    return None


def _linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if type(child) is nn.Linear}


def _read(module: nn.Module) -> MlpSpec | str:
    """The spec that computes what the module does, or why there is none."""
    reason = f"the shapes of its projections are those of no MLP ({_shapes_of(module)})"
    numbers = finite_numbers(module)
    for spec in _shapes(module):
        sizes = _small(spec)
        # It trains, so that what only training does shows.
        small = replica(module, sizes, random_fill(torch.Generator().manual_seed(0))).train()
        scaled = spec.resized(sizes)
        activation = _activation(small, scaled, numbers)
        misfitting = "" if activation is None else misfit(small, "mlp", replace(scaled, activation=activation), {})
        if misfitting is None:
            return replace(spec, activation=activation)
        reason = f"patched it would compute something else: {misfitting}" if misfitting else _odd_between(module)
    return reason


def _shapes_of(module: nn.Module) -> str:
    return ", ".join(f"{name} {list(layer.weight.shape)}" for name, layer in _linear_layers(module).items())


def _odd_between(module: nn.Module) -> str:
    """What is wrong where an activation stands, by the children without weights."""
    bare = {name: child for name, child in module.named_children() if next(child.parameters(), None) is None}
    dropping = next((name for name, child in bare.items() if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0), None)
    if dropping is not None:
        return f"it drops numbers out in training ({dropping}, p={bare[dropping].p})"
    classes = [type(child).__name__ for child in bare.values() if not isinstance(child, nn.modules.dropout._DropoutNd)]
    return f"its activation{f' ({classes[0]})' if len(classes) == 1 else ''} is none that is known"


def _shapes(module: nn.Module) -> Iterator[MlpSpec]:
    """Every way to read the shapes of the layers; the activation is still to be found."""
    layers = _linear_layers(module)
    for *inputs, down in itertools.permutations(layers):
        hidden, intermediate = layers[down].weight.shape
        widths = {tuple(layers[name].weight.shape) for name in inputs}
        biases = {layers[name].bias is not None for name in inputs}
        if len(widths) > 1 or len(biases) > 1:
            continue
        rows, width = widths.pop()
        forms = [("separate", False)] if len(inputs) == 2 else [("none", False)]
        if len(inputs) == 1 and rows == 2 * intermediate:
            forms = list(itertools.product(("concatenated", "interleaved"), (False, True)))
        elif rows != intermediate:
            continue
        for form, up_first in forms if width == hidden else ():
            yield MlpSpec(
                hidden=hidden,
                intermediate=intermediate,
                activation=Activation("own"),
                gate_form=form,
                up_first=up_first,
                inputs=tuple(inputs),
                down=down,
                input_bias=biases == {True},
                down_bias=layers[down].bias is not None,
            )


def _small(spec: MlpSpec) -> dict[int, int]:
    """Sizes of a scale model. Widths that are equal, or one twice the other, stay so."""
    hidden, intermediate = spec.hidden, spec.intermediate
    wide = {intermediate: 12, 2 * intermediate: 24}.get(hidden, 6 if 2 * hidden == intermediate else 16)
    return {2 * intermediate: 24, hidden: wide, intermediate: 12}


def _activation(small: nn.Module, spec: MlpSpec, numbers: list[float]) -> Activation | None:
    """What stands between the projections, seen through weights that pick single numbers.

    The first unit of the intermediate layer has the first number of a token for its gate and the second for its up, and goes out unchanged.
    """
    probe = replica(small, {}, lambda tensor, shape: torch.zeros(shape, dtype=tensor.dtype)).train()
    gated = spec.gate_form != "none"
    with torch.no_grad():
        probe.get_submodule(spec.inputs[0]).weight[0, int(spec.up_first)] = 1
        if gated:
            row = {"separate": 0, "concatenated": spec.intermediate, "interleaved": 1}[spec.gate_form]
            probe.get_submodule(spec.inputs[-1]).weight[row, int(not spec.up_first)] = 1
        probe.get_submodule(spec.down).weight[0, 0] = 1

    def between(pre):
        x = pre.new_zeros(len(pre), spec.hidden)
        x[:, : pre.shape[1]] = pre
        return probe.to(pre.dtype)(x)[:, :1].to(pre.dtype)

    return recognise(between, fused_layout(up="", down="", gated=gated), numbers)
