"""Training on gloo ranks in every way that a loop may train: always the numbers of one process whose loss is the mean of the ranks'."""

from __future__ import annotations

import contextlib
import functools
import itertools

import compare
import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import batch, check_gradients, mesh_of, reference, whole
from torch.utils._python_dispatch import TorchDispatchMode

import moepatch
from moepatch.parallel.checkpointing import save_dispatch

EP2 = {"ep": 2}
MIXED = {"dp_shard": 2, "ep": 2}
REPLICATED = {"dp_replicate": 2, "ep": 2}


def gradients_agree(dims, *, name="qwen3_moe", inputs=batch, adapt=None, prepare=None):
    """One forward and backward on this rank against one process.

    Args:
        inputs: ``(name, model, rank) -> kwargs``.
        adapt: done to both models before anything else.
        prepare: done to the optimized model only.
    """
    logits, grads = reference(name, dist.get_world_size(), inputs, adapt)
    model = zoo.build(name)
    if adapt is not None:
        adapt(model)
    model = moepatch.optimize(model, mesh_of(dims), verify=False)
    if prepare is not None:
        prepare(model)
    output = model(**inputs(name, model, dist.get_rank()))
    assert compare.error(output.logits, logits[dist.get_rank()]) <= 1e-6
    zoo.loss(output).backward()
    check_gradients(model, grads)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(grads)
    return model


class Count(TorchDispatchMode):
    """How often tokens are exchanged in a block."""

    def __enter__(self):
        self.calls = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops._c10d_functional.all_to_all_single.default
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------- accumulation, checkpoints


def accumulated(dims):
    """Three micro-batches, reduced with the last: the sum of their gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    truth = zoo.build("qwen3_moe")
    for micro in range(3):
        for r in range(ranks):
            (zoo.loss(truth(**batch("qwen3_moe", truth, r + 10 * micro))) / ranks).backward()
    model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(dims), verify=False)
    for micro in range(3):
        with model.no_sync() if micro < 2 else contextlib.nullcontext():
            zoo.loss(model(**batch("qwen3_moe", model, rank + 10 * micro))).backward()
    check_gradients(model, {key: p.grad for key, p in truth.named_parameters()})


@pytest.mark.parametrize("dims", [MIXED, REPLICATED], ids=["shard2 x ep2", "replicate2 x ep2"])
def test_gradients_accumulate_and_are_reduced_once(dims):
    on_ranks(4, accumulated, dims)


def checkpointed():
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        gradients_agree(EP2, prepare=functools.partial(_checkpoint, options))
    exchanges = {}
    for label, options in {"none": None, "full": {}, "saved": {"context_fn": save_dispatch}}.items():
        model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(EP2), verify=False)
        if options is not None:
            _checkpoint({"use_reentrant": False, **options}, model)
        _, grads = reference("qwen3_moe", 2)
        with Count() as forward:
            loss = zoo.loss(model(**batch("qwen3_moe", model, dist.get_rank())))
        with Count() as backward:
            loss.backward()
        check_gradients(model, grads)
        exchanges[label] = forward.calls, backward.calls
    assert exchanges["full"][0] == exchanges["none"][0] and exchanges["full"][1] > exchanges["none"][1], exchanges
    assert exchanges["saved"] == exchanges["none"], exchanges


def _checkpoint(options, model):
    model.gradient_checkpointing_enable(options)


def test_activation_checkpointing_recomputes_the_same_and_with_the_policy_no_dispatch():
    on_ranks(2, checkpointed)


# ------------------------------------------------------------------------------------------------- who has how many tokens


def uneven(name, model, rank):
    return batch(name, model, rank, batch=1 + rank, seq=5 + 4 * rank)


def first_half(model):
    """Routers that choose among the first half of the experts only: with ep=2 the second rank computes nothing."""
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda m, args, out: (*out[:2], out[2] % 4))


def tokens():
    gradients_agree(EP2, inputs=uneven)
    gradients_agree(EP2, adapt=first_half)
    model = gradients_agree(EP2, name="gpt_oss", inputs=uneven)
    assert all(p.grad is not None for p in model.parameters())


def test_uneven_tokens_and_a_rank_whose_experts_get_none():
    on_ranks(2, tokens)


def uneven_by_length(name, model, rank):
    return batch(name, model, rank, seq=12 - 5 * rank)


def no_experts(sentinels, model):
    """The tokens of the shorter batch, which is the second rank's, get no expert: by ids that name none, or by weights of 0."""

    def hook(module, args, out):
        logits, weights, ids = out
        return out if len(ids) != 2 * 7 else (logits, weights if sentinels else weights * 0, torch.full_like(ids, -1) if sentinels else ids)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(hook)


def silent_rank():
    """transformers' attention takes no batch of 0 sequences: a rank with nothing to do has tokens that all are padding to the router."""
    logits, grads = reference("qwen3_moe", 2, uneven_by_length, functools.partial(no_experts, False))
    model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(EP2), verify=False)
    no_experts(True, model)
    output = model(**uneven_by_length("qwen3_moe", model, dist.get_rank()))
    assert compare.error(output.logits, logits[dist.get_rank()]) <= 1e-6
    zoo.loss(output).backward()
    check_gradients(model, grads)


def layers():
    """One experts module, called by hand: T = 0, ids that name no expert, all tokens on one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    cases = {
        "no tokens here": [torch.randint(0, 8, (5, 2), generator=generator), torch.zeros(0, 2, dtype=torch.int64)],
        "no tokens anywhere": [torch.zeros(0, 2, dtype=torch.int64)] * 2,
        "no experts": [torch.full((4, 2), -1), torch.full((3, 2), 8)],
        "all to one expert": [torch.full((6, 2), 7), torch.full((2, 2), 7)],
    }
    for what, ids in cases.items():
        data = [(torch.randn(len(i), 64, generator=generator), torch.rand(len(i), 2, generator=generator)) for i in ids]
        # transformers' own loop does not take ids that name no expert: the truth is moepatch on one device.
        truth = moepatch.optimize(zoo.build("qwen3_moe"), verify=False).model.layers[0].mlp.experts
        model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(EP2), verify=False)
        ours = model.model.layers[0].mlp.experts
        wanted = [_call(truth, x, i, w, 1 / ranks) for (x, w), i in zip(data, ids, strict=True)]
        y, grad_x, grad_w = _call(ours, data[rank][0], ids[rank], data[rank][1], 1.0)
        assert compare.error(y, wanted[rank][0]) <= 1e-6, what
        # What goes back to a rank's tokens belongs to its own loss, which in one process counts 1/ranks.
        assert compare.error(grad_x / ranks, wanted[rank][1]) <= 1e-6 and compare.error(grad_w / ranks, wanted[rank][2]) <= 1e-6, what
        for key, p in ours.named_parameters():
            assert compare.error(whole(p.grad), truth.get_parameter(key).grad) <= 1e-5, (what, key)


def _call(experts, x, ids, weights, scale):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(x, ids, weights)
    (y.square().sum() * scale).backward()
    return y.detach(), x.grad, weights.grad


def test_ranks_without_tokens():
    on_ranks(2, silent_rank)
    on_ranks(2, layers)


# ------------------------------------------------------------------------------------------------- frozen weights, adapters


def freeze(part, model):
    for key, p in model.named_parameters():
        p.requires_grad_(part not in key)


def frozen(dims):
    for part in ("experts", "gate.weight"):
        model = gradients_agree(dims, adapt=functools.partial(freeze, part))
        assert all(p.grad is None for key, p in model.named_parameters() if part in key)


def test_frozen_experts_and_frozen_routers_on_mixed_meshes():
    on_ranks(4, frozen, MIXED)


def lora(model, **targets):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **targets))
    for key, p in adapted.named_parameters():
        if "lora_" in key:
            zoo._randomize_(key, p.data, 1)
    return adapted


def adapters():
    rank, ranks, attention = dist.get_rank(), dist.get_world_size(), {"target_modules": ["q_proj", "v_proj"]}
    truth = lora(zoo.build("qwen3_moe"), **attention)
    for r in range(ranks):
        (zoo.loss(truth(**batch("qwen3_moe", truth, r))) / ranks).backward()
    grads = {key: p.grad for key, p in truth.named_parameters() if p.requires_grad}
    assert grads

    before = moepatch.optimize(lora(zoo.build("qwen3_moe"), **attention), mesh_of(EP2), verify=False)
    zoo.loss(before(**batch("qwen3_moe", before, rank))).backward()
    check_gradients(before, grads)
    assert all(p.grad is None for p in before.parameters() if not p.requires_grad)


def test_lora_before_optimize():
    pytest.importorskip("peft")
    on_ranks(2, adapters)


def adapters_after_an_evaluation():
    """A head that peft trains whole, in an optimizer that is made of what each of the objects around the model says after an evaluation."""
    from peft import PeftModel

    def make():
        return lora(zoo.build("qwen3_moe"), target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])

    rank, ranks, truth = dist.get_rank(), dist.get_world_size(), make()
    for r in range(ranks):
        (zoo.loss(truth(**batch("qwen3_moe", truth, r))) / ranks).backward()
    grads = {key: p.grad for key, p in truth.named_parameters() if p.requires_grad}
    torch.optim.SGD(truth.parameters(), lr=0.1).step()
    for gradients, asked in itertools.product((False, True), (lambda model: model, PeftModel.get_base_model)):
        model = moepatch.optimize(make(), mesh_of(EP2), verify=False)
        with torch.set_grad_enabled(gradients):
            model(**batch("qwen3_moe", model, rank))
        optimizer = torch.optim.SGD((p for p in asked(model).parameters() if p.requires_grad), lr=0.1)
        with model.no_sync():  # given up
            zoo.loss(model(**batch("qwen3_moe", model, rank + 10))).backward()
        asked(model).zero_grad()
        zoo.loss(model(**batch("qwen3_moe", model, rank))).backward()
        check_gradients(model, grads)
        optimizer.step()
        for key in grads:
            assert compare.error(whole(model.get_parameter(key)), truth.get_parameter(key)) <= 1e-5, key
        assert [type(m) for m in moepatch.restore(model).modules()] == [type(m) for m in truth.modules()]


def test_adapters_are_trained_by_an_optimizer_made_after_an_evaluation():
    pytest.importorskip("peft")
    on_ranks(2, adapters_after_an_evaluation)


# ------------------------------------------------------------------------------------------------- norms and optimizers


def stepped(dims):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for options in ({"foreach": True}, {"fused": True}):
        truth = zoo.build("qwen3_moe")
        model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(dims), verify=False)
        # A large eps keeps AdamW from blowing rounding errors of tiny gradients up to whole steps.
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3, **options) for m in (truth, model)]
        for step in range(3):
            for r in range(ranks):
                (zoo.loss(truth(**batch("qwen3_moe", truth, r + 10 * step))) / ranks).backward()
            zoo.loss(model(**batch("qwen3_moe", model, rank + 10 * step))).backward()
            limit = 0.1 if step else float("inf")
            wanted = torch.nn.utils.clip_grad_norm_(truth.parameters(), limit)
            norm = moepatch.clip_grad_norm_(model.parameters(), limit)
            assert abs(norm / wanted - 1) <= 1e-5
            for kind in (1.0, float("inf")):
                measured = moepatch.clip_grad_norm_(model, float("inf"), kind)
                assert abs(measured / torch.nn.utils.clip_grad_norm_(truth.parameters(), float("inf"), kind) - 1) <= 1e-5
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for key, p in truth.named_parameters():
            assert compare.error(whole(model.get_parameter(key)), p) <= 1e-5, key


@pytest.mark.parametrize("dims", [MIXED, REPLICATED], ids=["shard2 x ep2", "replicate2 x ep2"])
def test_adamw_and_clipping_take_the_steps_of_one_process(dims):
    on_ranks(4, stepped, dims)
