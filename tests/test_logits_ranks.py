"""Deferred logits under frameworks that take two ranks: loss, gradients and what is read are those of the unpatched model in the same wrapping."""

from __future__ import annotations

import copy

import compare
import pytest
import test_logits_graph as graph
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_loss import patch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.nn import functional as differentiable
from torch.nn.parallel import DistributedDataParallel

from moepatch.layers.loss.head import Head


def fsdp(model, units=(), **options):
    policy = ModuleWrapPolicy(set(units)) if units else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


#: By name: whether a step without a look makes no logits, and the wrapping.
WRAPPINGS = {
    "nothing": (True, lambda m: m),
    "ddp": (True, lambda m: DistributedDataParallel(m)),
    "ddp, unused": (True, lambda m: DistributedDataParallel(m, find_unused_parameters=True)),
    "ddp, static": (True, lambda m: DistributedDataParallel(m, static_graph=True)),
    "fsdp": (True, lambda m: fsdp(m, use_orig_params=True)),
    "fsdp, flat": (True, lambda m: fsdp(m, use_orig_params=False)),
    "fsdp, layers": (True, lambda m: fsdp(m, {type(m.model.layers[0])}, use_orig_params=True)),
    "fsdp, a unit for the head": (False, lambda m: fsdp(m, {nn.Linear}, use_orig_params=True)),
    "fsdp, a unit for the head, flat": (False, lambda m: fsdp(m, {nn.Linear}, use_orig_params=False)),
    "fsdp, a unit for the head that stays": (True, lambda m: fsdp(m, {nn.Linear}, use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)),
}


def inputs():
    found, rank = graph.inputs(), dist.get_rank()
    labels = found["labels"]
    return {"input_ids": (found["input_ids"] + rank) % graph.VOCAB, "labels": labels.where(labels < 0, (labels + rank) % graph.VOCAB)}


def loss(out):
    return out.loss, ()


def look(out):
    return out.loss + 1e-2 * out.logits.logsumexp(-1).square().mean(), (out.logits.detach(),)


def through_a_function(out):
    return graph.entropy(graph.Same.apply(out.logits)), ()


def gathered(out):
    """A collective that gradients pass through."""
    everyones = torch.cat(differentiable.all_gather(out.logits))
    return out.loss + everyones.square().mean(), (everyones.detach(),)


def reduced(out):
    total = out.logits.detach() + 0
    dist.all_reduce(total)
    other = out.logits.detach()
    dist.broadcast(other, 0)
    return out.loss, (total, other)


USES = (loss, look, through_a_function, gathered, reduced)


def step(model, use):
    model.zero_grad()
    torch.manual_seed(0)
    value, seen = use(model(**inputs()))
    value.backward()
    return [value.detach(), *(t + 0 for t in seen)], [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def walk(names, uses):
    calls, own = [], Head.logits
    Head.logits = lambda self: calls.append(1) or own(self)
    for name in names:
        free, wrap = WRAPPINGS[name]
        plain = graph.MODELS["plain"]()
        patched = copy.deepcopy(plain)
        patch(patched)
        plain, patched = wrap(plain), wrap(patched)
        for use in uses:
            del calls[:]
            wanted, truths = step(plain, use)
            found, grads = step(patched, use)
            for a, z in zip(found + grads, wanted + truths, strict=True):
                assert (a is None) == (z is None) and (z is None or compare.error(a, z) <= 1e-5), (name, use.__name__)
            assert calls == [] or not (free and use is loss), name


@pytest.mark.parametrize("framework", ["ddp", "fsdp"])
def test_two_ranks(framework):
    on_ranks(2, walk, [name for name in WRAPPINGS if name.startswith("fsdp") == (framework == "fsdp")], USES)
