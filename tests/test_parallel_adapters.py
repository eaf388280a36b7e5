"""LoRA of peft on a mesh: on experts' own parameters, before and after `optimize`; gradients are those of one process."""

from __future__ import annotations

import compare
import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import batch, check_gradients, mesh_of, whole
from test_parallel_training import lora

import moepatch

pytest.importorskip("peft")

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]}
NAMES = {"qwen3_moe": EXPERTS, "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj_bias"]}}


def reference(name, ranks, targets):
    model = lora(zoo.build(name), **targets)
    for r in range(ranks):
        (zoo.loss(model(**batch(name, model, r))) / ranks).backward()
    return model, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def experts_adapted(dims, recompute=False):
    from peft import LoraConfig

    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in ("qwen3_moe",):
        truth, grads = reference(name, ranks, NAMES[name])
        assert sum("experts" in key for key in grads) == 8
        model = moepatch.optimize(lora(zoo.build(name), **NAMES[name]), mesh_of(dims), verify=False)
        if recompute:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            out = model(**batch(name, model, rank))
            out.logits  # noqa: B018
            zoo.loss(out).backward()
            check_gradients(model, grads)
            model.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            plain = zoo.build(name)
            assert compare.error(model(**batch(name, model, rank)).logits, plain(**batch(name, plain, rank)).logits) <= 1e-6
        assert isinstance(LoraConfig, type)
        moepatch.restore(model)
        zoo.loss(model(**batch(name, model, rank))).backward()
        assert [type(m) for m in model.modules()] == [type(m) for m in truth.modules()]
        for key, p in truth.named_parameters():
            assert torch.equal(model.get_parameter(key), p)


@pytest.mark.parametrize(("dims", "recompute"), [({"ep": 2}, False), ({"dp_shard": 2, "ep": 1}, False), ({"dp_shard": 2, "ep": 2}, True)])
def test_adapters_on_experts_that_are_spread(dims, recompute):
    on_ranks(torch.Size(dims.values()).numel(), experts_adapted, dims, recompute)
