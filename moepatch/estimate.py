"""How large a model is: its parameters, those in experts, those that work on one token, and bytes. Reads shapes only, so meta will do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .experts.spec import ExpertsSpec
from .kinds import KINDS
from .site import Refusal, Site

if TYPE_CHECKING:
    from .planning import Pattern, Plan

#: What configurations call the number of experts per token (K).
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "moe_router_topk",
)


@dataclass(frozen=True)
class ExpertGroup:
    """Modules of experts that are equal but for their names.

    Attributes:
        class_name: their class.
        count: how many modules.
        layout: where their weights lie, in words.
        sizes: `describe()` of what they compute; empty for a group that was refused.
        num_experts: experts that a router chooses from in one module (E, identity experts included).
        top_k: how many it chooses (K): one value, several if layers differ, empty if the configuration does not say.
        params: weights of all experts of all modules of the group.
        served: False for modules that were refused.
        kept_per_token: bytes that the backward pass of one module needs of a token, beside the token itself; None where they are not known.
    """

    class_name: str
    count: int
    layout: str
    sizes: str
    num_experts: int
    top_k: tuple[int, ...]
    params: int
    served: bool
    kept_per_token: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "class": self.class_name,
            "count": self.count,
            "layout": self.layout,
            "num_experts": self.num_experts,
            "top_k": list(self.top_k),
            "params": self.params,
            "served": self.served,
            "kept_per_token": self.kept_per_token,
        }


@dataclass(frozen=True)
class Estimate:
    """What can be said about a model from its shapes and its configuration.

    Attributes:
        total_params: all parameters; shared and tied ones once.
        expert_params: those of routed experts.
        active_params: those that work on one token, ``total - experts * (1 - K/E)``; None where K is unknown.
        bytes_by_dtype: bytes of all parameters, by dtype, the largest first.
        layers: length of the lists of layers that hold experts (of the longest list if none does); None if there is no list.
        groups: the experts.
    """

    total_params: int
    expert_params: int
    active_params: int | None
    bytes_by_dtype: dict[str, int]
    layers: int | None
    groups: tuple[ExpertGroup, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.bytes_by_dtype.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an unknown number is null."""
        return {
            "total_params": self.total_params,
            "expert_params": self.expert_params,
            "active_params": self.active_params,
            "bytes": self.total_bytes,
            "bytes_by_dtype": self.bytes_by_dtype,
            "layers": self.layers,
            "experts": [group.to_dict() for group in self.groups],
        }


def estimate(model: nn.Module, plan: Plan) -> Estimate:
    """Sizes of a model.

    Args:
        model: on any device, patched or not.
        plan: of this model; says where the experts are.
    """
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    sizes = Counter()
    for p in parameters:
        sizes[str(p.dtype).removeprefix("torch.")] += p.numel() * p.element_size()
    # A kind of somebody else's need not say what its experts are: then they are not told apart from the rest of the model.
    found = [_of_pattern(model, p) if KINDS[p.site.kind].widths is not None else (None, None) for p in plan.mixture] + list(_of_refusals(model, plan.refusals))
    active = [active for _, active in found]
    routed = sum(group.params for group, _ in found if group is not None)
    return Estimate(
        total_params=total,
        expert_params=routed,
        active_params=None if None in active else total - routed + sum(active),
        bytes_by_dtype=dict(sizes.most_common()),
        layers=_layers(model, [fqn for p in plan.mixture for fqn in p.fqns] + [r.fqn for r in plan.refusals]),
        groups=tuple(group for group, _ in found if group is not None),
    )


def top_k(config: object) -> int | tuple[int, ...] | None:
    """The number of experts per token in a configuration or in one nested below it; a tuple if it is given layer by layer.

    None if no attribute is called that way, or if nested configurations disagree.
    """
    for name in TOP_K_NAMES:
        value = _entry(config, name)
        if type(value) is int:
            return value
        if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            return tuple(value)
    found = {top_k(nested) for nested in _nested(config)} - {None}
    return found.pop() if len(found) == 1 else None


def _of_pattern(model: nn.Module, pattern: Pattern) -> tuple[ExpertGroup, int | None]:
    """The group, and how many of its parameters work on one token (None: unknown)."""
    spec = KINDS[pattern.site.kind].computes(pattern.site.spec)
    choices = spec.num_experts + vars(spec).get("identity_experts", 0)
    params = [_expert_params(site) for site in pattern.sites]
    chosen = [site_top_k(model, site.fqn, site.spec) for site in pattern.sites]
    label = pattern.site.spec.to_dict()["layout"]
    group = _group(pattern.site.class_name, label, pattern.site.spec.describe(), choices, chosen, params, pattern.backend is not None)
    if isinstance(spec, ExpertsSpec) and len(group.top_k) == 1:
        group = replace(group, kept_per_token=spec.kept_per_token(group.top_k[0], getattr(torch, pattern.site.dtype).itemsize))
    return group, _active(params, chosen, choices)


def _of_refusals(model: nn.Module, refusals: tuple[Refusal, ...]) -> Iterator[tuple[ExpertGroup | None, int | None]]:
    """Refused experts, where lists of modules or stacked weights show how many there are; (None, None) where nothing does."""
    gathered: dict[tuple, list[tuple[int, int | None]]] = {}
    for refusal in refusals:
        module = model.get_submodule(refusal.fqn)
        counted = count_experts(module)
        if counted is None:
            yield None, None
            continue
        label, experts, params = counted
        gathered.setdefault((refusal.class_name, label, experts), []).append((params, site_top_k(model, refusal.fqn, None)))
    for (name, label, experts), rows in gathered.items():
        params, chosen = [p for p, _ in rows], [k for _, k in rows]
        yield _group(name, label, "", experts, chosen, params, False), _active(params, chosen, experts)


def _group(name, layout, sizes, experts, chosen, params, served) -> ExpertGroup:
    known = () if None in chosen else tuple(sorted(set(chosen)))
    return ExpertGroup(name, len(params), layout, sizes, experts, known, sum(params), served)


def _active(params: list[int], chosen: list[int | None], experts: int) -> int | None:
    if None in chosen:
        return None
    return sum(round(p * min(k, experts) / experts) for p, k in zip(params, chosen, strict=True))


def _expert_params(site: Site) -> int:
    part = KINDS[site.kind].computes(site.spec)
    return part.num_experts * part.params_per_expert


def count_experts(module: nn.Module) -> tuple[str, int, int] | None:
    """Layout in words, number of experts, and their parameters, of a module that no matcher reads."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        child = type(next(iter(module.children()))).__name__
        return f"separate modules {child}", len(module), sum(p.numel() for p in module.parameters())
    stacks: list[Tensor] = [p for p in module.parameters() if p.ndim >= 3]
    experts = {p.shape[0] for p in stacks}
    if len(experts) != 1:
        return None
    return "not recognised", experts.pop(), sum(p.numel() for p in stacks)


def site_top_k(model: nn.Module, fqn: str, spec: object) -> int | None:
    """K at one module: from its own spec, else from the configuration of the nearest module around it that has one."""
    if hasattr(spec, "top_k"):
        return spec.top_k
    path = fqn.split(".")
    for depth in range(len(path), -1, -1):
        config = vars(model.get_submodule(".".join(path[:depth]))).get("config")
        value = top_k(config)
        if isinstance(value, int):
            return value
        if value is not None:
            return _of_layer(value, fqn)
    return None


def _of_layer(values: tuple[int, ...], fqn: str) -> int | None:
    """The entry of a list that has one value per layer; a layer's number is the first number in a module's name."""
    if len(set(values)) == 1:
        return values[0]
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", fqn)
    return values[int(number[1])] if number and int(number[1]) < len(values) else None


def _entry(config: object, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    # A configuration maps names that are not its own (attribute_map), so neither vars() nor its fields are the whole truth.
    return getattr(config, name) if isinstance(config, PreTrainedConfig) and hasattr(config, name) else None


def _nested(config: object) -> list[object]:
    values = config.values() if isinstance(config, Mapping) else vars(config).values() if isinstance(config, PreTrainedConfig) else ()
    return [value for value in values if isinstance(value, (Mapping, PreTrainedConfig))]


def _layers(model: nn.Module, fqns: list[str]) -> int | None:
    lists = {}
    for fqn in fqns:
        path = fqn.split(".")
        above = (".".join(path[:depth]) for depth in range(len(path)))
        top = next((name for name in above if isinstance(model.get_submodule(name), nn.ModuleList)), None)
        if top is not None:
            lists[top] = len(model.get_submodule(top))
    every = [len(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return sum(lists.values()) or max(every, default=None)
