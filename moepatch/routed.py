"""Where in a model tokens meet experts: of any model, patched or not, sharded or not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .api import patch_of
from .errors import MoePatchError
from .experts.module import PatchedExperts
from .kinds import KINDS
from .match.experts import takes
from .parallel.experts import PatchedShardedExperts
from .planning import match
from .registry import matchers
from .scan import Scan
from .site import Site
from .surgery import Patched


_HINT = "Blocks that loop over a list of experts have such a call after moepatch.optimize(model)."


@dataclass(frozen=True)
class Layer:
    """One place where tokens meet experts.

    Attributes:
        name: of the module in the model.
        module: the experts, which are called with ids; or, where `scored`, a router that returns ``(scores [T, E], …)``.
        num_experts: how many a router can choose from.
        top_k: experts per token of a scored block; None where the ids say it.
    """

    name: str
    module: nn.Module = field(repr=False)
    num_experts: int
    top_k: int | None = None

    @property
    def scored(self) -> bool:
        """Whether the choice has the form of scores that are 0 for all other experts."""
        return self.top_k is not None


def routed_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Every place of a model where tokens meet experts, in tree order.

    Raises:
        MoePatchError: there is none, or some experts are not called in a way that can be intercepted; they are named.
    """
    layers = {name: _patched_layer(name, m) for name, m in model.named_modules() if isinstance(m, PatchedExperts)}
    patch = patch_of(model)
    if patch is None:
        # The dense half is not looked at: it has no tokens to route, and may be sharded by others, who let nobody copy it for a trial.
        sites, refusals, _ = match(Scan(model), matchers=[m for m in matchers() if m.name not in KINDS or not KINDS[m.name].dense])
    else:
        sites, refusals = [site for pattern in patch.report.plan.patterns for site in pattern.sites], patch.report.plan.refusals
    patched = {id(layer.module) for layer in layers.values()}
    others = [site for site in sites if not KINDS[site.kind].dense and not _holds(model, site.fqn, patched)]
    closed = [site.fqn for site in others if site.kind not in ("experts", "scored_block")]
    for refusal in refusals:
        if not _holds(model, refusal.fqn, patched):
            layer = _refused_layer(refusal.fqn, model.get_submodule(refusal.fqn))
            if layer is None:
                closed.append(refusal.fqn)
            else:
                layers[layer.name] = layer
    if closed:
        more = f" and {len(closed) - 4} more" if len(closed) > 4 else ""
        raise MoePatchError(f"The routing of {', '.join(closed[:4])}{more} cannot be intercepted: no call there takes the ids of experts. {_HINT}")
    for site in others:
        layer = _site_layer(model, site)
        layers[layer.name] = layer
    if not layers:
        raise MoePatchError(f"{type(model).__name__} has no mixture of experts whose routing could be intercepted.")
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(layers.values(), key=lambda layer: order[layer.name]))


def _holds(model: nn.Module, fqn: str, patched: set[int]) -> bool:
    return any(id(m) in patched for m in model.get_submodule(fqn).modules())


def _patched_layer(name: str, module: PatchedExperts) -> Layer:
    state = module._moepatch
    experts = state.num_experts if isinstance(module, PatchedShardedExperts) else state.spec.num_experts
    return Layer(name, module, experts + state.spec.identity_experts)


def _refused_layer(name: str, module: nn.Module) -> Layer | None:
    """Experts that moepatch does not serve, such as those that another library has sharded: their call is enough here, and their number."""
    counts = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
    return Layer(name, module, counts.pop()) if len(counts) == 1 and takes(module, 3) else None


def _site_layer(model: nn.Module, site: Site) -> Layer:
    if site.kind == "scored_block":
        name = f"{site.fqn}.{site.spec.router_name}"
        return Layer(name, model.get_submodule(name), site.spec.experts.num_experts, site.spec.top_k)
    return Layer(site.fqn, model.get_submodule(site.fqn), site.spec.num_experts + site.spec.identity_experts)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """What the family calls the arguments of a module."""
    cls = next(c for c in type(module).__mro__ if not issubclass(c, (Patched, FSDPModule)))
    return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]
