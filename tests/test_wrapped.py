"""A patched model in the hands of torch's and accelerate's wrappers: what two steps do to every weight is what they do to the plain model's."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import zoo
from compare import error
from ranks import on_ranks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from wrappings import PREFETCH, SHARD_GRAD, accelerated, ddp, emptied, fsdp1, fsdp2, steps

import moepatch

#: Family, whether the head is tied, gradient checkpointing (None, or whether it is reentrant), the wrapping.
DDP = {
    "plain": ("qwen3_moe", False, None, ddp()),
    "tied, views": ("qwen3_moe", True, None, ddp(gradient_as_bucket_view=True, broadcast_buffers=False)),
    "unused": ("qwen3_moe", False, None, ddp(find_unused_parameters=True)),
    "static, reentrant": ("gpt_oss", False, True, ddp(static_graph=True)),
    "static": ("qwen3_moe", True, None, ddp(static_graph=True)),
    "hook": ("deepseek_v3", False, None, ddp("allreduce_hook", bucket_cap_mb=0.1)),
    "powersgd": ("qwen3_moe", False, False, ddp("powersgd")),
}
FSDP1 = {
    "whole": ("qwen3_moe", True, None, fsdp1("whole")),
    "layers": ("gpt_oss", False, False, fsdp1("layers", use_orig_params=True)),
    "linears": ("qwen3_moe", False, None, fsdp1("linears")),
    "linears, own": ("gpt_oss", False, None, fsdp1("linears", use_orig_params=True, **PREFETCH)),
    "leaves": ("deepseek_v3", False, None, fsdp1("leaves", use_orig_params=True)),
    "head": ("qwen3_moe", False, None, fsdp1("head", use_orig_params=True)),
    "head, kept": ("qwen3_moe", False, None, fsdp1("head", **SHARD_GRAD)),
    "experts": ("gpt_oss", False, None, fsdp1("experts")),
    "size": ("qwen3_moe", False, None, fsdp1(3000)),
}
FSDP2 = {
    "whole": ("qwen3_moe", True, None, fsdp2()),
    "layers": ("deepseek_v3", False, False, fsdp2("layers")),
    "linears": ("gpt_oss", False, None, fsdp2("linears")),
    "everything": ("qwen3_moe", False, None, fsdp2("layers", "leaves", reshard_after_forward=True)),
    "head": ("gpt_oss", False, None, fsdp2("head", "experts", reshard_after_forward=False)),
    "accelerate": ("qwen3_moe", False, None, accelerated(auto_wrap_policy="transformer_based_wrap")),
}


def built(name: str, tied: bool = False, reentrant: bool | None = None) -> torch.nn.Module:
    model = zoo.build(name, tie_word_embeddings=tied).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def given(name: str, model) -> dict:
    ids = zoo.inputs(name, model, seed=dist.get_rank() if dist.is_initialized() else 0)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def patched(model):
    return moepatch.optimize(model, measure=False, verify=False)


def compare(table: str) -> list[str]:
    """Where the patched model ends elsewhere than the plain one, in words."""
    said = []
    for case, (name, tied, reentrant, wrap) in globals()[table].items():
        plain, model = built(name, tied, reentrant), patched(built(name, tied, reentrant))
        before, inputs = {key: p.detach().clone() for key, p in plain.named_parameters()}, given(name, plain)
        losses, truth = steps(wrap(plain), plain, inputs, accumulated=case == "hook")
        found_losses, found = steps(wrap(model), model, inputs, accumulated=case == "hook")
        assert found.keys() == truth.keys(), (case, found.keys() ^ truth.keys())
        moved = {key: value - before[key] for key, value in truth.items()}
        assert min(step.norm() for step in moved.values()) > 0, f"{case}: a weight of the plain model was not trained"
        said += [f"{case}: {key}" for key, step in moved.items() if error(found[key] - before[key], step) > 5e-5]
        said += [f"{case}: losses {found_losses}, not {losses}"] * (max(abs(a - b) for a, b in zip(losses, found_losses)) > 5e-5)
    return said


@pytest.mark.parametrize("table", ["DDP", "FSDP1", "FSDP2"])
def test_two_steps_do_what_they_do_to_the_plain_model(table):
    assert on_ranks(2, compare, table) == [[], []]
