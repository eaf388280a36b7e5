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
from moepatch.parallel.reads import passes_of

pytest.importorskip("peft")

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]}
NAMES = {"qwen3_moe": EXPERTS, "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}}


def reference(name, ranks, targets):
    model = lora(zoo.build(name), **targets)
    for r in range(ranks):
        (zoo.loss(model(**batch(name, model, r))) / ranks).backward()
    return model, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def experts_adapted(dims, recompute=False):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in NAMES:
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
        moepatch.restore(model)
        zoo.loss(model(**batch(name, model, rank))).backward()
        assert [type(m) for m in model.modules()] == [type(m) for m in truth.modules()]
        for key, p in truth.named_parameters():
            assert torch.equal(model.get_parameter(key), p)


@pytest.mark.parametrize(("dims", "recompute"), [({"ep": 2}, False), ({"dp_shard": 2, "ep": 1}, False), ({"dp_shard": 2, "ep": 2}, True)])
def test_adapters_on_experts_that_are_spread(dims, recompute):
    on_ranks(torch.Size(dims.values()).numel(), experts_adapted, dims, recompute)


def broken_off(model, rank):
    """A backward pass that ends with an error after it has come to an adapter, as one without memory does."""

    def fail(parameter):
        raise RuntimeError("no memory")

    handles = [p.register_post_accumulate_grad_hook(fail) for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="no memory"):
        zoo.loss(model(**batch("qwen3_moe", model, rank))).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()


def others(model, rank):
    """Another adapter of another dtype, while the first is there and rests, and when it is gone."""
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(r=2, target_modules=["embed_tokens"]))
    for key, p in model.named_parameters():
        if ".second." in key:
            p.data = p.data.bfloat16()
    model.set_adapter("second")
    for _ in range(2):
        model.zero_grad()
        zoo.loss(model(**batch("qwen3_moe", model, rank))).backward()
        second = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert len(second) == 2 and any(p.grad.any() for p in second.values())
        for p in second.values():
            everyones = [torch.empty_like(p.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(everyones, p.grad)
            assert all(torch.equal(one, p.grad) for one in everyones)
        if "default" in model.peft_config:
            model.delete_adapter("default")
            model.set_adapter("second")
    passes_of(model).late.look()
    assert {id(p) for p in passes_of(model).late.parameters} == {id(p) for p in second.values()}


def late(dims):
    """Adapters that come after `optimize`: equal on all ranks from the first pass on, and so are their gradients; or words."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    embeddings = {"target_modules": ["embed_tokens"], "target_parameters": EXPERTS["target_parameters"]}
    truth = lora(zoo.build("qwen3_moe"), **embeddings)
    grads = {}
    for step in (0, 1):
        for r in range(ranks):
            (zoo.loss(truth(**batch("qwen3_moe", truth, r + 10 * step))) / ranks).backward()
        grads[step] = {key: p.grad.clone() for key, p in truth.named_parameters() if p.requires_grad}
    model = lora(moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(dims), verify=False), **embeddings)
    if rank:  # as with random values of each rank's own
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1) if p.requires_grad else None
    for step in (0, 1):  # added up
        zoo.loss(model(**batch("qwen3_moe", model, rank + 10 * step))).backward()
        check_gradients(model, grads[step])
    broken_off(model, rank)
    for step in (0, 1):
        zoo.loss(model(**batch("qwen3_moe", model, rank + 10 * step))).backward()
    check_gradients(model, grads[1])
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    torch.optim.SGD(truth.parameters(), lr=0.1).step()
    for key in grads[1]:
        assert compare.error(whole(model.get_parameter(key)), truth.get_parameter(key)) <= 1e-5, key

    others(model, rank)

    sized = lora(moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(dims), verify=False), target_modules=["q_proj"])
    with pytest.raises(moepatch.MoePatchError, match="q_proj.*outputs and the layer.*Put adapters on first"):
        sized(**batch("qwen3_moe", sized, rank))


@pytest.mark.parametrize("dims", [{"ep": 2}, {"dp_shard": 2, "ep": 1}, {"dp_replicate": 2, "ep": 2}])
def test_adapters_that_come_after_optimize(dims):
    on_ranks(torch.Size(dims.values()).numel(), late, dims)
