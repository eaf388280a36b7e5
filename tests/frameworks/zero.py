"""DeepSpeed on the CPU, on the ranks of tests/ranks.py: engines of every ZeRO stage, their steps, their whole weights."""

from __future__ import annotations

import deepspeed
import deepspeed.ops
import torch
from torch import nn

# What DeepSpeed would compile when its communication starts (shared memory between ranks: two minutes here) is said not to fit. Its own
# list is made when it is first read, by a compiler; a list that is there already is kept.
deepspeed.ops.__compatible_ops__ = {}


def settings(stage: int, **more) -> dict:
    """A configuration with a persistence threshold of 0: ZeRO-3 empties every parameter, however small."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 100_000}
    return {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero, **more}


def engine(model: nn.Module, stage: int, lr: float = 0.5, **more):
    """`deepspeed.initialize`, with plain SGD: what a step does to a weight is its gradient."""
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), config=settings(stage, **more))[0]


def trained(made, given: dict, steps: int = 2) -> list[float]:
    """So many steps on the same input; their losses."""
    losses = []
    for _ in range(steps):
        loss = made(**given).loss
        made.backward(loss)
        made.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by name, gathered. Every rank has to call it."""
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}
