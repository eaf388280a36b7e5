"""When FSDP2 gathers what, and how long it stays: what `apply.shard` decides besides who owns which part.

- Decoder layers gather ahead: the next one's parameters travel while one computes.
- Embeddings and head, the largest parameters that are no experts, are units of their own, so that neither they nor their gradients stay
  whole through the backward pass: the head's are reduced at its beginning, the embeddings' at its end, and embeddings need no weights there.
- Dense parameters may stay gathered from forward to backward (`may_stay`). A layer's backward then releases them and makes its gradients,
  so where the gradients of its experts are larger, memory is at its highest at the end all the same, and half of the gathers are saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def layer_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The outermost lists of modules, such as the decoder layers; elements without parameters are left out."""
    found: list[list[nn.Module]] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child):
            found.append([element for element in child if next(element.parameters(), None) is not None])
        else:
            found += layer_lists(child)
    return found


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 gathers one at a time: the elements of `layer_lists`, each once."""
    return list({id(layer): layer for layers in layer_lists(model) for layer in layers}.values())


def ends(model: nn.Module) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """Input embeddings and output head, where they are ordinary modules whose weights nobody shares (tied ones belong to the root)."""
    if not isinstance(model, PreTrainedModel):
        return None, None
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    listed = {id(module) for layer in units(model) for module in layer.modules()}

    def alone(module: nn.Module | None, kind: type[nn.Module]) -> bool:
        return isinstance(module, kind) and id(module) not in listed and all(owners[id(p)] == 1 for p in module.parameters())

    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # a model that embeds no tokens
        embeddings = None
    head = model.get_output_embeddings()
    return embeddings if alone(embeddings, nn.Embedding) else None, head if alone(head, nn.Linear) else None


def may_stay(units: Iterable[nn.Module], experts: set[nn.Parameter]) -> bool:
    """Whether the dense parameters of all units, gathered, take no more memory than the gradients of this rank's experts will.

    Args:
        experts: DTensors, of which this rank holds a part.
    """
    gathered = sum(p.numel() * p.element_size() for unit in units for p in unit.parameters() if not isinstance(p, DTensor))
    gradients = sum(p.to_local().numel() * p.element_size() for p in experts if p.requires_grad)
    return gathered <= gradients


@dataclass
class GatherAhead:
    """The step that lets modules, FSDP2 units all, gather while the one before them computes.

    Attributes:
        chain: in the order of the forward pass, all of them run in it.
    """

    chain: list[nn.Module]

    def do(self) -> None:
        """Says so to FSDP2, for the forward pass; in the backward pass it follows the order that it has seen."""
        for module, following in itertools.pairwise(self.chain):
            module.set_modules_to_forward_prefetch([following])

    def undo(self) -> None:
        """Back to FSDP2's default."""
        for module in self.chain:
            module.set_modules_to_forward_prefetch([])


@dataclass
class Stay:
    """The step that keeps FSDP2 units which are not resharded after a forward pass from being seen or used at the wrong time.

    A forward pass without gradients ends with layers in parts, so that who asks for their ``parameters()`` then gets what the optimizer
    steps. And a forward pass after one with gradients gathers anew: what that one left, if its backward never came, may be from before the
    optimizer's step.

    Attributes:
        model: the root.
        layers: units that are in parts after a forward pass without gradients.
        head: a unit that stays, because the loss or the logits may be wanted later.
    """

    model: nn.Module
    layers: list[nn.Module]
    head: nn.Module | None
    handles: list[RemovableHandle] = field(default_factory=list)
    had_gradients: bool = False

    def do(self) -> None:
        """Adds hooks; that of the model comes before FSDP2's."""
        self.handles = [layer.register_forward_hook(_part_without_gradients) for layer in self.layers]
        self.handles.append(self.model.register_forward_pre_hook(self._part_all, prepend=True))

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()

    def _part_all(self, module: nn.Module, args: tuple) -> None:
        if self.had_gradients:
            for unit in (module, *self.layers, *([] if self.head is None else [self.head])):
                unit.reshard()
        self.had_gradients = torch.is_grad_enabled()


def _part_without_gradients(module: nn.Module, args: tuple, output: object) -> None:
    if not torch.is_grad_enabled():
        module.reshard()


@dataclass
class NoGatherInBackward:
    """The step for an FSDP2 unit whose backward does not read its parameters, such as embeddings."""

    module: nn.Module

    def do(self) -> None:
        """Says so to FSDP2."""
        self.module.set_unshard_in_backward(False)

    def undo(self) -> None:
        """Back to FSDP2's default."""
        self.module.set_unshard_in_backward(True)
