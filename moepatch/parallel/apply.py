"""From a patched model on every rank to one sharded model: experts over `ep`, everything else by FSDP2 over all ranks of a replica."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .. import registry
from ..checkpoint import PatchedModel
from ..dispatch.base import Dispatcher
from ..dispatch.chain import Chain
from ..errors import BackendUnavailable, MoePatchError
from ..experts.module import ExpertsState
from ..kinds import KINDS
from ..planning import Plan
from ..site import Site
from ..surgery import InjectClass, Journal, Patched, ReplaceState
from .adapters import ShardedAdapters
from .expert_adapters import GatherAround, ShardedParamWrapper, wrappers
from .experts import PatchedShardedExperts, ShardedState
from .gather import GatherAhead, NoGatherInBackward, bundles, ends, layer_lists, may_stay, odd_parameters, owners, small_odd, units
from .late import Late
from .mesh import Meshes, resolve
from .passes import Passes, Throughout, Together
from .reads import LendWeights
from .shard import FullyShard, ShardExperts
from .trainer import AnswerTrainer, Sharded, ShardedModel


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
    if not isinstance(model, Patched):  # it is around the transformers model, and a loop may ask it for parameters as well
        journal.do(InjectClass(model, ShardedAdapters if hasattr(model, "peft_config") else Sharded, "sharded"))
    sharded = [_split(model, site, meshes, dispatch, journal) for p in plan.mixture if p.backend for site in p.sites if can_split(site)]
    _join_chains(model, sharded)
    around = {module: wrappers(model, module) for module in sharded}
    for wrapper in itertools.chain(*around.values()):
        journal.do(InjectClass(wrapper, ShardedParamWrapper, "experts of this rank"))
    if meshes.experts is not None:
        for module in sharded:
            journal.do(FullyShard([module], meshes.experts, {p for p in module.parameters() if not isinstance(p, DTensor)}))
            if around[module]:
                journal.do(GatherAround(module, around[module][0]))
    if fsdp:
        ignored = {p for module in sharded for p in module.parameters() if isinstance(p, DTensor)}
        _shard_dense(model, meshes.dense, ignored, sharded, journal)


def _join_chains(model: nn.Module, sharded: list[nn.Module]) -> None:
    """Tells the dispatchers of the experts in one list of layers that they run one after the other.

    Experts of another name in their layers, such as those for images beside those for text, have tokens of their own and so a chain of their own.
    """
    dispatchers = {id(module): module._moepatch.dispatcher for module in sharded}
    for layers in layer_lists(model):
        named: dict[str, dict[int, object]] = {}
        for name, module in ((name, module) for layer in layers for name, module in layer.named_modules() if id(module) in dispatchers):
            named.setdefault(name, {})[id(module)] = dispatchers[id(module)]
        for inside in named.values():
            chain = Chain(len(inside))
            for place, dispatcher in enumerate(inside.values()):
                if hasattr(dispatcher, "join"):
                    dispatcher.join(chain, place)


def _shard_dense(model: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], experts: list[nn.Module], journal: Journal) -> None:
    """FSDP2 for everything that is not an expert: units for the layers, one for embeddings, one for the head, and the root with the rest."""
    lists, (embeddings, head), before = layer_lists(model), ends(model), len(journal.steps)
    passes = Passes(model, Late(model, mesh))
    stay = may_stay(units(model), ignored)
    odd = small_odd(model, ignored)
    ignored = ignored.union(*odd.values())
    chains: list[list[list[nn.Module]]] = []
    done: set[int] = set()
    for listed in lists:
        layers = list({id(layer): layer for layer in listed if id(layer) not in done}.values())
        done.update(map(id, layers))
        if stay:
            chains.append([_shard_together(bundle, passes, mesh, ignored, journal) for bundle in bundles(layers, ignored)])
        else:
            chains.append([_shard_alone(layer, mesh, ignored, journal) for layer in layers])
    if embeddings is not None:
        journal.do(FullyShard([embeddings], mesh, ignored))
        if list(embeddings.parameters()) == [embeddings.weight]:  # else a norm or the like inside reads its own in the backward
            journal.do(NoGatherInBackward(embeddings))
    if head is not None:
        # The loss may read its weight after its forward, and the backward begins with it.
        journal.do(FullyShard([head], mesh, ignored, reshard_after_forward=False))
    _shard_alone(model, mesh, ignored, journal, reshard_after_forward=False)
    for parameters in odd.values():
        parts = _parts(model, parameters)
        modules = _shard_parameters(model, parameters, mesh, journal)
        journal.do(Throughout(modules, parts, passes))
    if len(chains) == 1:
        chains = [[[end] for end in (embeddings,) if end is not None] + chains[0] + [[end] for end in (head,) if end is not None]]
    for chain in chains:
        journal.do(GatherAhead(chain))
    journal.do(passes.late)
    journal.do(passes)
    made = [step.modules[0] for step in journal.steps[before:] if isinstance(step, FullyShard)]
    lent = [module for module in made if module is not model]
    journal.do(LendWeights(lent, [end for end in (embeddings, head) if end is not None], experts, passes))


def _shard_alone(
    unit: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], journal: Journal, reshard_after_forward: bool = True
) -> list[nn.Module]:
    """A unit for a module, and one for each module in it that has parameters of another dtype. Returns the module, alone."""
    odd = [p for parameters in odd_parameters(unit, ignored).values() for p in parameters]
    journal.do(FullyShard([unit], mesh, ignored.union(odd), reshard_after_forward))
    for module in owners(unit, odd):
        own = [p for p in odd if any(p is other for other in module._parameters.values())]
        _shard_parameters(module, own, mesh, journal, reshard_after_forward=True)
    return [unit]


def _shard_together(layers: list[nn.Module], passes: Passes, mesh: DeviceMesh, ignored: set[nn.Parameter], journal: Journal) -> list[nn.Module]:
    """A unit for layers, and one for each other dtype in them; all stay gathered. Returns a module of each."""
    odd: dict[torch.dtype, list[nn.Parameter]] = {}
    for layer in layers:
        for dtype, parameters in odd_parameters(layer, ignored).items():
            odd.setdefault(dtype, []).extend(parameters)
    journal.do(FullyShard(layers, mesh, ignored.union(*odd.values()), reshard_after_forward=False))
    first = [layers[0], *(_shard_parameters(nn.ModuleList(layers), parameters, mesh, journal)[0] for parameters in odd.values())]
    journal.do(Together(layers, first, passes))
    return first


def _shard_parameters(
    root: nn.Module, parameters: list[nn.Parameter], mesh: DeviceMesh, journal: Journal, reshard_after_forward: bool = False
) -> list[nn.Module]:
    """A unit for these parameters alone, all of one dtype; the unit that has the rest of their modules comes before. Returns those modules.

    Raises:
        MoePatchError: one of these modules is a unit already, and FSDP2 wants one dtype in a unit.
    """
    modules = owners(root, parameters)
    for module in modules:
        if isinstance(module, FSDPModule):
            own = {name: str(p.dtype).removeprefix("torch.") for name, p in module._parameters.items() if p is not None}
            text = f"{type(module).__name__} has parameters of several dtypes, its own are {own}, and FSDP2 wants one dtype in a unit"
            raise MoePatchError(f"{text}. Cast its own parameters to the dtype of the rest, or optimize with fsdp=False.")
    others = {p for module in modules for p in module.parameters()}.difference(parameters)
    journal.do(FullyShard(modules, mesh, others, reshard_after_forward))
    return modules


def _parts(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Module]:
    """What may be called by itself and reads some of these parameters: layers, and modules outside of all layers."""
    layers = units(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [layer for layer in layers if owners(layer, parameters)] + [module for module in owners(model, parameters) if id(module) not in inside]


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
    reason = registry.reason_against(candidate, spec, dtype, device)
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
    if KINDS[site.kind].widths is None:
        return f"nothing says how those of the kind {site.kind!r} are split"
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
    if module._moepatch_watch is not None:
        vars(module)["_moepatch_watch"] = module._moepatch_watch.without_choice()
    return module
