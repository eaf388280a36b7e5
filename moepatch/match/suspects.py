"""What looks like part of a mixture of experts and was not taken: refused in words instead of passed over in silence.

Names decide here, but only about what is *mentioned*: nothing is patched because of a name.
"""

from __future__ import annotations

import re

from torch import nn

from ..scan import Found, Scan
from ..site import Refusal

_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_COUNT = re.compile(r"num_.*experts|n_.*experts|num_experts|total_experts", re.IGNORECASE)


def suspects(scan: Scan, taken: set[int]) -> list[Refusal]:
    """Refusals for modules that no matcher answered for.

    Args:
        scan: the model.
        taken: ids of modules that a matcher took or refused.
    """
    inside = _under(scan, taken)
    refusals, settled = [], set(taken)
    for test, reason in ((is_list, "its experts are separate modules, and no matcher stacks them yet"), (_owns_stack, "no matcher takes a module with this call and these parameters")):
        for found in scan:
            if id(found.module) in inside or _above(scan, found, settled) or not test(found):
                continue
            settled.add(id(found.module))
            inside |= {id(m) for m in found.module.modules()}
            refusals.append(_refuse(found, reason))
    for found in scan:
        if id(found.module) in inside or not _counts_experts(found) or _near(found, settled):
            continue
        settled.add(id(found.module))
        inside |= {id(m) for m in found.module.modules()}
        refusals.append(_refuse(found, "no matcher takes a mixture of this form"))
    order = {found.fqns: i for i, found in enumerate(scan)}
    return sorted(refusals, key=lambda r: order[r.fqns])


def _refuse(found: Found, reason: str) -> Refusal:
    hint = "It keeps its own forward. To serve it, register a matcher (moepatch.register_matcher)."
    return Refusal(fqns=found.fqns, class_name=type(found.module).__name__, reason=reason, hint=hint)


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
    """A list or dict called experts that holds at least two modules of one class with weights."""
    classes = [type(child) for child in found.module.children() if next(child.parameters(), None) is not None]
    return isinstance(found.module, (nn.ModuleList, nn.ModuleDict)) and _named(found) and len(classes) > 1 and len(set(classes)) == 1


def _owns_stack(found: Found) -> bool:
    """A parameter with an axis for experts; convolutions have three axes too."""
    if isinstance(found.module, nn.modules.conv._ConvNd):
        return False
    return _named(found) and any(p.ndim >= 3 and p.shape[0] > 1 for p in found.module.parameters(recurse=False))


def _counts_experts(found: Found) -> bool:
    """A plain attribute that counts experts, on a module that is called one and has weights."""
    module = found.module
    counted = any(_COUNT.fullmatch(k) and type(v) is int and v > 1 for k, v in vars(module).items())
    return counted and _named(found) and next(module.parameters(), None) is not None and found.parents != ()
