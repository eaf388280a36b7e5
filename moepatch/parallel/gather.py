"""When FSDP2 gathers what, and how long it stays: what `apply.shard` decides besides who owns which part.

- Decoder layers gather ahead: the next ones' parameters travel while some compute.
- Embeddings and head, the largest parameters that are no experts, are units of their own, so that neither they nor their gradients stay
  whole through the backward pass: the head's are reduced at its beginning, the embeddings' at its end, and embeddings need no weights there.
- Dense parameters may stay gathered from forward to backward (`may_stay`). A layer's backward then releases them and makes its gradients,
  so where the gradients of its experts are larger, memory is at its highest at the end all the same, and half of the gathers are saved.
- Layers that stay are gathered several at a time (`bundles`), which saves the host most of its work for each.
- FSDP2 wants one dtype in a unit. What has another one than its layer (`odd_parameters`) is one unit for the whole model where it is small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

#: Bytes of parameters that layers may have together to be gathered at once: enough for a fast collective and little work for the host, little beside a model.
BUNDLE_BYTES = 256 * 2**20

#: Bytes of parameters that may be gathered for a whole pass because their dtype is not that of their layers, to save a unit a layer or bundle.
ODD_BYTES = 2**30


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
    """The layers of a model: the elements of `layer_lists`, each once."""
    return list({id(layer): layer for layers in layer_lists(model) for layer in layers}.values())


def bundles(layers: list[nn.Module], ignored: set[nn.Parameter]) -> list[list[nn.Module]]:
    """Consecutive layers that are gathered at once: as many as have `BUNDLE_BYTES` of dense parameters, with one usual dtype.

    Args:
        ignored: parameters that are not gathered.
    """
    found: list[list[nn.Module]] = []
    room, dtype = 0, None
    for layer in layers:
        size = sum(p.numel() * p.element_size() for p in layer.parameters() if p not in ignored and not isinstance(p, DTensor))
        usual = usual_dtype(layer, ignored)
        if not found or size > room or None not in (usual, dtype) and usual != dtype:
            found.append([])
            room, dtype = BUNDLE_BYTES, None
        found[-1].append(layer)
        room, dtype = room - size, dtype or usual
    return found


def usual_dtype(unit: nn.Module, ignored: set[nn.Parameter]) -> torch.dtype | None:
    """That of most of the dense parameters that are trained, None if there are none."""
    counts: dict[torch.dtype, int] = {}
    for p in unit.parameters():
        if p.requires_grad and p not in ignored and not isinstance(p, DTensor):
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=counts.get, default=None)


def odd_parameters(unit: nn.Module, ignored: set[nn.Parameter]) -> dict[torch.dtype, list[nn.Parameter]]:
    """Those that are trained and have another dtype than is usual there, such as norms, routers and sinks that are kept in fp32, by dtype."""
    usual, found = usual_dtype(unit, ignored), {}
    for p in unit.parameters():
        if p.requires_grad and p not in ignored and not isinstance(p, DTensor) and p.dtype != usual:
            found.setdefault(p.dtype, []).append(p)
    return found


def small_odd(model: nn.Module, ignored: set[nn.Parameter]) -> dict[torch.dtype, list[nn.Parameter]]:
    """The odd parameters of all layers and of what is outside of them, by dtype; none if they have more than `ODD_BYTES`."""
    found: dict[torch.dtype, list[nn.Parameter]] = {}
    seen = set(ignored)
    for unit in (*units(model), *(end for end in ends(model) if end is not None), model):
        for dtype, parameters in odd_parameters(unit, seen).items():
            found.setdefault(dtype, []).extend(parameters)
        seen.update(unit.parameters())
    size = sum(p.numel() * p.element_size() for parameters in found.values() for p in parameters)
    return found if size <= ODD_BYTES else {}


def owners(root: nn.Module, parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
    """The modules that have some of these parameters themselves, outer ones first."""
    wanted = set(parameters)
    return [module for module in root.modules() if not wanted.isdisjoint(p for p in module._parameters.values() if p is not None)]


def ends(model: nn.Module) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """Input embeddings and output head, where they are ordinary modules whose weights nobody shares (tied ones belong to the root)."""
    if not isinstance(model, PreTrainedModel):
        return None, None
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    listed = {id(module) for layer in units(model) for module in layer.modules()}

    def alone(module: nn.Module | None, kind: type[nn.Module]) -> bool:
        simple = isinstance(module, kind) and id(module) not in listed and len({p.dtype for p in module.parameters()}) == 1
        return simple and all(shared[id(p)] == 1 for p in module.parameters())

    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # a model that embeds no tokens
        embeddings = None
    head = model.get_output_embeddings()
    return embeddings if alone(embeddings, nn.Embedding) else None, head if alone(head, nn.Linear) else None


def may_stay(units: Iterable[nn.Module], experts: set[nn.Parameter]) -> bool:
    """Whether the dense parameters of all units, gathered, take no more memory than the gradients of a rank's experts will.

    Every rank has to find the same, so a rank's share is what it is on average: where experts do not divide evenly, some have more than others.

    Args:
        experts: DTensors, of which each rank holds a part.
    """
    gathered = sum(p.numel() * p.element_size() for unit in units for p in unit.parameters() if not isinstance(p, DTensor))
    gradients = sum(p.numel() * p.element_size() // _shares(p) for p in experts if p.requires_grad)
    return gathered <= gradients


def _shares(parameter: DTensor) -> int:
    """Into how many parts a DTensor is cut."""
    mesh = parameter.device_mesh
    return math.prod(mesh.size(dim) for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())


@dataclass
class GatherAhead:
    """The step that lets FSDP2 units gather while those before them compute.

    Attributes:
        chain: in the order of the forward pass, in which all of them run: a module of each unit, units that are gathered at once together.
    """

    chain: list[list[nn.Module]]

    def do(self) -> None:
        """Says so to FSDP2, for the forward pass; in the backward pass it follows the order that it has seen."""
        for units, following in itertools.pairwise(self.chain):
            units[-1].set_modules_to_forward_prefetch(following)

    def undo(self) -> None:
        """Back to FSDP2's default."""
        for units in self.chain:
            units[-1].set_modules_to_forward_prefetch([])


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
