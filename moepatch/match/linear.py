"""Recognises linear layers of decoder layers that no other kind computes and that are far from every router.

A layer is taken in the parts of a decoder layer (attention, a dense MLP) that hold nothing like experts: what stands beside experts may be
their router, whose choices no rounding may change. For the same reason modules that choose (they count what they choose: ``index_topk``)
are left alone, and whatever has as many outputs as there are experts in its decoder layer. So is what is narrow: gates and decays, of one
number for each head. Output layers and embeddings stand outside of decoder layers. Names decide here only about what is *not* taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..layers.linear import LinearSpec
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Left, Site
from .attention_block import match_attention_block
from .experts import left, make_site
from .near import in_the_way
from .suspects import suspects

#: Narrower layers are gates, decays and low ranks more often than projections, and cost next to nothing.
NARROWEST = 256
_CHOICE = re.compile(r"top_?k", re.IGNORECASE)


# After all others, which may compute the layer as a part of something larger.
@register_matcher("linear", priority=1)
def match_linear(found: Found, scan: Scan, memo: dict) -> Site | Left | None:
    """See the module's docstring. Nothing has to be tried: the class says what it computes."""
    layer = found.module
    if not isinstance(layer, nn.Linear) or layer.weight.ndim != 2 or min(layer.in_features, layer.out_features) < NARROWEST:
        return None
    if type(layer) is not nn.Linear:
        return left(found, "linear", in_the_way(layer) or f"it is a {type(layer).__name__}, not a Linear")
    if not all(_free(parent, name, layer, scan, memo) for parent, name in found.parents):
        return None  # what may choose, or stands outside of decoder layers, is of no kind
    rows, width = layer.weight.shape
    site = make_site(found, "linear", LinearSpec(in_features=width, out_features=rows, bias=layer.bias is not None), ("weight",))
    return site if isinstance(site, Site) else left(found, "linear", site.reason)


def _free(parent: nn.Module, name: str, layer: nn.Linear, scan: Scan, memo: dict) -> bool:
    """Whether a layer is called by its parent, a part of a decoder layer without experts."""
    block = match_attention_block(scan.of(parent), scan, memo)
    if isinstance(block, Site) and name in block.spec.inputs:
        return False  # one GEMM with its neighbours
    if any(_CHOICE.search(key) and type(value) is int for key, value in vars(parent).items()):
        return False
    if "like experts" not in memo:
        memo["like experts"] = {fqn for refusal in suspects(scan, set()) for fqn in refusal.fqns}
    branches = list(_branches(scan.of(parent), scan))
    return bool(branches) and not any(
        _experts(branch) or layer.out_features in _experts(whole) or _holds(scan.of(branch), memo["like experts"]) for branch, whole in branches
    )


def _holds(found: Found, fqns: set[str]) -> bool:
    """Whether one of these names is that of a module or of something in it."""
    return any(f"{fqn}.".startswith(f"{own}.") for fqn in fqns for own in found.fqns)


def _branches(found: Found, scan: Scan) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The direct children of elements of lists through which a module is reached, each with that element: parts of decoder layers."""
    for parent, _ in found.parents:
        above = scan.of(parent)
        if any(isinstance(holder, nn.ModuleList) for holder, _ in above.parents):
            yield found.module, parent
        else:
            yield from _branches(above, scan)


def _experts(module: nn.Module) -> set[int]:
    """How many experts there are in each group of experts of a module: stacked weights, or lists of modules of one class."""
    stacks = {p.shape[0] for m in module.modules() if not isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False) if p.ndim >= 3}
    lists = {len(m) for m in module.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and len(m) > 1 and len({type(c) for c in m.children()}) == 1}
    return stacks | lists
