"""From a patched model on every rank to one sharded model: experts over `ep`, everything else by FSDP2 over all ranks of a replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import registry
from ..checkpoint import PatchedModel
from ..dispatch.base import Dispatcher
from ..errors import BackendUnavailable
from ..experts.module import ExpertsState
from ..kinds import KINDS
from ..plan import Plan
from ..site import Site
from ..surgery import Journal, ReplaceState
from .experts import PatchedShardedExperts, ShardedState
from .gather import GatherAhead, NoGatherInBackward, Stay, ends, layer_lists, may_stay, units
from .mesh import Meshes, resolve
from .shard import FullyShard, ShardExperts
from .trainer import AnswerTrainer, ShardedModel


def shard(model: nn.Module, plan: Plan, mesh: DeviceMesh, dispatch: Dispatch, fsdp: bool, journal: Journal) -> None:
    """Shards a model whose sites are patched; every step goes on the journal. No step communicates.

    Args:
        model: the whole model on this rank, or a model on the meta device.
        plan: what was patched.
        mesh: valid for the plan (see `check`).
        dispatch: how tokens are moved.
        fsdp: shard dense parameters as well.
        journal: of the patch.
    """
    meshes = resolve(mesh)
    for pretrained in [m for m in model.modules() if isinstance(m, PatchedModel)]:
        journal.do(ReplaceState(pretrained, ShardedModel, pretrained._moepatch))
        journal.do(AnswerTrainer(pretrained.config))
    sharded = [_split(model, site, meshes, dispatch, journal) for p in plan.mixture if p.backend for site in p.sites if can_split(site)]
    if meshes.experts is not None:
        for module in sharded:
            others = {p for p in module.parameters() if not isinstance(p, DTensor)}
            journal.do(FullyShard(module, meshes.experts, others))
    if fsdp:
        ignored = {p for module in sharded for p in module.parameters() if isinstance(p, DTensor)}
        _shard_dense(model, meshes.dense, ignored, journal)


def _shard_dense(model: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], journal: Journal) -> None:
    """FSDP2 for everything that is not an expert: a unit for each layer, for embeddings and for the head, and the root with the rest."""
    lists, (embeddings, head) = layer_lists(model), ends(model)
    layers = units(model)
    stay = may_stay(layers, ignored)
    parted: list[nn.Module] = []
    for layer in layers:
        parted += _shard_odd_dtypes(layer, mesh, ignored, journal, reshard_after_forward=not stay)
        journal.do(FullyShard(layer, mesh, ignored, reshard_after_forward=not stay))
        parted.append(layer)
    if embeddings is not None:
        journal.do(FullyShard(embeddings, mesh, ignored))
        journal.do(NoGatherInBackward(embeddings))
    if head is not None:
        # The loss may read its weight after its forward, and the backward begins with it.
        journal.do(FullyShard(head, mesh, ignored, reshard_after_forward=False))
    _shard_odd_dtypes(model, mesh, ignored, journal)
    journal.do(FullyShard(model, mesh, ignored, reshard_after_forward=False))
    chains = [[embeddings, *lists[0], head]] if len(lists) == 1 else lists
    for chain in chains:
        journal.do(GatherAhead([module for module in chain if module is not None]))
    journal.do(Stay(model, parted if stay else [], head))


@dataclass(frozen=True)
class Dispatch:
    """The dispatcher of a model.

    Attributes:
        name: for people.
        make: ``(group, num_experts)`` to a dispatcher.
        why: why this one: what stood in the way of those that would have been preferred.
    """

    name: str
    make: Callable[[dist.ProcessGroup, int], Dispatcher]
    why: str


def choose_dispatch(plan: Plan, mesh: DeviceMesh, asked: str | Callable[[dist.ProcessGroup, int], Dispatcher] | None) -> Dispatch:
    """The dispatcher that was asked for, or the preferred one that serves every layer whose experts are split, on every rank. Communicates.

    Raises:
        BackendUnavailable: the one asked for, or every one, cannot serve; the message says why.
    """
    if callable(asked):
        return Dispatch(getattr(asked, "__name__", type(asked).__name__), asked, "passed in by the caller")
    group, device = mesh["ep"].get_group(), torch.device(mesh.device_type)
    layers = [(KINDS[p.site.kind].computes(p.site.spec), getattr(torch, p.site.dtype)) for p in plan.mixture if p.backend and can_split(p.site)]
    if asked is None and (group.size() == 1 or not layers):
        why = "ep=1: every rank has all experts" if layers else "there are no experts to split"
        return Dispatch("local", registry.compute("dispatch", "local"), why)
    candidates = [b for b in registry.backends("dispatch") if b.name != "local"] if asked is None else [registry.backend("dispatch", asked)]
    reasons = {b.name: next((r for spec, dtype in layers if (r := _why_not(b, spec, dtype, device, group))), None) for b in candidates}
    everywhere: list[dict[str, str | None]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, reasons)
    missing: list[str] = []
    for candidate in candidates:
        reason = next((rank[candidate.name] for rank in everywhere if rank[candidate.name]), None)
        if reason is None:
            why = "chosen by the caller" if asked is not None else "; ".join(missing) or "the preferred one"
            return Dispatch(candidate.name, registry.compute("dispatch", candidate.name), why)
        missing.append(f"{candidate.name}: {reason}")
    raise BackendUnavailable(f"No dispatcher serves this model on this mesh: {'; '.join(missing)}.")


def _why_not(candidate: registry.Backend, spec, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> str | None:
    """Why a dispatcher does not serve a layer here: by what it says of layers, or because it refuses the group."""
    reason = candidate.why_not(spec, dtype, device)
    if reason is not None:
        return reason
    try:
        registry.compute("dispatch", candidate.name)(group, spec.num_experts)
    except BackendUnavailable as error:
        return str(error)
    return None


def can_split(site: Site) -> bool:
    """Whether a site's experts can live on different ranks; the others are sharded like dense parameters."""
    return why_whole(site) is None


def why_whole(site: Site) -> str | None:
    """Why the experts of a site stay together, or None."""
    if site.kind == "parallel_linear":
        return "they are called with rows that the family has sorted already"
    spec = KINDS[site.kind].computes(site.spec)
    if spec.identity_experts:
        return "some of its experts are the identity and have no weights to split"
    if spec.post_norm is not None:
        return "a norm that all experts share stands behind each of them"
    return None


def _split(model: nn.Module, site: Site, meshes: Meshes, dispatch: Dispatch, journal: Journal) -> nn.Module:
    """One experts module: its parameters become DTensors, its forward dispatches."""
    module = model.get_submodule(site.fqn).get_submodule(KINDS[site.kind].holder(site.spec))
    whole: ExpertsState = module._moepatch
    ranks = meshes.ep.size()
    state = ShardedState(
        spec=whole.spec.with_experts(whole.spec.num_experts // ranks),
        backend=whole.backend,
        implementation=None,  # transformers' own functions know nothing of experts on other ranks, so there is nothing to stand aside for
        num_experts=whole.spec.num_experts,
        dispatcher=dispatch.make(meshes.ep.get_group(), whole.spec.num_experts),
        ranks=ranks,
    )
    journal.do(ShardExperts(module, whole.spec.layout.parameter_names(), meshes.ep))
    journal.do(ReplaceState(module, PatchedShardedExperts, state))
    return module


def _shard_odd_dtypes(
    unit: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], journal: Journal, reshard_after_forward: bool = True
) -> list[nn.Module]:
    """Gives modules whose dtype is not that of most of the unit (norms and routers kept in fp32) units of their own: FSDP2 wants one dtype."""
    counts: dict[torch.dtype, int] = {}
    owners: dict[int, tuple[nn.Module, set[torch.dtype]]] = {}
    for module in unit.modules():
        for p in module._parameters.values():
            if p is not None and p.requires_grad and p not in ignored and not isinstance(p, DTensor):
                counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
                owners.setdefault(id(module), (module, set()))[1].add(p.dtype)
    usual = max(counts, key=counts.get, default=None)
    odd = [module for module, dtypes in owners.values() if dtypes != {usual} and module is not unit]
    for module in odd:
        journal.do(FullyShard(module, mesh, ignored, reshard_after_forward=reshard_after_forward))
    return odd
