"""What looks like part of a mixture of experts and was not taken: refused in words instead of passed over in silence.

Names decide here, but only about what is *mentioned*: nothing is patched because of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..quantized import QUANTIZED_HINT, kept_inside
from ..scan import Found, Scan
from ..site import Left, Refusal
from .near import in_the_way, named

_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_MIXTURES = ("experts", "expert_list", "scored_block", "parallel_linear")
_COUNT = re.compile(r"num_.*experts|n_.*experts|num_experts|total_experts", re.IGNORECASE)


def suspects(scan: Scan, taken: set[int], near: Mapping[int, Left] | None = None) -> list[Refusal]:
    """Refusals for modules that no matcher answered for.

    Args:
        scan: the model.
        taken: ids of modules that a matcher took or refused.
        near: by id what matchers nearly took: where they say why, that is the reason.
    """
    inside = _under(scan, taken)
    refusals, settled = [], set(taken)
    tests = (
        (is_list, "its experts are separate modules, and no matcher stacks them yet"),
        (_owns_stack, "no matcher takes a module with this call and these parameters"),
    )
    for test, reason in tests:
        for found in scan:
            if id(found.module) in inside or _above(scan, found, settled) or not test(found):
                continue
            settled.add(id(found.module))
            inside |= {id(m) for m in found.module.modules()}
            refusals.append(_refuse(found, _said(found, near or {}) or reason))
    for found in scan:
        if id(found.module) in inside or not _counts_experts(found) or _near(found, settled):
            continue
        settled.add(id(found.module))
        inside |= {id(m) for m in found.module.modules()}
        refusals.append(_refuse(found, _said(found, near or {}) or "no matcher takes a mixture of this form"))
    for found in scan:
        if id(found.module) in inside or not _called_experts(found) or _near(found, settled):
            continue
        settled.add(id(found.module))
        inside |= {id(m) for m in found.module.modules()}
        refusals.append(_refuse(found, _said(found, near or {}) or "no matcher takes experts of this form"))
    order = {found.fqns: i for i, found in enumerate(scan)}
    return sorted(refusals, key=lambda r: order[r.fqns])


def _refuse(found: Found, reason: str) -> Refusal:
    quantized = kept_inside(found.module) is not None
    hint = QUANTIZED_HINT if quantized else "It keeps its own forward. To serve it, register a matcher (moepatch.register_matcher)."
    return Refusal(fqns=found.fqns, class_name=type(found.module).__name__, reason=reason, hint=hint)


def _said(found: Found, near: Mapping[int, Left]) -> str | None:
    """What was in the way of experts: as a matcher said of them or of the block around them, or an adapter or layers that no matcher takes."""
    said = next((near[id(m)].reason for m in (found.module, *(parent for parent, _ in found.parents)) if id(m) in near and near[id(m)].kind in _MIXTURES), None)
    return said or in_the_way(found.module)


def _under(scan: Scan, taken: set[int]) -> set[int]:
    return {id(m) for found in scan if id(found.module) in taken for m in found.module.modules()}


def _above(scan: Scan, found: Found, settled: set[int]) -> bool:
    return any(id(m) in settled for m in found.module.modules())


def _near(found: Found, settled: set[int]) -> bool:
    """Whether the module or a neighbour of it holds something settled: routers stand beside the experts they serve."""
    around = [found.module, *(parent for parent, _ in found.parents)]
    return any(id(m) in settled for top in around for m in top.modules())


def _named(found: Found) -> bool:
    return bool(_NAME.search(found.fqn.rpartition(".")[2]) or _NAME.search(type(found.module).__name__))


def is_list(found: Found) -> bool:
    """A list or dict called experts that holds at least two modules with weights, or one of modules of one class that is called so."""
    classes = [type(child) for child in found.module.children() if next(child.parameters(), None) is not None]
    called = _named(found) or len(set(classes)) == 1 and any("expert" in cls.__name__.lower() for cls in classes)
    return isinstance(found.module, (nn.ModuleList, nn.ModuleDict)) and called and len(classes) > 1


def _owns_stack(found: Found) -> bool:
    """A parameter with an axis for experts; convolutions have three axes too."""
    if isinstance(found.module, nn.modules.conv._ConvNd):
        return False
    return _named(found) and any(p.ndim >= 3 and p.shape[0] > 1 for p in found.module.parameters(recurse=False))


def _called_experts(found: Found) -> bool:
    """A module that is called experts, not shared ones, and has matrices."""
    attribute, name = found.fqn.rpartition(".")[2], type(found.module).__name__
    called = re.search(r"(^|_)experts?(_|$)", attribute) or re.search(r"Experts?$", name)
    return bool(called) and "shared" not in f"{attribute} {name}".lower() and any(p.ndim >= 2 for p in found.module.parameters()) and found.parents != ()


def _counts_experts(found: Found) -> bool:
    """A plain attribute that counts experts, on a module that is called one and has weights."""
    module = found.module
    counted = any(_COUNT.fullmatch(k) and type(v) is int and v > 1 for k, v in vars(module).items())
    return counted and _named(found) and not named(found, "router") and next(module.parameters(), None) is not None and found.parents != ()


def expert_signs(model: nn.Module) -> str | None:
    """What in a model speaks of experts, in words: its configuration, names or stacked weights. None if nothing does."""
    for name, value in _counts(vars(model).get("config")):
        return f"its configuration counts experts ({name}={value})"
    for found in Scan(model):
        attribute, name = found.fqn.rpartition(".")[2], type(found.module).__name__
        called = re.search(r"expert|(^|_)moe(_|$)", attribute, re.IGNORECASE) or re.search(r"Expert|MoE", name)
        if called and found.fqn and next(found.module.parameters(), None) is not None:
            return f"{found.fqn} ({name}) is called so"
    return None


def _counts(config: object) -> Iterator[tuple[str, Any]]:
    """The fields of a configuration, or of one nested in it, that count experts, more than one."""
    fields = vars(config) if isinstance(config, PreTrainedConfig) else config if isinstance(config, Mapping) else {}
    for name, value in fields.items():
        if isinstance(name, str) and _COUNT.fullmatch(name) and not re.search(r"per_tok|shared", name):
            most = max((v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int), default=0)
            if most > 1:
                yield name, value
        elif isinstance(value, (Mapping, PreTrainedConfig)):
            yield from _counts(value)
