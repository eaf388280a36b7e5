"""What moepatch needs of FSDP2 beyond what torch promises. Every private name of it stands in this file and in no other.

`why_not` looks for all of them before a model is changed, so that a torch without one is refused in words. They are those of torch 2.11 to
2.14: from 2.12 on a unit may have several groups of parameters, and from 2.13 on FSDP2 itself recovers from a pass that broke off.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._pytree import tree_leaves

#: By what has it: private names, with the arguments that they are called with, or None where they are only read or set.
NEEDED: dict[str, dict[str, tuple | None]] = {
    "unit": {
        "_state_ctx": None,
        "_training_state": None,
        "_is_root": None,
        "_lazy_init": (),
        "_pre_forward": ("module", "args", "kwargs"),
        "_post_forward": ("module", "args", "output"),
        "_pre_backward": ("gradient",),
        "_register_pre_backward_hook": ("output",),
        "_root_post_backward_final_callback": (),
        "_pre_forward_hook_handle": None,
        "_post_forward_hook_handle": None,
    },
    "context": {"all_states": None, "iter_forward_root": None, "post_backward_final_callback_queued": None},
    "group": {
        "_training_state": None,
        "_all_gather_result": None,
        "fsdp_params": None,
        "is_unsharded": None,
        "device_handle": None,
        "post_forward_mesh_info": None,
        "unshard_in_backward": None,
        "_register_post_backward_hook": ("args", "kwargs"),
        "unshard": (),
        "wait_for_unshard": (),
        "reshard": (),
    },
    "parameter": {"_module_info": None, "sharded_param": None, "unsharded_accumulated_grad": None, "all_gather_outputs": None},
    "parameter's class": {"unsharded_param": None},
    "parameter's module": {"module": None, "param_name": None, "shared_modules": None, "shared_param_names": None},
    "training state": {"IDLE": None, "PRE_BACKWARD": None, "POST_BACKWARD": None},
    "torch.distributed._composable_state": {"_module_state_mapping": None},
}


def why_not(mesh: DeviceMesh) -> str | None:
    """Why moepatch cannot work with FSDP2 of this torch, in words that name what is missing; or None. Does not communicate.

    Args:
        mesh: any mesh of one dim that this rank is in.
    """
    missing = _missing(mesh)
    if not missing:
        return None
    return f"moepatch works with FSDP2's inner parts as torch 2.11 to 2.14 have them. torch {torch.__version__} lacks: {', '.join(missing)}."


def _missing(mesh: DeviceMesh) -> list[str]:
    """The names of `NEEDED` that FSDP2 does not have, or not with these arguments, by looking at a unit that is made for it."""
    module = nn.Linear(1, 1, bias=False, device="meta")
    fully_shard(module, mesh=mesh)
    if not callable(getattr(module, "_get_fsdp_state", None)):
        return ["FSDPModule._get_fsdp_state()"]
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    if groups[0] is None:
        return ["_fsdp_param_groups of a unit"]
    parameter = next(iter(getattr(groups[0], "fsdp_params", ())), None)
    found = {
        "unit": state,
        "context": getattr(state, "_state_ctx", None),
        "group": groups[0],
        "parameter": parameter,
        "parameter's class": type(parameter),
        "parameter's module": getattr(parameter, "_module_info", None),
        "training state": type(getattr(groups[0], "_training_state", None)),
        "torch.distributed._composable_state": _composable_state,
    }
    return [f"{name} of a {what}" for what, names in NEEDED.items() for name, call in names.items() if not _serves(found[what], name, call)]


def _serves(owner: object, name: str, call: tuple | None) -> bool:
    """Whether something has an attribute, that can be called with these arguments."""
    if not hasattr(owner, name):
        return False
    if call is None:
        return True
    try:
        inspect.signature(getattr(owner, name)).bind(*call)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class Unit:
    """One FSDP2 unit: modules whose parameters are gathered at the same time and whose gradients are reduced at the same time.

    Attributes:
        state: FSDP2's own; equal units have the same.
    """

    state: Any

    @classmethod
    def of(cls, module: FSDPModule) -> Unit:
        """The unit that a module is (one of) the outermost of."""
        return cls(module._get_fsdp_state())

    @property
    def groups(self) -> list[Any]:
        """Its parameters, as FSDP2 has them: a group for each mesh; none where there are no parameters."""
        state = self.state
        if hasattr(state, "_fsdp_param_groups"):
            return state._fsdp_param_groups
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]

    @property
    def stays(self) -> bool:
        """Whether its parameters are gathered until the backward pass, and not only for the forward."""
        return all(group.post_forward_mesh_info is None for group in self.groups)

    @property
    def is_gathered(self) -> bool:
        """Whether it has parameters, and all of them are whole at the moment."""
        return bool(self.groups) and all(group.is_unsharded for group in self.groups)

    def take_over(self) -> None:
        """Removes FSDP2's own forward hooks: who calls it calls `pre_forward` and `post_forward`, or `gather` and `watch`, instead."""
        self.state._pre_forward_hook_handle.remove()
        self.state._post_forward_hook_handle.remove()

    def pre_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What FSDP2 does before a forward."""
        return self.state._pre_forward(module, args, kwargs)

    def post_forward(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """What FSDP2 does after a forward."""
        return self.state._post_forward(module, args, output)

    def before_backward(self, output: Any) -> Any:
        """What `post_forward` does for the backward alone: it begins where the first of these tensors gets its gradient."""
        return self.state._register_pre_backward_hook(output)

    def watch(self, output: Any) -> None:
        """As `before_backward`, for a unit that never began a forward: it is gathered again if need be, and reduced at the very end."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self.state._pre_backward)

    def end_forward(self) -> None:
        """Ends a forward that will not come to its end."""
        self.state._training_state = _states(self.state).IDLE

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass has come to it, and has not reduced its gradients yet."""
        return any(group._training_state == _states(group).PRE_BACKWARD for group in self.groups)

    def gather(self) -> None:
        """Gathers at once, where it is not gathered."""
        for group in self.groups:
            if not group.is_unsharded:
                group.unshard()
                group.wait_for_unshard()

    def places(self) -> Iterator[tuple[nn.Module, str]]:
        """Modules and the names under which they have its parameters; shared ones with every module that has them."""
        for held in (held for group in self.groups for held in group.fsdp_params):
            info = held._module_info
            yield from zip((info.module, *info.shared_modules), (info.param_name, *info.shared_param_names), strict=True)

    def hold(self) -> list[Any]:
        """Makes it as FSDP2 has the root: gathered until the backward pass has ended, its gradients reduced only then.

        For a unit that somebody reads outside of its own forward: the backward of such a read may come after the unit's own.

        Returns:
            What `let_go` takes.
        """
        before = [group.post_forward_mesh_info for group in self.groups]
        for group in self.groups:
            group.post_forward_mesh_info = None
            group.unshard_in_backward = True  # and from now on: a backward of this pass may come at any time
            group._register_post_backward_hook = _unchanged
        return before

    def let_go(self, before: list[Any]) -> None:
        """The opposite of `hold`, for passes to come."""
        for group, mesh_info in zip(self.groups, before, strict=True):
            group.post_forward_mesh_info = mesh_info
            del group._register_post_backward_hook

    def gather_once(self) -> None:
        """Makes the memory that it gathers into. What inference mode had made could not be gathered into by any other pass."""
        for group in self.groups:
            if not all(held.all_gather_outputs for held in group.fsdp_params):
                with torch.inference_mode(False):
                    group.unshard()
                    group.wait_for_unshard()
                    group.reshard()

    def part(self) -> None:
        """Its parameters in parts, as the optimizer has them."""
        for group in self.groups:
            group.reshard()

    def begin_anew(self, forget: bool) -> None:
        """As between two steps: in parts, whatever a pass that broke off has left; what is on its way is kept unless it is to be forgotten."""
        self.state._training_state = _states(self.state).IDLE
        for group in self.groups:
            group._training_state = _states(group).IDLE  # else FSDP2 does not part a unit that stays
        if forget:
            self.forget()
        self.part()

    def forget(self) -> None:
        """Lets go of parameters that were gathered ahead and not used."""
        for group in self.groups:
            if (result := group._all_gather_result) is None:
                continue
            if (event := result.all_gather_event) is not None:
                group.device_handle.current_stream().wait_event(event)
            if isinstance(work := result.all_gather_work, dist.Work):
                work.wait()
            group._all_gather_result = None


def _unchanged(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """In place of FSDP2's way to reduce when the gradients of these inputs are there: what it does not see, it reduces at the very end."""
    return args, kwargs


def _states(owner: Any) -> Any:
    """FSDP2's names of what a unit or group of parameters is doing."""
    return type(owner._training_state)


@dataclass(frozen=True)
class Root:
    """The unit of a whole model, and what all units share within a pass."""

    unit: Unit

    @classmethod
    def of(cls, model: FSDPModule) -> Root:
        """That of a model, after FSDP2 has learned that this is the root, whatever part of it is called first."""
        state = model._get_fsdp_state()
        if state._is_root is None:
            state._lazy_init()
            states = state._state_ctx.all_states
            states[:] = dict.fromkeys(states)  # torch 2.11 lists a unit once for each of its modules
        return cls(Unit(state))

    @property
    def units(self) -> list[Unit]:
        """All units of the model."""
        return [Unit(state) for state in self.unit.state._state_ctx.all_states]

    @property
    def backward_broke_off(self) -> bool:
        """Whether a backward pass has begun and has not ended. To be asked outside of one."""
        return self.unit.state._state_ctx.post_backward_final_callback_queued

    def forward_broke_off(self) -> bool:
        """Whether a forward pass has begun and has not ended; FSDP2 then forgets that it began, or it would not wait for the optimizer."""
        context = self.unit.state._state_ctx
        broken, context.iter_forward_root = context.iter_forward_root is not None, None
        return broken

    def end_backward(self, model: FSDPModule) -> None:
        """Ends a backward pass that broke off. FSDP2 would wait for its end for ever, and never again reduce what only the end reduces.

        What is not reduced yet is not whole and is dropped, with what ``no_sync`` had kept from passes before.
        """
        groups = [group for unit in self.units for group in unit.groups]
        for group in groups:
            for held in group.fsdp_params:
                _drop_unsharded(held)
        if hasattr(model, "reset_iter_state"):  # torch 2.13
            model.reset_iter_state()
            return
        for group in groups:
            group._training_state = _states(group).POST_BACKWARD  # nothing of it is reduced any more
        self.unit.state._root_post_backward_final_callback()


def _held(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What FSDP2 keeps of each parameter of a model, with its group; the unit that gathers it may be a module around the model."""
    inside = set(model.modules())
    own = [unit._get_fsdp_state() for unit in inside if isinstance(unit, FSDPModule)]
    around = (state for context in {state._state_ctx for state in own} for state in context.all_states)
    for group in {group for state in (*own, *around) for group in Unit(state).groups}:
        for held in group.fsdp_params:
            info = held._module_info
            if not inside.isdisjoint((info.module, *info.shared_modules)):
                yield group, held


def gathered(model: nn.Module) -> dict[int, nn.Parameter]:
    """What the optimizer steps in place of each parameter of a model that is gathered at the moment, by the gathered one's id."""
    return {id(held.unsharded_param): held.sharded_param for group, held in _held(model) if group.is_unsharded}


def drop_unreduced(model: nn.Module) -> None:
    """Lets go of gradients of a model's parameters that ranks have not added up yet, such as those of ``no_sync``."""
    for _, held in _held(model):
        held.unsharded_accumulated_grad = None
        _drop_unsharded(held)


def _drop_unsharded(held: Any) -> None:
    with suppress(AttributeError):  # one that was never gathered
        held.unsharded_param.grad = None


def part(module: FSDPModule) -> None:
    """The unit of a module as it is between two steps: in parts, nothing on its way, whatever a pass that broke off has left."""
    Unit.of(module).begin_anew(forget=True)


def disown(module: nn.Module) -> None:
    """Makes FSDP2 forget that a module was (one of) the outermost of a unit."""
    _composable_state._module_state_mapping.pop(module, None)
