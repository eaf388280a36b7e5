"""When FSDP2 gathers on gloo ranks: the numbers are those of FSDP2's own ways bit by bit, and nothing is gathered that need not be."""

from __future__ import annotations

import collections
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import batch as reference_batch
from test_parallel import check_gradients, mesh_of, reference
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

import moepatch
from moepatch.parallel import apply
from moepatch.parallel.gather import ends, may_stay

STEPS = 3


def batch(name, model, step):
    """With labels, so that the fused loss reads the head's weight."""
    inputs = zoo.inputs(name, model, seed=10 * step + dist.get_rank())
    return {**inputs, "labels": inputs["input_ids"], "use_cache": False}


def optimized(name):
    return moepatch.optimize(zoo.build(name), mesh_of({"ep": dist.get_world_size()}))


def train(model, name):
    """Losses, gradients and weights of some steps."""
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=1e-2, foreach=False)
    found = []
    for step in range(STEPS):
        inputs = batch(name, model, step)
        loss = model(**inputs).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.to_local().clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return found + [p.detach().to_local().clone() for p in model.parameters()]


def plainly(name):
    """The model with one unit a layer, gathered for each pass when it is needed."""
    with (
        mock.patch.object(apply, "may_stay", lambda units, experts: False),
        mock.patch.object(apply, "ends", lambda model: (None, None)),
        mock.patch.object(apply, "GatherAhead", lambda chain: mock.Mock(spec=["do", "undo"])),
    ):
        return optimized(name)


def same_numbers(name):
    want, got = train(plainly(name), name), train(optimized(name), name)
    assert len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_numbers_are_those_of_plain_fsdp2_bit_by_bit(name):
    on_ranks(2, same_numbers, name)


def gathers():
    """What is gathered when, by part of a step."""
    model, counts, part = optimized("qwen3_moe"), collections.Counter(), "first"
    gather = _fsdp_param_group.foreach_all_gather

    def counted(params, *args, **kwargs):
        counts[part, params[0]._module_info.module.__class__.__name__] += 1
        return gather(params, *args, **kwargs)

    with mock.patch.object(_fsdp_param_group, "foreach_all_gather", counted):
        for part in ("first", "second"):
            inputs = batch("qwen3_moe", model, 0)
            loss = model(**inputs).loss
            part += " backward"
            loss.backward()
    return {which: sum(n for (p, _), n in counts.items() if p == which) for which in ("first", "first backward", "second", "second backward")}


def test_a_step_gathers_each_unit_once():
    """In the forward pass, nothing in the backward."""
    units = 1 + 3  # the layers, embeddings, head and the rest
    assert on_ranks(2, gathers)[0] == {"first": units, "first backward": 0, "second": units, "second backward": 0}


def step(model):
    """Changes dense parameters as an optimizer does, in parts and whatever is gathered."""
    states = {module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)}
    with torch.no_grad():
        for group in filter(None, (state._fsdp_param_group for state in states)):
            for p in group.fsdp_params:
                p.sharded_param.to_local().mul_(1.5)


def seen_between():
    """Parameters after a forward without gradients, and a forward after one that had no backward and a step."""
    model = optimized("qwen3_moe")
    assert sum(isinstance(m, FSDPModule) for m in model.modules()) == model.config.num_hidden_layers + 3
    inputs = batch("qwen3_moe", model, 0)
    with torch.no_grad():
        model(**inputs)
    layers = model.model.layers
    assert all(isinstance(p, DTensor) for p in layers.parameters())
    model(**inputs).loss.backward()
    model(**inputs)  # looked at, and thrown away
    step(model)
    after = model(**inputs).logits.detach() * 1
    fresh = optimized("qwen3_moe")
    with torch.no_grad():
        for p in fresh.parameters():
            if "ep" not in p.device_mesh.mesh_dim_names or len(p.shape) != 3:
                p.to_local().mul_(1.5)
        assert torch.equal(after, fresh(**inputs).logits * 1)


def test_nobody_sees_or_uses_what_is_gathered_at_the_wrong_time():
    on_ranks(2, seen_between)


class Normed(torch.nn.Embedding):
    """Embeddings with a norm inside, as some families have them."""

    def __init__(self, rows, width):
        torch.manual_seed(0)
        super().__init__(rows, width)
        self.norm = torch.nn.LayerNorm(width)
        torch.nn.init.uniform_(self.norm.weight)

    def forward(self, ids):
        return self.norm(super().forward(ids))


def normed(model):
    model.set_input_embeddings(Normed(*model.get_input_embeddings().weight.shape))


def normed_embeddings():
    """The norm's backward reads its weight, which has to be there."""
    _, grads = reference("qwen3_moe", dist.get_world_size(), adapt=normed)
    model = zoo.build("qwen3_moe")
    normed(model)
    model = moepatch.optimize(model, mesh_of({"ep": 2}), verify=False)
    zoo.loss(model(**reference_batch("qwen3_moe", model, dist.get_rank()))).backward()
    check_gradients(model, grads)


def test_embeddings_with_more_than_a_table():
    on_ranks(2, normed_embeddings)


def test_ends_are_modules_of_their_own_unless_tied():
    model = zoo.build("qwen3_moe")
    assert ends(model) == (model.model.embed_tokens, model.lm_head)
    assert ends(zoo.build("qwen3_moe", tie_word_embeddings=True)) == (None, None)
    assert ends(torch.nn.Linear(2, 2)) == (None, None)


def test_without_experts_nothing_stays():
    assert not may_stay([torch.nn.Linear(2, 2)], set())
