"""A whole state dict into a sharded model: each rank takes its parts of what ``load_state_dict`` is given, and nothing is sent.

Trainer loads so when it resumes and when it loads the best model, and peft when it loads an adapter. What is given may have the names of a
checkpoint, where experts lie one by one: transformers' own conversions make the model's tensors of them, as in `load_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from .fsdp2 import part
from .pieces import box_of, local_part
from .recipes import assigned_recipes
from .twin import meta_twin


@dataclass(frozen=True)
class _Given:
    """Tensors by key, as `recipes` asks for those of files."""

    file_of: Mapping[str, Tensor]


def in_parts(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank has of a state dict, by the names of the model; DTensors stay as they are. The model's units are in parts afterwards.

    Args:
        model: a sharded model, or what is around it.
        given: whole tensors or DTensors, by names of the model or of its checkpoints; names of neither are passed on.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            part(module)  # a forward leaves the outermost parameters whole, and they are not what the optimizer steps
    places = dict(model.named_parameters(remove_duplicate=False))
    foreign = isinstance(model, PreTrainedModel) and not model.state_dict().keys() >= given.keys()
    named = _converted(model, given) if foreign else given.items()
    return {name: part_of(value, places.get(name)) for name, value in named}


def part_of(value: object, like: Tensor | None) -> object:
    """This rank's part of a whole tensor, placed like a DTensor of its shape; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    local = value.detach()[box_of(like).index] if local_part(like).numel() else value.new_empty(local_part(like).shape)
    local = local.to(local_part(like).device).contiguous()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _converted(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors from those of a checkpoint, one after the other. Of several files each is given alone: what is still to come is waited for."""
    waiting: dict[str, Tensor] = vars(model).setdefault("_moepatch_waiting", {})
    given = {**waiting, **given}
    waiting.clear()
    twin = meta_twin(model)
    names = twin.state_dict()
    recipes, extra = assigned_recipes(twin, get_model_conversion_mapping(twin), names, _Given(given))
    own = model.state_dict().keys()
    for recipe in recipes:
        sources = {key: given[key] for key, _ in recipe.sources}
        shapes = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in sources.items()}
        if recipe.converter is not None and any(value.shape != names[name].shape for name, value in _made(recipe, twin, shapes).items()):
            waiting.update(sources)
            continue
        # Experts that were a list of modules are translated by their module, which has those of this rank.
        yield from ((name, value) for name, value in recipe.convert(twin, sources).items() if name in own or name not in names)
    yield from ((name, given[name]) for name in extra)


def _made(recipe, twin: PreTrainedModel, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a recipe makes of shapes; something of another shape where they are too few."""
    try:
        return recipe.convert(twin, shapes)
    except (RuntimeError, IndexError, ValueError):
        return {recipe.name: torch.empty(0, dtype=torch.float32, device="meta")}
