"""A weight that somebody reads while the model's forward runs, and while its own FSDP2 unit is in parts: it is gathered and reduced like any other.

A head that computes its own loss multiplies by the head's weight and never calls it; a penalty reads a router before its layer has run. Where
FSDP2 has one unit for all of that, it finds the whole weight. moepatch has a unit for the head, one for the embeddings and one for a few
layers, and would hand out a DTensor; whoever calls ``full_tensor()`` on that gets a gradient that no rank adds up. So a module's dict of
parameters looks at what it gives out, as that of DeepSpeed's ZeRO-3 does: a weight in parts is lent for the pass (`Passes.lend`).

What reads all parameters of a model (``parameters()``, ``state_dict()``) does not come by here, and gets what the optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .fsdp2 import Unit
from .passes import Passes, in_backward


class Lent(dict):
    """The parameters of a module by name; those that are in parts are gathered when somebody reads them in a forward pass of the model."""

    __slots__ = ("passes", "units")

    def __init__(self, parameters: dict[str, nn.Parameter | None], units: dict[str, Unit], passes: Passes):
        super().__init__(parameters)
        self.units, self.passes = units, passes

    def __getitem__(self, name: str, _get=dict.__getitem__) -> nn.Parameter | None:
        parameter = _get(self, name)
        if type(parameter) is DTensor:
            if name in self.units and self.passes.lends(self.units[name]):
                self.passes.lend(self.units[name])
                return _get(self, name)
            if not self.passes.running:
                self.passes.looked_at |= not in_backward()  # perhaps by somebody who is about to put an adapter around it
        return parameter

    def __reduce_ex__(self, protocol):
        return dict, (dict(self),)  # a copy of the module is nobody's unit


@dataclass
class LendWeights:
    """The step that serves reads of a sharded model's dense weights. It comes when all units are made.

    Attributes:
        modules: one of each unit whose weights are lent; not the root, which is gathered for the whole pass anyway.
        experts: modules whose own parameters stay spread over ranks; that they are looked at is seen, and no more.
        ends: units of embeddings and head.
        passes: those of the model.
    """

    modules: list[FSDPModule]
    ends: list[FSDPModule]
    experts: list[nn.Module]
    passes: Passes
    changed: list[nn.Module] = field(default_factory=list)

    def do(self) -> None:
        """Puts `Lent` in the place of each module's dict of parameters."""
        places: dict[nn.Module, dict[str, Unit]] = {module: {} for module in self.experts}
        self.passes.ends.update(map(Unit.of, self.ends))
        for unit in map(Unit.of, self.modules):
            for module, name in unit.places():
                places.setdefault(module, {})[name] = unit
        for module, units in places.items():
            self.changed.append(module)
            module.__dict__["_parameters"] = Lent(module._parameters, units, self.passes)

    def undo(self) -> None:
        """Puts ordinary dicts back."""
        while self.changed:
            module = self.changed.pop()
            module.__dict__["_parameters"] = dict(module._parameters)


def passes_of(model: nn.Module) -> Passes | None:
    """The step that watches the passes of a sharded model."""
    return next((m._parameters.passes for m in model.modules() if isinstance(m._parameters, Lent)), None)
