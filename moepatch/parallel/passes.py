"""Several layers as one FSDP2 unit, and what stays gathered kept from being used or seen at the wrong time.

FSDP2 gathers, reduces and keeps its books once for a unit, so fewer and larger units cost the host less. Its own units of several modules
trust that all of them run each time, one after the other. A pass that breaks off, or a layer that is called by itself, would leave them
half-way, and later passes would use old weights. `Together` therefore decides itself where a unit's forward begins and ends, and
`Throughout` does so for what is gathered for a whole pass. What that takes of FSDP2 is in `fsdp2`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .fsdp2 import Root, Unit
from .late import Late


def in_backward() -> bool:
    """Whether a backward pass is under way, so that a forward is one of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


@dataclass
class Passes:
    """The step that watches forward passes of a model.

    What a forward pass has left gathered, if its backward never came, may be from before the optimizer's step. So a pass begins with
    everything in parts, unless neither it nor the one before has gradients.

    Attributes:
        model: the root.
        late: looks after parameters that come into the model later.
        members: filled by `Together`; they end what a pass leaves open.
        throughout: filled by `Throughout`; they are gathered when a pass begins.
        running: whether a pass is under way.
        lent: units that somebody has read in the pass under way, outside of their own forward.
        held: those of them that a backward may still come to, with what `Unit.let_go` takes.
        ends: units of embeddings and head.
        looked_at: whether somebody has read a weight since the last pass, as whoever puts an adapter around it does.
    """

    model: nn.Module
    late: Late
    members: list[Together] = field(default_factory=list)
    throughout: list[Throughout] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    running: bool = False
    had_gradients: bool = False
    lent: list[Unit] = field(default_factory=list)
    held: dict[Unit, list] = field(default_factory=dict)
    backward_came: bool = False
    ends: set[Unit] = field(default_factory=set)
    looked_at: bool = False

    def do(self) -> None:
        """Adds hooks; the first comes before FSDP2's, the last after."""
        self.handles = [self.model.register_forward_pre_hook(self._begin, prepend=True), self.model.register_forward_hook(self._end, always_call=True)]

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()
        self._let_go()

    def prepare(self) -> Root:
        """What FSDP2 has of the model, after it has learned that this is the root, whatever part of it is called first."""
        return Root.of(self.model)

    def lends(self, unit: Unit) -> bool:
        """Whether a read of a unit in parts is served: within a pass; of embeddings and head until its backward has ended, as the root's would be."""
        if self.running:
            return True
        return unit in self.ends and self.had_gradients and not in_backward() and Unit.of(self.model).is_gathered

    def lend(self, unit: Unit) -> None:
        """Gathers a unit because of somebody who reads it in the pass under way. What gradients may come from is held until its backward."""
        unit.gather()
        self.lent.append(unit)
        if torch.is_grad_enabled() and unit not in self.held:
            self.held[unit] = unit.hold()

    def _let_go(self) -> None:
        while self.held:
            unit, before = self.held.popitem()
            unit.let_go(before)

    def _see_backward(self, gradient: torch.Tensor) -> None:
        self.backward_came = True

    @torch._disable_dynamo
    def _begin(self, module: nn.Module, args: tuple) -> None:
        if in_backward():
            self.running = True
            return
        root = self.prepare()
        self.late.begin()
        if self.looked_at:
            self.looked_at = False
            self.late.look()
        self.running = True
        self.lent.clear()
        if self.backward_came:
            self._let_go()
            self.backward_came = False
        if root.backward_broke_off:
            root.end_backward(self.model)
        if root.forward_broke_off() or self.had_gradients or torch.is_grad_enabled():
            for unit in root.units:
                unit.begin_anew(forget=True)
        if torch.is_inference_mode_enabled():
            for unit in root.units:
                unit.gather_once()
        for member in self.members:
            member.following = None
        for member in self.throughout:
            member.unit.gather()
        self.had_gradients = torch.is_grad_enabled()

    @torch._disable_dynamo
    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        self.running = False
        if in_backward():
            return
        for member in self.members:
            member.close()
        for member in self.throughout:
            member.end(output)
        if self.lent or self.held:
            self._end_loans(output)
        for unit in self.prepare().units:
            unit.forget()

    def _end_loans(self, output: object) -> None:
        """What was read goes into a backward pass, if there is to be one, as the root does."""
        if not torch.is_grad_enabled():
            for unit in self.lent:
                unit.part()  # so that who asks for ``parameters()`` gets what the optimizer steps
            return
        for unit in self.held:
            unit.watch(output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(self._see_backward)


@dataclass
class Together:
    """The step that makes consecutive layers one module for FSDP2: its forward begins before the first and ends after the last.

    That is so where the layers run in their order within a pass. A layer that is called otherwise (by itself, again, or out of order) is a
    forward of the unit by itself, which gathers the weights as they are then.

    Attributes:
        layers: in their order.
        modules: one of each FSDP2 unit that the layers' parameters are in, the layers' own first. None is resharded after a forward.
        passes: those of the model.
        following: which layer goes on with what the one before it began, if it comes next.
        alone: whether what runs now ends with the layer that runs.
    """

    layers: list[nn.Module]
    modules: list[nn.Module]
    passes: Passes
    units: list[Unit] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    following: int | None = None
    alone: bool = False

    def do(self) -> None:
        """Replaces FSDP2's forward hooks. Its own do not come back: the steps that shard are undone with this one."""
        self.units = [Unit.of(module) for module in self.modules]
        for unit in self.units:
            unit.take_over()
        for index, layer in enumerate(self.layers):
            before, after = functools.partial(self._before, index), functools.partial(self._after, index)
            self.handles.append(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(after))
        self.passes.members.append(self)

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()
        self.passes.members[:] = [member for member in self.passes.members if member is not self]

    def close(self) -> None:
        """Ends what a pass has left open, because it has skipped layers or has broken off."""
        if self.following is not None:
            self.following = None
            for unit in self.units:
                unit.end_forward()
            self._part_without_gradients()

    @torch._disable_dynamo
    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._recomputes():
            if self.passes.running and self.following == index:
                return None
            self._open(index)
        for unit in self.units:
            args, kwargs = unit.pre_forward(module, args, kwargs)
        return args, kwargs

    def _open(self, index: int) -> None:
        """Begins a forward. What is gathered is from an earlier one; what is on its way may be, unless a pass has just sent for it."""
        inside = self.passes.running
        self.passes.prepare()
        self.following, self.alone = None, index != 0 or not inside
        for unit in self.units:
            if inside and unit in self.passes.lent:
                unit.end_forward()  # it was gathered in this pass, and who read it goes on reading
            else:
                unit.begin_anew(forget=not inside)

    @torch._disable_dynamo
    def _after(self, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._recomputes():
            for unit in self.units:
                output = unit.post_forward(module, args, output)
        elif self.alone or index == len(self.layers) - 1:
            self.following, self.alone = None, False
            for unit in self.units:
                output = unit.post_forward(module, args, output)
            self._part_without_gradients()
        else:
            self.following = index + 1
            for unit in self.units:
                output = unit.before_backward(output)  # the loss may depend on this layer and not on the last one
        return output

    def _recomputes(self) -> bool:
        """Whether a backward pass has come to these layers and needs their forward again. FSDP2 has nothing to begin or end then."""
        return self.units[0].in_backward and in_backward()

    def _part_without_gradients(self) -> None:
        # So that who asks for ``parameters()`` after a pass without gradients gets what the optimizer steps.
        if not torch.is_grad_enabled():
            for unit in self.units:
                unit.part()


@dataclass
class Throughout:
    """The step that gathers an FSDP2 unit when a pass of the model begins, and reduces its gradients when a backward pass has ended.

    For parameters all over the model that are few and small: nothing is gathered and reduced for them layer by layer. Where a part of the
    model is called by itself, they are gathered as they are then.

    Attributes:
        modules: the outermost of the unit. It is not resharded after a forward.
        parts: what may be called by itself and reads these parameters: layers, and modules outside of all layers.
        passes: those of the model.
    """

    modules: list[nn.Module]
    parts: list[nn.Module]
    passes: Passes
    unit: Unit = field(init=False)
    handles: list[RemovableHandle] = field(default_factory=list)

    def do(self) -> None:
        """Replaces FSDP2's forward hooks. Its own do not come back: the step that shards is undone with this one."""
        self.unit = Unit.of(self.modules[0])
        self.unit.take_over()
        for module in self.parts:
            self.handles.append(module.register_forward_pre_hook(self._before, prepend=True))
            self.handles.append(module.register_forward_hook(self._after))
        self.passes.throughout.append(self)

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()
        self.passes.throughout[:] = [member for member in self.passes.throughout if member is not self]

    def end(self, output: Any) -> None:
        """After a pass, or after a part by itself. What they return may need these parameters in its backward, whatever comes in between."""
        if torch.is_grad_enabled():
            self.unit.watch(output)
        else:
            self.unit.part()  # so that who asks for ``parameters()`` gets what the optimizer steps

    @torch._disable_dynamo
    def _before(self, module: nn.Module, args: tuple) -> None:
        if not self.passes.running and not in_backward():
            self.passes.prepare()
            self.unit.begin_anew(forget=True)
        self.unit.gather()

    @torch._disable_dynamo
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled() or not (self.passes.running or in_backward()):
            self.end(output)
