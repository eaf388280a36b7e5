"""The model as transformers knows it: the same class and config without patch, shards or weights.

transformers looks conversions up by class name and by where the class is defined, and FSDP2 changes both; so what is to be known about
names, shapes and buffers is asked of a twin on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..source import building
from ..surgery import Patched


def meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model of the unpatched class, on the meta device; its tensors have the model's dtypes."""
    cls = next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, (FSDPModule, Patched)))
    with building(), torch.device("meta"):
        twin = cls(copy.deepcopy(model.config))
    # The default dtype, which would do the same, is one for all threads.
    known = {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        dtype = known.get(name, model.dtype)
        if tensor.is_floating_point() and dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)
    return twin


def knows_conversions(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if it was loaded from a checkpoint and remembers how, else its twin."""
    return model if getattr(model, "_weight_conversions", None) is not None else meta_twin(model)


def computed_buffers(twin: PreTrainedModel) -> dict[str, Tensor]:
    """The values of all buffers that checkpoints do not have, such as rotary frequencies; on the CPU.

    transformers builds every model on the meta device and then has `_init_weights` compute such buffers; so does this. The parameters stay
    on the meta device, where initialising them does nothing and draws no random numbers.

    Raises:
        CheckpointError: a buffer is not computed there.
    """
    runs = []
    for filler in (0, 1):
        for module, owner, names in _owners(twin):
            for name in names:
                module._buffers[name] = torch.full_like(module._buffers[name], filler, device="cpu")
            with torch.no_grad():
                owner._init_weights(module)
        runs.append({name: buffer.clone() for name, buffer in twin.named_non_persistent_buffers(remove_duplicate=False)})
    # What is left as it was filled differs between the two runs.
    unknown = [name for name, value in runs[0].items() if not torch.equal(value.nan_to_num(), runs[1][name].nan_to_num())]
    if unknown:
        which = f"{len(unknown)} buffers that checkpoints do not have: {', '.join(unknown[:5])}"
        raise CheckpointError(f"{type(twin).__name__} does not say how to compute {which}. Build the model on a real device instead.")
    return runs[0]


def _owners(twin: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel, list[str]]]:
    """Every module with such buffers, and the innermost transformers model around it, which knows how to initialise it."""
    for name, module in twin.named_modules():
        names = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
        if names:
            parts = name.split(".") if name else []
            around = [twin.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
            yield module, next(m for m in reversed(around) if isinstance(m, PreTrainedModel)), names
