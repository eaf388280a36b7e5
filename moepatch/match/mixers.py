"""Recognises state-space and linear-attention mixers: by parameters whose shapes explain each other, then by trying a scale model.

The parameter names are those of the papers' own code, which every family kept. Everything else is read from shapes and from numbers on the
module, and settled by what the module computes.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import trial
from ..layers.mixers.delta import PROJECTIONS, DeltaSpec
from ..layers.mixers.selective import SelectiveSpec
from ..kinds import KINDS
from ..layers.mixers.ssd import SSDSpec
from ..layers.roles import Roles
from ..quantized import kept_inside
from ..registry import register_matcher
from ..replica import random_fill, replica
from ..scan import Found, Scan
from ..site import Left, Site
from .attention_calls import same
from .experts import left, make_site
from .known import known
from .layer_index import is_handed_on, looks_once, remembered
from .probe import misfit
from .roles import Recording, StandIn, attempt, base_roles, updates_of

#: Sequences and tokens that a scale model is called with.
_BATCH, _SEQUENCE = 2, 6


@register_matcher("ssd_mixer", priority=25, around=True)
def match_ssd(found: Found, scan: Scan, memo: dict) -> Site | Left | None:
    """A Mamba-2 mixer."""
    return _match(found, memo, "ssd_mixer", ("mamba_ssm", "causal_conv1d"), _ssd_specs, _small_ssd)


@register_matcher("delta_mixer", priority=25, around=True)
def match_delta(found: Found, scan: Scan, memo: dict) -> Site | Left | None:
    """A gated delta-rule mixer."""
    return _match(found, memo, "delta_mixer", ("fla", "causal_conv1d"), _delta_specs, _small_delta)


@register_matcher("selective_mixer", priority=25, around=True)
def match_selective(found: Found, scan: Scan, memo: dict) -> Site | Left | None:
    """A Mamba-1 mixer."""
    return _match(found, memo, "selective_mixer", ("mamba_ssm", "causal_conv1d"), _selective_specs, _small_selective)


def _match(
    found: Found, memo: dict, kind: str, libraries: tuple[str, ...], candidates: Callable[[nn.Module], Iterator[Any]], small: Callable[[Any], dict[int, int]]
) -> Site | Left | None:
    module = found.module
    first = next(candidates(module), None)
    # A family that has its own fast path already is left alone.
    if first is None or all(importlib.util.find_spec(library) for library in libraries):
        return None
    if (quantized := kept_inside(module)) is not None:
        return left(found, kind, quantized)
    reading = remembered(memo, (kind,), module, lambda: known(kind, module, _read, kind, candidates(module), small))
    if isinstance(reading, str):
        return left(found, kind, reading)
    site = make_site(found, kind, reading, ("conv1d.weight", "out_proj.weight"))
    return site if isinstance(site, Site) else left(found, kind, site.reason)


class _Cache(Recording):
    """An empty cache of states that writes down what it is given."""

    def has_previous_state(self, *args, **kwargs):
        return False

    def is_recording_past(self, *args, **kwargs):
        return False

    def get_conv_state(self, *args, **kwargs):
        return None

    def get_recurrent_state(self, *args, **kwargs):
        return None

    def update_conv_state(self, states, *args, **kwargs):
        self.note("update_conv_state", (states,), args, kwargs)
        return states

    def update_recurrent_state(self, states, *args, **kwargs):
        self.note("update_recurrent_state", (states,), args, kwargs)
        return states


def _read(module: nn.Module, kind: str, specs: Iterator[Any], small: Callable[[Any], dict[int, int]]) -> tuple[Any, bool]:
    """The spec that computes what a mixer does, or why there is none; and whether that holds for all layers."""
    reasons = []
    for spec in specs:
        roles = _roles(module, spec.resized(small(spec)), small(spec))
        if isinstance(roles, str):
            reasons.append(roles)
            continue
        spec = replace(spec, roles=roles)
        reason = misfit(module, kind, spec, small(spec)) or _other_misfit(module, kind, spec, small(spec))
        if reason is None:
            return spec, _hands_on_index(module, spec, small(spec))
        reasons.append(f"it does not compute what its parameters suggest: {reason}")
    return reasons[0], looks_once(module)


def _hands_on_index(module: nn.Module, spec: Any, sizes: dict[int, int]) -> bool:
    """See `layer_index`."""
    generator = torch.Generator().manual_seed(0)
    model = replica(module, sizes, random_fill(generator))
    x = torch.randn(_BATCH, _SEQUENCE, spec.resized(sizes).hidden, generator=generator, dtype=torch.float32)
    masks = [{}] if spec.roles.mask is None else [{}, {spec.roles.mask: _mask()}]
    with torch.no_grad(), trial.torch_formulas(model, trial.eager_forward(model)) as forward:

        def run() -> None:
            for training, mask, cached in itertools.product((True, False), masks, (True, False)):
                forward(model.train(training), x, **mask, **({spec.roles.cache: _Cache()} if cached else {}))

        return is_handed_on(model, run)


def _roles(module: nn.Module, spec: Any, sizes: dict[int, int]) -> Roles | str:
    """The parts of the arguments of a mixer's forward, whose scale model `spec` describes, or why one has none."""
    generator = torch.Generator().manual_seed(0)
    model = replica(module, sizes, random_fill(generator))

    def tokens() -> Tensor:
        return torch.randn(_BATCH, _SEQUENCE, spec.hidden, generator=generator, dtype=torch.float32)

    def run(values: dict[str, Any]) -> None:
        with trial.torch_formulas(model, trial.eager_forward(model)) as forward:
            forward(model.eval(), **values)

    found = attempt(model, tokens, lambda name: StandIn(name, cache=_Cache()), [_mask], run)
    if isinstance(found, str):
        return found
    roles = base_roles(model, found.tokens)
    if isinstance(roles, str):
        return roles
    if roles.names[0] != roles.tokens:
        return f"its first argument, `{roles.names[0]}`, is not its tokens"
    masks = [name for name, value in found.values.items() if isinstance(value, Tensor) and name != roles.tokens]
    caches = found.caches()
    if len(masks) > 1 or len(caches) != 1:
        return f"the argument `{masks[1]}` decides what the module does" if len(masks) > 1 else f"it updates {len(caches)} caches"
    updates = updates_of(model, found, run, None)
    if isinstance(updates, str):
        return updates
    methods = [method for method, _ in updates]
    if methods != ["update_conv_state", "update_recurrent_state"]:
        return f"it keeps its states by {', '.join(methods)}"
    return replace(roles, mask=masks[0] if masks else None, cache=caches[0].moepatch_name, updates=updates)


def _masks() -> dict[str, Tensor]:
    """Padding before, behind and between tokens, of one sequence or both, none at all, and nothing but padding; in words."""
    ones = torch.ones(_BATCH, _SEQUENCE, dtype=torch.float32)
    places = torch.arange(_SEQUENCE)
    masks = {
        "with padding before one sequence": _mask(),
        "with padding behind one sequence": ones * torch.stack([places < _SEQUENCE, places < 4]),
        "with padding before both sequences": ones * torch.stack([places >= 1, places >= 3]),
        "with padding between tokens": ones * torch.stack([places % 2 == 0, places != 3]),
        "with a mask that hides nothing": ones,
        "with a sequence of nothing but padding": ones * torch.tensor([[0.0], [1.0]], dtype=ones.dtype),
    }
    return masks | {"with a mask of whole numbers": masks["with padding behind one sequence"].long()}


def _mask() -> Tensor:
    """One sequence has padding before it."""
    mask = torch.ones(_BATCH, _SEQUENCE, dtype=torch.float32)
    mask[0, :2] = 0
    return mask


def _other_misfit(module: nn.Module, kind: str, spec: Any, sizes: dict[int, int]) -> str | None:
    """None if a patched twin treats a mask as `module` does, and gives a cache the same; else how they differ."""
    generator = torch.Generator().manual_seed(0)
    original = replica(module, sizes, random_fill(generator)).eval()
    twin = replica(original, {}, lambda tensor, shape: tensor.detach().clone())
    trial.inject(twin, KINDS[kind].injections(spec.resized(sizes), "reference", None))
    x = torch.randn(_BATCH, _SEQUENCE, spec.resized(sizes).hidden, generator=generator, dtype=torch.float32)
    masks = {"": {}} if spec.roles.mask is None else {what: {spec.roles.mask: mask} for what, mask in _masks().items()}
    records = []
    try:
        for copy, forward in ((original, trial.eager_forward(original)), (twin, type(twin).forward)):
            with torch.no_grad(), trial.torch_formulas(copy, forward) as forward:
                records.append([])
                for (what, masked), training in itertools.product(masks.items(), (False, True)):
                    copy.train(training)
                    cache, where = _Cache(), f"{what} in {'training' if training else 'evaluation'}".lstrip()
                    records[-1].append((where, forward(copy, x, **masked)))
                    records[-1].append((f"{where} with a cache", forward(copy, x, **masked, **{spec.roles.cache: cache})))
                    records[-1].append((f"in what it gives the cache {where}", cache.given))
    except Exception as error:  # a family may ask more of a cache
        return f"a scale model of it cannot be run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return next((f"it differs {what}" for (what, a), (_, b) in zip(*records, strict=True) if not same(a, b)), None)


def _is_mixer(module: nn.Module, own: set[str], children: set[str]) -> bool:
    """Exactly these parameters and children with parameters, and a causal convolution of each channel."""
    if set(module._parameters) != own or {name for name, child in module.named_children() if next(child.parameters(), None) is not None} != children:
        return False
    conv = module._modules["conv1d"]
    return (
        isinstance(conv, nn.Conv1d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding == (conv.kernel_size[0] - 1,)
        and all(type(child) is nn.Linear for name, child in module.named_children() if name.endswith("_proj"))
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
