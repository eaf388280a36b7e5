"""Sharding as steps that know their inverse: experts over `ep`, everything over data parallelism by FSDP2.

Until `commit`, a step keeps the whole parameters, so that undoing it needs no communication; after it, undoing gathers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from .fsdp2 import disown, part

#: Where FSDP2 registers hooks.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
#: Where torch keeps what else it knows of a forward hook.
_HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@dataclass
class Held:
    """A parameter of the model as it was, and where it belongs."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    released: bool = False

    def release(self) -> None:
        """Lets go of the whole data; the object stays, to be filled again by `put_back`."""
        if self.parameter.device.type != "meta" and not self.released:
            self.parameter.data = torch.empty(0, dtype=self.parameter.dtype, device=self.parameter.device)
            self.released = True

    def put_back(self) -> None:
        """The original object with the current values; gathers them if they were released. Gradients are dropped."""
        now = self.module._parameters[self.name]
        if self.parameter.device.type == "meta" and now.device.type != "meta":
            # Born without data and filled since: there is no earlier object with values to go back to.
            self.parameter = nn.Parameter(now.detach().full_tensor() if isinstance(now, DTensor) else now.detach())
        elif self.released:
            self.parameter.data = now.detach().full_tensor() if isinstance(now, DTensor) else now.detach()
            self.parameter.grad = None
            self.released = False
        self.parameter.requires_grad_(now.requires_grad)
        self.module._parameters[self.name] = self.parameter


@dataclass
class ShardExperts:
    """Splits the leading axis of an experts module's parameters over the ranks of `mesh` (1-D): each becomes a DTensor, ``Shard(0)``."""

    module: nn.Module
    names: tuple[str, ...]
    mesh: DeviceMesh
    held: list[Held] = field(default_factory=list)

    def do(self) -> None:
        """Splits, without communication: every rank has the whole and keeps its share."""
        rank, ranks = self.mesh.get_local_rank(), self.mesh.size()
        for path in self.names:
            parent, _, name = path.rpartition(".")
            owner = self.module.get_submodule(parent)
            whole = owner._parameters[name]
            share = whole.shape[0] // ranks
            local = whole.detach()[rank * share : (rank + 1) * share].clone()
            self.held.append(Held(owner, name, whole))
            placed = DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False)
            owner._parameters[name] = nn.Parameter(placed, requires_grad=whole.requires_grad)

    def commit(self) -> None:
        """Frees the whole parameters."""
        for held in self.held:
            held.release()

    def undo(self) -> None:
        """Puts the whole parameters back."""
        while self.held:
            self.held.pop().put_back()


@dataclass
class FullyShard:
    """One FSDP2 unit, and the way back from it (FSDP2 itself has none).

    Attributes:
        modules: those whose parameters are gathered at the same time. With several, FSDP2's forward hooks are to be replaced (`Together`,
            `Throughout`).
        mesh, ignored, reshard_after_forward: as `torch.distributed.fsdp.fully_shard` takes them.
    """

    modules: list[nn.Module]
    mesh: DeviceMesh
    ignored: set[nn.Parameter]
    reshard_after_forward: bool = True
    changed: list[tuple[nn.Module, type, set[str]]] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    committed: bool = False

    def do(self) -> None:
        """Shards, and writes down what that changed."""
        everything = list({id(m): m for root in self.modules for m in root.modules()}.values())
        inner = {id(p) for m in everything if isinstance(m, FSDPModule) for p in m.parameters()}
        for module in everything:
            parameters = module._parameters.items()
            self.held += [Held(module, name, p) for name, p in parameters if p is not None and p not in self.ignored and id(p) not in inner]
        before = [(module, type(module), set(vars(module))) for module in everything]
        unit = self.modules if len(self.modules) > 1 else self.modules[0]
        try:
            fully_shard(unit, mesh=self.mesh, ignored_params=self.ignored, reshard_after_forward=self.reshard_after_forward)
        finally:
            self.changed = [(module, cls, set(vars(module)) - attributes) for module, cls, attributes in before]

    def commit(self) -> None:
        """Frees the whole parameters."""
        self.committed = True
        for held in self.held:
            # Experts are released by the step that split them: this one holds only their share.
            if not isinstance(held.parameter, DTensor):
                held.release()

    def undo(self) -> None:
        """Puts back parameters, classes, attributes and hooks."""
        if isinstance(self.modules[0], FSDPModule):
            part(self.modules[0])
        while self.held:
            held = self.held.pop()
            # The held share of an expert is what it was before training: the step that split the experts gathers the current values.
            if not (self.committed and isinstance(held.parameter, DTensor)):
                held.put_back()
        while self.changed:
            module, cls, attributes = self.changed.pop()
            module.__class__ = cls
            for name in attributes:
                module.__dict__.pop(name, None)
            for hooks in (vars(module)[name] for name in _HOOKS):
                for key in [key for key, hook in hooks.items() if _is_fsdp(hook)]:
                    del hooks[key]
                    for flags in _HOOK_FLAGS:
                        vars(module)[flags].pop(key, None)
        for module in self.modules:
            disown(module)


def _is_fsdp(hook: object) -> bool:
    """Whether a hook belongs to FSDP2; those that the user has added since stay."""
    function = hook[0] if isinstance(hook, tuple) else hook
    function = getattr(function, "hook", function)
    function = getattr(function, "func", function)
    return (getattr(function, "__module__", "") or "").startswith("torch.distributed")
