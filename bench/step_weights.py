"""Random weights that are made where they belong: the same for every stack, however it spreads them over ranks."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moepatch.parallel.pieces import box_of, local_part
from moepatch.parallel.twin import computed_buffers, meta_twin


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory, as transformers sets it up by itself."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def materialise(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Gives a model from the meta device, sharded or not, memory for what this rank holds, and fills it."""
    buffers = computed_buffers(meta_twin(model))
    model.to_empty(device=device)
    model.tie_weights()
    draw(model, seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name]) if name in buffers else buffer.zero_()


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Fills the parameters, sharded or not, where they are.

    Weights are normal with a deviation of 0.02, weights of norms 1, biases 0. Each parameter, and each expert of a stack, has a seed made from its name.
    """
    for name, parameter in model.named_parameters():
        _fill(name, parameter, seed)


def _fill(name: str, parameter: nn.Parameter, seed: int) -> None:
    local, box = local_part(parameter), box_of(parameter)
    if name.endswith("bias"):
        local.zero_()
    elif parameter.ndim == 1 and "norm" in name:
        local.fill_(1)
    elif parameter.ndim == 3 and parameter.shape[1] > 1 and box.size[1:] == tuple(parameter.shape[1:]):
        for row, expert in enumerate(range(box.offset[0], box.offset[0] + box.size[0])):
            _draw(local[row], f"{seed} {name} {expert}")
    elif box.size == tuple(parameter.shape):
        _draw(local, f"{seed} {name}")
    elif local.numel():
        whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        _draw(whole, f"{seed} {name}")
        local.copy_(whole[box.index])


def _draw(into: Tensor, key: str) -> None:
    into.normal_(std=0.02, generator=torch.Generator(into.device).manual_seed(zlib.crc32(key.encode())))
