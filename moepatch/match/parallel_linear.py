"""Recognises a linear layer per expert: one parameter ``[E, out, in]``, called with sorted rows and the count of each expert's rows."""

from __future__ import annotations

import itertools

from torch import nn

from ..experts.parallel_linear import ParallelLinearSpec
from ..layout.experts import Weight
from ..layout.ops import Transpose
from ..registry import register_matcher
from ..replica import size_map
from ..scan import Found, Scan
from ..site import Refusal, Site
from .experts import make_site, refusal, takes
from .probe import fingerprint, misfit, misfit_of_all


@register_matcher("parallel_linear", priority=80)
def match_parallel_linear(found: Found, scan: Scan, memo: dict) -> Site | Refusal | None:
    """See the module's docstring."""
    module = found.module
    named = dict(module.named_parameters())
    if len(named) != 1 or not takes(module, 2):
        return None
    ((name, parameter),) = named.items()
    if parameter.ndim != 3 or parameter.shape[0] < 2 or "." in name:
        return None
    key = ("parallel_linear", fingerprint(module))
    if key not in memo:
        memo[key] = _read(module, name, tuple(parameter.shape))
    if isinstance(memo[key], str):
        return refusal(found, memo[key])
    return make_site(found, "parallel_linear", memo[key], (name,))


def _read(module: nn.Module, name: str, shape: tuple[int, int, int]) -> ParallelLinearSpec | str:
    """The spec that computes what the module does, or why there is none."""
    misfits = []
    for ops, counts in itertools.product(((), (Transpose(),)), ("list", "tensor")):
        experts, wide, narrow = shape if not ops else (shape[0], shape[2], shape[1])
        spec = ParallelLinearSpec(num_experts=experts, in_features=narrow, out_features=wide, weight=Weight((name,), ops), counts=counts)
        sizes, whole = (size_map(num_experts=experts, hidden=narrow, intermediate=wide, **more) for more in ({}, {"experts": experts}))
        reason = misfit(module, "parallel_linear", spec, sizes)
        if reason is None and sizes != whole:
            reason = misfit_of_all(module, "parallel_linear", spec, whole)
        if reason is None:
            return spec
        misfits.append(reason)
    return f"it does not compute one product per expert: {misfits[0]}"
