"""Adapters of peft on a sharded model: saved as one process saves them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..surgery import original_class
from .agree import together
from .save import WRITER, sharding_mesh
from .trainer import Sharded

_WHAT = "save_pretrained()"


class ShardedAdapters(Sharded):
    """A ``PeftModel`` around a sharded model."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As peft's own, on all ranks; rank 0 writes. What is written is gathered, and nothing else."""
        return save_adapters(self, super().save_pretrained, save_directory, args, kwargs)

    def _get_base_model_class(self, *args, **kwargs) -> type:
        # peft writes its name into the adapter's config, for a process without shards.
        return original_class(self.get_base_model())


def save_adapters(model: nn.Module, write: Callable[..., None], directory: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """``PeftModel.save_pretrained`` of a sharded model.

    Args:
        model: the ``PeftModel``.
        write: peft's own.
        directory, args, kwargs: what `write` is to be called with; ``state_dict`` may hold DTensors or whole tensors, of all ranks alike.
    """
    mesh, state = sharding_mesh(model), kwargs.get("state_dict")
    if mesh is None:
        return write(directory, *args, **kwargs)
    asked = inspect.signature(write).bind(directory, *args, **kwargs)
    asked.apply_defaults()
    state = model.state_dict() if state is None else state
    with together(_WHAT, mesh):
        wanted = _written(model, state, asked.arguments)
    rank, whole = dist.get_rank(), {}
    for key in wanted:
        value = state[key]
        value = value.detach().full_tensor() if isinstance(value, DTensor) else value
        if rank == WRITER:
            whole[key] = value.cpu() if isinstance(value, Tensor) else value
    with together(_WHAT, mesh):
        if rank == WRITER and asked.arguments["is_main_process"]:
            write(directory, *args, **{**kwargs, "state_dict": whole})


def _written(model: nn.Module, state: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """The keys of a state dict that peft writes, found by handing it empty tensors: all, if it makes others of them."""
    from peft import get_peft_model_state_dict

    stand_ins = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value for key, value in state.items()}
    of_value = {id(value): key for key, value in stand_ins.items()}
    found: set[str] = set()
    for adapter in options["selected_adapters"] or list(model.peft_config):
        kept = get_peft_model_state_dict(model, dict(stand_ins), adapter, save_embedding_layers=options["save_embedding_layers"])
        if not all(id(value) in of_value for value in kept.values()):
            return list(state)
        found.update(of_value[id(value)] for value in kept.values())
    return [key for key in state if key in found]
