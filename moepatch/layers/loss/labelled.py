"""The model around a head whose loss is fused: it knows whether there are labels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from .head import deferring


class Labelled:
    """Mixed into the class of a patched ``PreTrainedModel``: a forward pass with labels lets patched heads defer their logits.

    The forward keeps its signature, which transformers' Trainer reads. PEFT calls ``model.forward`` and not the model, so hooks would not do.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "_moepatch_parts" in vars(cls):
            cls.forward = _with_deferring(super(Labelled, cls).forward)


#: With these, FSDP1 keeps a unit's weights from its forward to its backward.
_STAYS = (ShardingStrategy.NO_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy._HYBRID_SHARD_ZERO2)


def _leaves(head: nn.Module | None) -> bool:
    """Whether a head is an FSDP1 unit of its own, whose weights are freed before the loss is computed: then its logits cannot wait."""
    if head is None or type(head) is nn.Linear:
        return False
    return any(isinstance(part, FullyShardedDataParallel) and part.sharding_strategy not in _STAYS for part in head.modules())


def _with_deferring(forward):
    names = list(inspect.signature(forward).parameters)
    position = names.index("labels") - 1 if "labels" in names else None  # among the arguments after self

    @functools.wraps(forward)
    def labelled(self, *args, **kwargs):
        forward = super(Labelled, self).forward  # as it is now: somebody may have given the class another one
        labels = kwargs.get("labels") if position is None or len(args) <= position else args[position]
        if labels is None or torch.compiler.is_compiling() or _leaves(self.get_output_embeddings()):
            return forward(*args, **kwargs)
        with deferring(kwargs.get("num_items_in_batch"), self):
            return forward(*args, **kwargs)

    return labelled
