"""Recognises state-space and linear-attention mixers: by parameters whose shapes explain each other, then by trying a scale model.

The parameter names are those of the papers' own code, which every family kept. Everything else is read from shapes and from numbers on the
module, and settled by what the module computes.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from .. import trial
from ..layers.mixers.delta import PROJECTIONS, DeltaSpec
from ..layers.mixers.selective import SelectiveSpec
from ..layers.mixers.ssd import SSDSpec
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Site
from .experts import make_site
from .probe import fingerprint, misfit

#: What a mixer is called with besides hidden states.
_ARGUMENTS = ("cache_params", "attention_mask")


@register_matcher("ssd_mixer", priority=25, around=True)
def match_ssd(found: Found, scan: Scan, memo: dict) -> Site | None:
    """A Mamba-2 mixer."""
    return _match(found, memo, "ssd_mixer", ("mamba_ssm", "causal_conv1d"), _ssd_specs, _small_ssd)


@register_matcher("delta_mixer", priority=25, around=True)
def match_delta(found: Found, scan: Scan, memo: dict) -> Site | None:
    """A gated delta-rule mixer."""
    return _match(found, memo, "delta_mixer", ("fla", "causal_conv1d"), _delta_specs, _small_delta)


@register_matcher("selective_mixer", priority=25, around=True)
def match_selective(found: Found, scan: Scan, memo: dict) -> Site | None:
    """A Mamba-1 mixer."""
    return _match(found, memo, "selective_mixer", ("mamba_ssm", "causal_conv1d"), _selective_specs, _small_selective)


def _match(
    found: Found, memo: dict, kind: str, libraries: tuple[str, ...], candidates: Callable[[nn.Module], Iterator[Any]], small: Callable[[Any], dict[int, int]]
) -> Site | None:
    module = found.module
    first = next(candidates(module), None)
    # A family that has its own fast path already is left alone.
    if first is None or all(importlib.util.find_spec(library) for library in libraries):
        return None
    key = (kind, fingerprint(module))
    if key not in memo:
        memo[key] = next((spec for spec in candidates(module) if misfit(module, kind, spec, small(spec)) is None), None)
    site = None if memo[key] is None else make_site(found, kind, memo[key], ("conv1d.weight", "out_proj.weight"))
    return site if isinstance(site, Site) else None


def _is_mixer(module: nn.Module, own: set[str], children: set[str]) -> bool:
    """Exactly these parameters and children with parameters, a causal convolution of each channel, and the arguments of a mixer."""
    if set(module._parameters) != own or {name for name, child in module.named_children() if next(child.parameters(), None) is not None} != children:
        return False
    conv, arguments = module._modules["conv1d"], inspect.signature(trial.eager_forward(module)).parameters
    return (
        isinstance(conv, nn.Conv1d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding == (conv.kernel_size[0] - 1,)
        and all(type(child) is nn.Linear for name, child in module.named_children() if name.endswith("_proj"))
        and all(name in arguments for name in _ARGUMENTS)
        and type(vars(module).get("layer_idx")) is int
    )


def _integers(module: nn.Module) -> set[int]:
    return {value for value in vars(module).values() if type(value) is int and value > 0}


def _limits(module: nn.Module) -> list[tuple[float, float]]:
    """A pair of numbers on the module is what it clamps step sizes to; without one it does not."""
    pairs = [v for v in vars(module).values() if type(v) in (tuple, list) and len(v) == 2 and all(type(n) in (int, float) for n in v)]
    return [(float(low), float(high)) for low, high in pairs if low < high] or [(0.0, float("inf"))]


class _Heads(NamedTuple):
    """A mixer's heads: `count` of `width`, and two rows of `shared` numbers (B and C, or queries and keys) for each of the `groups` of heads."""

    hidden: int
    count: int
    width: int
    groups: int
    shared: int
    taps: int


def _heads(module: nn.Module) -> Iterator[_Heads]:
    """Every division of the convolution's channels into heads and what they share; both sizes of a group are numbers on the module."""
    if module.A_log.ndim != 1:
        return
    (count,) = module.A_log.shape
    hidden, inner = module.out_proj.weight.shape
    channels, _, taps = module.conv1d.weight.shape
    if inner % count or channels <= inner or (channels - inner) % 2:
        return
    numbers = _integers(module)
    for groups in sorted(numbers):
        shared, rest = divmod((channels - inner) // 2, groups)
        if rest == 0 and count % groups == 0 and shared in numbers:
            yield _Heads(hidden, count, inner // count, groups, shared, taps)


def _ssd_specs(module: nn.Module) -> Iterator[SSDSpec]:
    """Every Mamba-2 mixer that the shapes and numbers of a module allow."""
    if not _is_mixer(module, {"A_log", "D", "dt_bias"}, {"conv1d", "in_proj", "norm", "out_proj"}):
        return
    for h, limits in itertools.product(_heads(module), _limits(module)):
        spec = SSDSpec(hidden=h.hidden, heads=h.count, head_dim=h.width, groups=h.groups, state=h.shared, taps=h.taps, limits=limits)
        if tuple(module.in_proj.weight.shape) == (spec.projected, spec.hidden):
            yield spec


def _small_ssd(spec: SSDSpec) -> dict[int, int]:
    """Sizes of a scale model: few narrow heads."""

    def widths(s: SSDSpec) -> list[int]:
        return [s.inner, s.channels, s.projected, s.groups * s.state, s.inner // s.groups]

    sizes = {"heads": spec.heads, "head_dim": spec.head_dim, "state": spec.state}
    base = _shrunk(sizes, {"heads": max(4, 2 * spec.groups), "head_dim": 16, "state": 12})
    return _sizes(spec, base, widths)


def _delta_specs(module: nn.Module) -> Iterator[DeltaSpec]:
    """Every gated delta-rule mixer that the shapes and numbers of a module allow."""
    layout = next((name for name, inputs in PROJECTIONS.items() if _is_mixer(module, {"A_log", "dt_bias"}, {"conv1d", "norm", "out_proj", *inputs})), None)
    if layout is None:
        return
    for h in _heads(module):
        heads = {"key_heads": h.groups, "value_heads": h.count, "key_dim": h.shared, "value_dim": h.width}
        spec = DeltaSpec(hidden=h.hidden, **heads, taps=h.taps, layout=layout)
        if all(tuple(module.get_submodule(name).weight.shape) == (width, spec.hidden) for name, width in spec.projections().items()):
            yield spec


def _small_delta(spec: DeltaSpec) -> dict[int, int]:
    """Sizes of a scale model: few narrow heads."""

    def widths(s: DeltaSpec) -> list[int]:
        return [s.keys, s.values, s.channels, *s.projections().values()]

    per_key = spec.value_heads // spec.key_heads
    heads = {"key_heads": 2, "value_heads": 2 * per_key} if spec.key_heads > 1 else {"key_heads": 1, "value_heads": per_key}
    sizes = {name: getattr(spec, name) for name in ("key_heads", "value_heads", "key_dim", "value_dim")}
    return _sizes(spec, _shrunk(sizes, {**heads, "key_dim": 12, "value_dim": 16}), widths)


def _selective_specs(module: nn.Module) -> Iterator[SelectiveSpec]:
    """Every Mamba-1 mixer that the shapes and numbers of a module allow."""
    linear = {"conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"}
    norms = [name for name, child in module.named_children() if name not in linear and next(child.parameters(), None) is not None]
    if len(norms) not in (0, 3) or not _is_mixer(module, {"A_log", "D"}, linear | set(norms)) or module.A_log.ndim != 2:
        return
    inner, state = module.A_log.shape
    hidden, rank = module.out_proj.weight.shape[0], module.dt_proj.weight.shape[1]
    wanted = {"in_proj": (2 * inner, hidden), "x_proj": (rank + 2 * state, inner), "dt_proj": (inner, rank), "out_proj": (hidden, inner)}
    if all(tuple(module.get_submodule(name).weight.shape) == shape for name, shape in wanted.items()):
        # Three norms are in the order of what they normalise, or else the scale model shows it.
        for order in itertools.permutations(norms) if norms else [None]:
            yield SelectiveSpec(hidden=hidden, inner=inner, state=state, rank=rank, taps=module.conv1d.weight.shape[2], norms=order)


def _small_selective(spec: SelectiveSpec) -> dict[int, int]:
    """Sizes of a scale model: few channels."""
    sizes = {name: getattr(spec, name) for name in ("inner", "state", "rank")}
    return _sizes(spec, _shrunk(sizes, {"inner": 32, "state": 8, "rank": 12}), lambda s: [2 * s.inner, s.rank + 2 * s.state])


def _shrunk(sizes: dict[str, int], wanted: dict[str, int]) -> dict[int, int]:
    """The smaller sizes by value: the first name that has a value decides for all that share it."""
    small: dict[int, int] = {}
    for name, size in sizes.items():
        small.setdefault(size, min(size, wanted[name]))
    return small


def _sizes(spec: Any, base: dict[int, int], widths: Callable[[Any], list[int]]) -> dict[int, int]:
    """`base` with the widths that follow from it and a small hidden size; empty (the module's own sizes) if a size has two meanings."""
    small = spec.resized(base)
    pairs = [*base.items(), *zip(widths(spec), widths(small), strict=True)]
    found = dict(pairs)
    found.setdefault(spec.hidden, min(spec.hidden, 24))
    return found if all(found[old] == new for old, new in pairs) else {}
