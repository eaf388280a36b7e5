"""Recognises blocks that send every token, scaled by its score, through every expert (see `experts.scored_block`)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..experts.scored_block import ScoredBlockSpec, children_by_role
from ..experts.spec import ExpertsSpec
from ..registry import register_matcher
from ..replica import size_map
from ..scan import Found, Scan
from ..site import Refusal, Site
from .experts import guessed, make_site, refusal, takes
from .near import in_the_way
from .probe import fingerprint, misfit, misfit_of_all
from .witness import Objection


@register_matcher("scored_block", priority=90)
def match_scored_block(found: Found, scan: Scan, memo: dict) -> Site | Refusal | None:
    """See the module's docstring."""
    module = found.module
    experts = [c for c in module.children() if takes(c, 1) and sum(p.ndim == 3 and p.shape[0] > 1 for p in c.parameters(recurse=False)) == 2]
    if len(experts) != 1 or not takes(module, 1):
        return None
    key = ("scored_block", fingerprint(module))
    if key not in memo:
        memo[key] = _read(module, experts[0])
    reading = memo[key]
    if not isinstance(reading, ScoredBlockSpec):
        return refusal(found, reading)
    names = tuple(f"{reading.experts_name}.{name}" for name in reading.experts.layout.parameter_names())
    return make_site(found, "scored_block", reading, names)


def _read(block: nn.Module, experts: nn.Module) -> ScoredBlockSpec | str:
    reason, objected = in_the_way(block) or "its children are not one router, one experts module and at most one shared expert", False
    for spec in guessed(experts):
        roles = children_by_role(block, spec.num_experts)
        if roles is None:
            continue
        for top_k in _top_k(block, spec):
            router, name, shared = roles
            scaled = replace(spec, scale_input=True)
            scored = ScoredBlockSpec(experts=scaled, top_k=top_k, router_name=router, experts_name=name, shared_name=shared)
            sizes = size_map(num_experts=spec.num_experts, hidden=spec.hidden, intermediate=spec.intermediate, experts=max(6, top_k + 1))
            narrow = size_map(num_experts=spec.num_experts, hidden=spec.hidden, intermediate=spec.intermediate, experts=spec.num_experts)
            misfitting = misfit(block, "scored_block", scored, sizes)
            if misfitting is None and sizes != narrow:
                misfitting = misfit_of_all(block, "scored_block", scored, narrow)
            if misfitting is None:
                return scored
            # The reading that computes the same of ordinary numbers has most to say.
            if not objected:
                objected = isinstance(misfitting, Objection)
                reason = f"it does not compute a scored sum over its experts: {misfitting}"
    return reason


def _top_k(block: nn.Module, spec: ExpertsSpec) -> list[int]:
    """Integers of the block that may be the number of experts per token."""
    return sorted({v for v in vars(block).values() if type(v) is int and 0 < v < spec.num_experts})
