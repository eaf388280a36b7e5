"""Everything that forbids changing a model, found before anything is changed and raised all at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import CheckFailed, MoePatchError, Problem
from .frameworks import taken
from .kinds import KINDS
from .parallel import fsdp2
from .parallel.apply import can_split
from .parallel.expert_adapters import adapts_a_parameter
from .parallel.mesh import why_not_mesh
from .planning import Plan
from .quantized import kept
from .scan import Scan, outermost_pretrained
from .surgery import Patched, is_shadowed


def check_model(model: object, mesh: DeviceMesh | None = None) -> None:
    """What can be said without knowing the plan: the model's type, wrappers, quantization, offloading, compilation, the mesh.

    Raises:
        CheckFailed: with every problem found.
        MoePatchError: `model` is not a module at all.
    """
    if not isinstance(model, nn.Module):
        raise MoePatchError(f"optimize() takes a torch.nn.Module, such as from_pretrained returns; this is a {type(model).__name__}.")
    problems = [*_mesh(model, mesh), *_compiled(model), *_wrapped(model), *(_without_numbers(model) or _quantized(model, mesh))]
    # One kind of wrapper explains the rest: an offloaded or wrapped tree would repeat itself for every module.
    problems += [] if problems else [*_offloaded(model)]
    if problems:
        raise CheckFailed(tuple(problems))


def check_plan(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None, mesh: DeviceMesh | None = None) -> None:
    """What depends on the plan: experts that cannot be spread, modules patched before, shadowed forwards, and an optimizer that was built too early.

    Raises:
        CheckFailed: with every problem found.
    """
    problems = [*_divisible(plan, mesh), *_adapted(model, plan, mesh), *_taken(model, plan), *_in_two_ways(model, plan)]
    problems += [*_shadowed(model, plan), *_held(model, plan, optimizer)]
    if problems:
        raise CheckFailed(tuple(problems))


def _mesh(model: nn.Module, mesh: DeviceMesh | None) -> Iterator[Problem]:
    if mesh is None:
        return
    if not torch.distributed.is_initialized():
        yield Problem("mesh", "mesh", "there is no process group.", "Start with torchrun and call torch.distributed.init_process_group() first.")
        return
    reason = why_not_mesh(mesh)
    if reason is not None:
        yield Problem("mesh", "mesh", reason, "moepatch.make_mesh(ep=…) makes the usual one.")
        return
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    if devices and devices != {mesh.device_type}:
        text = f"the model is on {', '.join(sorted(devices))} and the mesh is for {mesh.device_type}."
        yield Problem("mesh", "mesh", text, f"Move the model first: model.to({mesh.device_type!r}).")
    elif (lacking := fsdp2.why_not(mesh["ep"])) is not None:
        yield Problem("torch", "mesh", lacking, "Install one of these versions, or optimize without a mesh.")


def _divisible(plan: Plan, mesh: DeviceMesh | None) -> Iterator[Problem]:
    """Every rank holds as many experts of a layer as every other."""
    if mesh is None:
        return
    ranks = mesh["ep"].size()
    for pattern in plan.mixture:
        for site in pattern.sites if pattern.backend and can_split(pattern.site) else ():
            experts = KINDS[site.kind].computes(site.spec).num_experts
            if experts % ranks:
                divisors = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
                text = f"its {experts} experts cannot be spread over {ranks} ranks (ep={ranks})."
                yield Problem("mesh", site.fqn, text, f"Choose an ep that divides {experts}: {divisors}.")


def _adapted(model: nn.Module, plan: Plan, mesh: DeviceMesh | None) -> Iterator[Problem]:
    """An adapter of peft around experts that are to be spread over ranks, of a form that cannot be spread with them."""
    if mesh is None or "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    scan = Scan(model)
    for site in (s for p in plan.mixture if p.backend and can_split(p.site) for s in p.sites):
        holders = [parent for parent, _ in scan.of(model.get_submodule(site.fqn)).parents if isinstance(parent, BaseTunerLayer)]
        if any(not adapts_a_parameter(holder) for holder in holders):
            text = f"an adapter of peft ({type(holders[0]).__name__}) around the experts cannot be spread over ranks."
            yield Problem("wrapped", site.fqn, text, "Adapt modules outside the experts (target_modules), or optimize without a mesh.")
            return


def _compiled(model: nn.Module) -> Iterator[Problem]:
    hint = "Optimize the plain model first and compile the result."
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        yield Problem("compiled", "model", "it is the result of torch.compile.", hint)
        return
    for found in Scan(model):
        if found.module._compiled_call_impl is not None:
            yield Problem("compiled", found.fqn or "model", f"{type(found.module).__name__}.compile() was called on it.", hint)
            return


def _wrapped(model: nn.Module) -> Iterator[Problem]:
    for found in Scan(model):
        where, name = found.fqn or "model", type(found.module).__name__
        if isinstance(found.module, (DistributedDataParallel, DataParallel)):
            yield Problem("wrapped", where, f"it is wrapped in {name}.", "Optimize the inner module (model.module) and wrap the result.")
            return
        if isinstance(found.module, (FullyShardedDataParallel, FSDPModule)):
            yield Problem("wrapped", where, f"it is sharded by FSDP already ({name}).", "Optimize the model before fully_shard.")
            return
    yield from taken(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            placed = f"a DTensor of global shape {tuple(parameter.shape)}, placed {parameter.placements}"
            yield Problem("wrapped", name, f"it is sharded already: {placed}.", "Optimize the model before it is distributed.")
            return


def _without_numbers(model: nn.Module) -> list[Problem]:
    """Weights that nothing can be computed from, or only inside of inference mode."""
    for name, tensor in model.named_parameters():
        if isinstance(tensor, FakeTensor):
            text = f"its weights are fake tensors (FakeTensorMode) of shape {tuple(tensor.shape)}: there are no numbers to verify a patch with."
            return [Problem("fake", name, text, "Build the model under torch.device('meta') to plan for it, or load its weights outside of the mode.")]
        if tensor.is_inference():
            text = "its weights were made inside torch.inference_mode, and so can neither be trained nor moved."
            return [Problem("inference", name, text, "Load the model outside of inference_mode; it may be called inside of it.")]
    return []


def _quantized(model: nn.Module, mesh: DeviceMesh | None) -> Iterator[Problem]:
    """FSDP2 shards plain floats. On one device whatever is quantized keeps its own code."""
    if mesh is None:
        return
    hint = "Optimize without a mesh, or load it with its weights dequantized (where the quantization config has dequantize=True)."
    for name, module in model.named_modules():
        if (words := kept(module)) is not None:
            yield Problem("quantized", name or "model", f"its weights are {words}, which cannot be spread over ranks.", hint)
            return
    if getattr(model, "hf_quantizer", None) is not None:
        yield Problem("quantized", "model", f"it was loaded by {type(model.hf_quantizer).__name__}.", hint)


def _offloaded(model: nn.Module) -> Iterator[Problem]:
    hint = "Load it whole on one device (no device_map), or remove the hooks with accelerate.hooks.remove_hook_from_module(model, recurse=True)."
    for found in Scan(model):
        if "_hf_hook" in vars(found.module):
            hook = type(found.module._hf_hook).__name__
            yield Problem("offloaded", found.fqn or "model", f"accelerate moves its weights in and out of its forward ({hook}).", hint)
            return


def _taken(model: nn.Module, plan: Plan) -> Iterator[Problem]:
    """A module that was patched through another object (the model in a wrapper, a part of it, a holder of it) cannot be patched again."""
    for fqn in _targets(model, plan):
        if isinstance(model.get_submodule(fqn), Patched):
            owners = [name for name, module in model.named_modules() if "_moepatch_patch" in vars(module)]
            by = f"optimize() was called for {owners[0]!r} inside this model" if owners else "optimize() was called for another object that shares it"
            yield Problem("patched", fqn or "model", f"it is patched already: {by}.", "Use it as it is, or call moepatch.restore() on that object first.")
            return


def _in_two_ways(model: nn.Module, plan: Plan) -> Iterator[Problem]:
    """A module that is part of two sites can be patched in one way only."""
    seen: dict[int, tuple[str, object]] = {}
    for pattern in plan.patterns:
        for site in pattern.sites if pattern.backend else ():
            for name, injection in KINDS[site.kind].injections(site.spec, pattern.backend, None).items():
                fqn = ".".join(filter(None, (site.fqn, name)))
                other, before = seen.setdefault(id(model.get_submodule(fqn)), (site.fqn, injection))
                if before != injection:
                    text = f"it is {other}'s too, and the plan has another backend there: {before[1]}, not {injection[1]}."
                    yield Problem("plan", fqn, text, "Give both the same backend.")


def _targets(model: nn.Module, plan: Plan) -> Iterator[str]:
    """The modules that get another class: those of the plan's sites, and the transformers models."""
    yield from outermost_pretrained(model)
    for pattern in plan.patterns:
        for site in pattern.sites if pattern.backend else ():
            yield from (".".join(filter(None, (site.fqn, name))) for name in KINDS[site.kind].injections(site.spec, pattern.backend, None))


def _shadowed(model: nn.Module, plan: Plan) -> Iterator[Problem]:
    """An instance's own ``forward`` would hide the patched class."""
    for pattern in plan.patterns:
        for site in pattern.sites:
            for name in KINDS[site.kind].injections(site.spec, "", None):
                fqn = ".".join(filter(None, (site.fqn, name)))
                if is_shadowed(model.get_submodule(fqn)):
                    text = "something has replaced its forward on the instance, and would go on hiding the patched one."
                    yield Problem("wrapped", fqn, text, "Undo that first (Liger instance patches, expert parallelism of transformers, accelerate hooks).")


def _held(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None) -> Iterator[Problem]:
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sites = [site.fqn for pattern in plan.mixture for site in pattern.sites]
    caught = [f"{fqn}.{name}" for fqn in sites for name, p in model.get_submodule(fqn).named_parameters() if id(p) in held]
    if caught:
        text = f"the {type(optimizer).__name__} that was passed in holds {len(caught)} of the parameters to be patched ({caught[0]}, …)."
        yield Problem("optimizer", "model", text, "Build the optimizer after optimize(), from the patched model's parameters.")
