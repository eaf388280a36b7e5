"""Several layers as one FSDP2 unit, and what stays gathered kept from being used or seen at the wrong time.

FSDP2 gathers, reduces and keeps its books once for a unit, so fewer and larger units cost the host less. Its own units of several modules
trust that all of them run each time, one after the other. A pass that breaks off, or a layer that is called by itself, would leave them
half-way, and later passes would use old weights. `Together` therefore decides itself where a unit's forward begins and ends. That takes
FSDP2's inner functions, as torch 2.11 to 2.13 have them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.utils.hooks import RemovableHandle


def part(unit: FSDPModule) -> None:
    """An FSDP2 unit as it is between two steps: in parts, nothing on its way, whatever a pass that broke off has left."""
    _begin_anew(unit._get_fsdp_state(), forget=True)


def _held(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What FSDP2 keeps of each parameter of a model, with its group; the unit that gathers it may be a module around the model."""
    inside = set(model.modules())
    own = [unit._get_fsdp_state() for unit in inside if isinstance(unit, FSDPModule)]
    around = (state for context in {state._state_ctx for state in own} for state in context.all_states)
    for group in filter(None, {state._fsdp_param_group for state in (*own, *around)}):
        for held in group.fsdp_params:
            info = held._module_info
            if not inside.isdisjoint((info.module, *info.shared_modules)):
                yield group, held


def gathered(model: nn.Module) -> dict[int, nn.Parameter]:
    """What the optimizer steps in place of each parameter of a model that is gathered at the moment, by the gathered one's id."""
    return {id(held._unsharded_param): held.sharded_param for group, held in _held(model) if group.is_unsharded}


def drop_unreduced(model: nn.Module) -> None:
    """Lets go of gradients of a model's parameters that ranks have not added up yet, such as those of ``no_sync``."""
    for _, held in _held(model):
        held.unsharded_accumulated_grad = None
        _drop_unsharded(held)


def _drop_unsharded(held: Any) -> None:
    if hasattr(held, "_unsharded_param"):
        held._unsharded_param.grad = None


def _end_backward(root: Any) -> None:
    """Ends a backward pass that broke off. FSDP2 would wait for its end for ever, and never again reduce what only the end reduces.

    What is not reduced yet is not whole and is dropped, with what ``no_sync`` had kept from passes before.
    """
    for state in root._state_ctx.all_states:
        if (group := state._fsdp_param_group) is not None:
            group._training_state = TrainingState.POST_BACKWARD  # nothing of it is reduced any more
            for held in group.fsdp_params:
                _drop_unsharded(held)
    root._root_post_backward_final_callback()


def _begin_anew(state: Any, forget: bool) -> None:
    """As `part`; what is on its way is kept unless it is to be forgotten."""
    state._training_state = TrainingState.IDLE
    group = state._fsdp_param_group
    if group is None:
        return
    group._training_state = TrainingState.IDLE  # else FSDP2 does not part a unit that stays
    if forget:
        _forget(group)
    group.reshard()


def _gather_once(group: Any) -> None:
    """Makes the memory that an FSDP2 unit gathers into. What inference mode had made could not be gathered into by any other pass."""
    if not all(held.all_gather_outputs for held in group.fsdp_params):
        with torch.inference_mode(False):
            group.unshard()
            group.wait_for_unshard()
            group.reshard()


def _forget(group: Any) -> None:
    """Lets go of parameters that were gathered ahead and not used."""
    if group._all_gather_result is not None:
        if (event := group._all_gather_result.all_gather_event) is not None:
            group.device_handle.current_stream().wait_event(event)
        if isinstance(work := group._all_gather_result.all_gather_work, dist.Work):
            work.wait()
        group._all_gather_result = None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass
class Passes:
    """The step that watches forward passes of a model.

    What a forward pass has left gathered, if its backward never came, may be from before the optimizer's step. So a pass begins with
    everything in parts, unless neither it nor the one before has gradients.

    Attributes:
        model: the root.
        members: filled by `Together`; they end what a pass leaves open.
        running: whether a pass is under way.
    """

    model: nn.Module
    members: list[Together] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    running: bool = False
    had_gradients: bool = False

    def do(self) -> None:
        """Adds hooks; the first comes before FSDP2's, the last after."""
        self.handles = [self.model.register_forward_pre_hook(self._begin, prepend=True), self.model.register_forward_hook(self._end, always_call=True)]

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()

    def prepare(self) -> Any:
        """FSDP2's state of the model, after FSDP2 has learned that this is the root, whatever part of it is called first."""
        root = self.model._get_fsdp_state()
        if root._is_root is None:
            root._lazy_init()
            states = root._state_ctx.all_states
            states[:] = dict.fromkeys(states)  # torch 2.11 lists a unit once for each of its modules
        return root

    @torch._disable_dynamo
    def _begin(self, module: nn.Module, args: tuple) -> None:
        self.running = True
        if _in_backward():
            return
        root = self.prepare()
        context = root._state_ctx
        if context.post_backward_final_callback_queued:
            _end_backward(root)
        # FSDP2 forgets the root of a pass at its end. After one that broke off it would not wait for the optimizer.
        broken, context.iter_forward_root = context.iter_forward_root is not None, None
        if broken or self.had_gradients or torch.is_grad_enabled():
            for state in context.all_states:
                _begin_anew(state, forget=True)
        if torch.is_inference_mode_enabled():
            for state in context.all_states:
                if state._fsdp_param_group is not None:
                    _gather_once(state._fsdp_param_group)
        for member in self.members:
            member.following = None
        self.had_gradients = torch.is_grad_enabled()

    @torch._disable_dynamo
    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        self.running = False
        if _in_backward():
            return
        for member in self.members:
            member.close()
        for state in self.prepare()._state_ctx.all_states:
            if state._fsdp_param_group is not None:
                _forget(state._fsdp_param_group)


@dataclass
class Together:
    """The step that makes consecutive layers one module for FSDP2: its forward begins before the first and ends after the last.

    That is so where the layers run in their order within a pass. A layer that is called otherwise (by itself, again, or out of order) is a
    forward of the unit by itself, which gathers the weights as they are then.

    Attributes:
        layers: in their order.
        units: a module of each FSDP2 unit that the layers' parameters are in: one for each dtype. None is resharded after a forward.
        passes: those of the model.
        following: which layer goes on with what the one before it began, if it comes next.
        alone: whether what runs now ends with the layer that runs.
    """

    layers: list[nn.Module]
    units: list[nn.Module]
    passes: Passes
    states: list[Any] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    following: int | None = None
    alone: bool = False

    def do(self) -> None:
        """Replaces FSDP2's forward hooks. Its own do not come back: the steps that shard are undone with this one."""
        self.states = [unit._get_fsdp_state() for unit in self.units]
        for state in self.states:
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
        for index, layer in enumerate(self.layers):
            before, after = functools.partial(self._before, index), functools.partial(self._after, index)
            self.handles.append(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(after))
        self.passes.members.append(self)

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()
        self.passes.members.remove(self)

    def close(self) -> None:
        """Ends what a pass has left open, because it has skipped layers or has broken off."""
        if self.following is not None:
            self.following = None
            for state in self.states:
                state._training_state = TrainingState.IDLE
            self._part_without_gradients()

    @torch._disable_dynamo
    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._recomputes():
            if self.passes.running and self.following == index:
                return None
            self._open(index)
        for state in self.states:
            args, kwargs = state._pre_forward(module, args, kwargs)
        return args, kwargs

    def _open(self, index: int) -> None:
        """Begins a forward. What is gathered is from an earlier one; what is on its way may be, unless a pass has just sent for it."""
        inside = self.passes.running
        self.passes.prepare()
        self.following, self.alone = None, index != 0 or not inside
        for state in self.states:
            _begin_anew(state, forget=not inside)

    @torch._disable_dynamo
    def _after(self, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._recomputes():
            for state in self.states:
                output = state._post_forward(module, args, output)
        elif self.alone or index == len(self.layers) - 1:
            self.following, self.alone = None, False
            for state in self.states:
                output = state._post_forward(module, args, output)
            self._part_without_gradients()
        else:
            self.following = index + 1
            for state in self.states:
                output = state._register_pre_backward_hook(output)  # the loss may depend on this layer and not on the last one
        return output

    def _recomputes(self) -> bool:
        """Whether a backward pass has come to these layers and needs their forward again. FSDP2 has nothing to begin or end then."""
        group = self.states[-1]._fsdp_param_group
        return group is not None and group._training_state == TrainingState.PRE_BACKWARD and _in_backward()

    def _part_without_gradients(self) -> None:
        # So that who asks for ``parameters()`` after a pass without gradients gets what the optimizer steps.
        if not torch.is_grad_enabled():
            for unit in self.units:
                unit.reshard()
