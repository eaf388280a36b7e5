"""Layers that are gathered together, on gloo ranks: numbers are those of FSDP2's own units of one layer, however the layers are run."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import mesh_of
from test_parallel_gather import batch, step, train
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moepatch
from moepatch.parallel import apply, gather
from moepatch.parallel.passes import Throughout, Together
from moepatch.surgery import Journal

LAYERS = 5


def build(adapt=None):
    model = zoo.build("qwen3_moe", num_hidden_layers=LAYERS)
    if adapt is not None:
        adapt(model)
    return model


def bundled(adapt=None, size=2, dims=None):
    """A model whose layers are gathered `size` at a time."""
    model = build(adapt)
    layer = sum(p.numel() * p.element_size() for name, p in model.model.layers[0].named_parameters() if ".experts." not in name)
    with mock.patch.object(gather, "BUNDLE_BYTES", size * layer), mock.patch.object(apply, "may_stay", lambda units, experts: True):
        return moepatch.optimize(model, mesh_of(dims or {"ep": 2}), verify=False)


def single(adapt=None, dims=None):
    """FSDP2's own units of a layer each, gathered for each pass."""
    with mock.patch.object(apply, "may_stay", lambda units, experts: False):
        return moepatch.optimize(build(adapt), mesh_of(dims or {"ep": 2}), verify=False)


def frozen(model):
    for layer in (0, 3):
        model.model.layers[layer].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)


def checkpointed(reentrant):
    def adapt(model):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return adapt


ADAPT = {
    "as it is": None,
    "frozen": frozen,
    "recomputed": checkpointed(False),
    "recomputed, reentrant": checkpointed(True),
    "recomputed and frozen": lambda model: (frozen(model), checkpointed(False)(model)),
}


def accumulated(model):
    """Losses and gradients over two micro-batches, after a pass without gradients, and with two passes in one backward."""
    with torch.no_grad():
        found = [model(**batch("qwen3_moe", model, 7)).loss]
    with model.no_sync():
        model(**batch("qwen3_moe", model, 0)).loss.backward()
    (model(**batch("qwen3_moe", model, 1)).loss + model(**batch("qwen3_moe", model, 2)).loss).backward()
    found += [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        found.append(model(**batch("qwen3_moe", model, 3)).loss)
    model.zero_grad()
    return found


def middle(model):
    """Gradients of a loss that depends on the first layers only."""
    inputs = {key: value for key, value in batch("qwen3_moe", model, 4).items() if key != "labels"}
    model(**inputs, output_hidden_states=True).hidden_states[3].float().square().mean().backward()
    found = [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def same(adapt, size, dims):
    simple, adapt = adapt == "recomputed, reentrant", ADAPT[adapt]  # FSDP2's own units get two passes in one backward wrong with that
    results = []
    for make in (lambda: single(adapt, dims), lambda: bundled(adapt, size, dims)):
        model = make()
        results.append([*([] if simple else [*accumulated(model), *middle(model)]), *train(model, "qwen3_moe")])
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


@pytest.mark.parametrize("adapt", ADAPT)
def test_numbers_are_those_of_units_of_one_layer_bit_by_bit(adapt):
    on_ranks(2, same, adapt, 2, None)


@pytest.mark.parametrize(("size", "mesh"), [(1, {"ep": 2}), (3, {"dp_shard": 2, "ep": 1}), (99, {"ep": 2})])
def test_numbers_whatever_the_size_and_the_mesh(size, mesh):
    on_ranks(2, same, "as it is", size, mesh)


def looked_at_between():
    """Passes between backward and what reads gradients of the model: they are clipped and set to zero all the same."""
    model, fresh = bundled(), bundled()
    inputs = batch("qwen3_moe", model, 0)
    for looks in (False, True):  # without gradients the root and the head stay gathered, with them everything
        for m in (model, fresh):
            m(**inputs).loss.backward()
        with torch.set_grad_enabled(looks):
            model(**inputs)
        want, got = (moepatch.clip_grad_norm_(m, 0.1) for m in (fresh, model))
        assert torch.equal(want, got)
        with torch.set_grad_enabled(looks):
            model(**inputs)
        for m, to_none in ((model, looks), (fresh, looks)):
            m.zero_grad(to_none)
    for m in (model, fresh):
        m(**inputs).loss.backward()
    assert all(torch.equal(a.grad.to_local(), b.grad.to_local()) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_gradients_are_clipped_and_zeroed_whatever_is_gathered():
    on_ranks(2, looked_at_between)


def broken_off(error, where, gradients):
    """A pass that ends in a layer, then a step."""
    model, fresh = bundled(size=3), bundled(size=3)
    inputs = batch("qwen3_moe", model, 0)

    def stop(*args):
        raise error

    handle = model.model.layers[where].mlp.register_forward_pre_hook(stop)
    with torch.set_grad_enabled(gradients), pytest.raises(error):
        model(**inputs)
    handle.remove()
    for changed in (model, fresh):
        step(changed)
    want, got = (m(**inputs) for m in (fresh, model))
    assert torch.equal(want.logits * 1, got.logits * 1)
    for output in (want, got):
        output.loss.backward()
    assert all(torch.equal(a.grad.to_local(), b.grad.to_local()) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("where", "gradients"), [(1, True), (3, True), (1, False)])
def test_a_pass_after_one_that_broke_off_uses_the_weights_of_its_own_time(error, where, gradients):
    on_ranks(2, broken_off, error, where, gradients)


class Breaks(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError


def broken_off_in_backward(where, make):
    """A batch whose backward fails is left out; what follows is trained as without it, embeddings and the last norm too."""
    model, fresh = make(), make()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, fresh)]
    handle = model.model.layers[where].mlp.register_forward_pre_hook(lambda module, args: (Breaks.apply(args[0]), *args[1:]))
    with pytest.raises(MemoryError):
        model(**batch("qwen3_moe", model, 0)).loss.backward()
    handle.remove()
    optimizers[0].zero_grad()
    for number in range(2):
        for m, optimizer in zip((model, fresh), optimizers, strict=True):
            m(**batch("qwen3_moe", m, number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(("where", "make"), [(1, bundled), (3, bundled), (3, single)])
def test_a_batch_after_one_whose_backward_broke_off_trains_everything(where, make):
    on_ranks(2, broken_off_in_backward, where, make)


def left_out():
    """Gradients of micro-batches that are given up, a first pass in inference mode, an optimizer that is made after an evaluation."""
    model, fresh = bundled(), bundled()
    with torch.inference_mode():
        model(**batch("qwen3_moe", model, 4))
    with model.no_sync():
        model(**batch("qwen3_moe", model, 0)).loss.backward()
    model.zero_grad()
    optimizers = []
    for m in (model, fresh):
        with torch.no_grad():
            m(**batch("qwen3_moe", m, 5))
        optimizers.append(torch.optim.SGD(m.parameters(), lr=0.1))
        assert all(isinstance(p, DTensor) for p in m.parameters())
    before = [p.detach().to_local().clone() for p in model.parameters()]
    for m, optimizer in zip((model, fresh), optimizers, strict=True):
        m(**batch("qwen3_moe", m, 1)).loss.backward()
        optimizer.step()
    after = [p.detach().to_local() for p in model.parameters()]
    assert all(torch.equal(a, b.to_local()) for a, b in zip(after, fresh.parameters(), strict=True))
    assert not any(map(torch.equal, before, after))


def test_nothing_of_what_was_left_out_stays_and_everything_is_trained():
    on_ranks(2, left_out)


def layers_alone(where):
    """A layer called by itself, before any pass, twice with a step in between, and then after a pass; with gradients."""
    found = []
    for make in (bundled, single):
        calls, model = {}, make()
        rope = model.model.rotary_emb
        x = torch.randn(1, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        if make is single:
            with torch.no_grad():  # FSDP2's own ways want the root to run first
                model(**batch("qwen3_moe", model, 0))
        calls["position_embeddings"] = rope(x, torch.arange(6)[None])
        layer = model.model.layers[where]

        def run():
            if make is single:
                layer.reshard()
            return layer(x, attention_mask=None, **calls)

        found.append([run().detach().clone()])
        step(model)
        y = run()
        found[-1].append(y.detach().clone())
        y.square().sum().backward()
        found[-1] += [p.grad.to_local().clone() for p in layer.parameters()]
        model.zero_grad()
        step(model)
        loss = model(**batch("qwen3_moe", model, 1)).loss
        loss.backward()
        found[-1] += [loss.detach(), *(p.grad.to_local().clone() for p in model.parameters())]
        if make is bundled:
            with torch.no_grad():
                layer(x, attention_mask=None, **calls)
            assert all(isinstance(p, DTensor) for p in layer.parameters())
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


@pytest.mark.parametrize("where", [0, 1, 4])
def test_a_layer_called_by_itself_uses_the_weights_of_its_own_time(where):
    on_ranks(2, layers_alone, where)


class Layer(nn.Module):
    """One with a module of another dtype."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(self.norm(x.double()).float()))


class Stack(nn.Module):
    """Layers run in an order of their own."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.layers = order, nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x


def orders(order, stay, odd_bytes):
    """One process against bundles, with a step after each backward."""
    whole, model, journal = Stack(order), Stack(order), Journal()
    with (
        mock.patch.object(apply, "may_stay", lambda units, experts: stay),
        mock.patch.object(gather, "BUNDLE_BYTES", 2 * (8 * 9 * 4 + 16 * 8)),
        mock.patch.object(gather, "ODD_BYTES", odd_bytes),
    ):
        apply._shard_dense(model, mesh_of({"dp": 2}), set(), [], journal)
    a_bundle = [2, 1 if odd_bytes else 2]
    assert [[len(t.layers), len(t.units)] for t in journal.steps if isinstance(t, Together)] == ([a_bundle, a_bundle] if stay else [])
    assert [len(t.parts) for t in journal.steps if isinstance(t, Throughout)] == ([4] if odd_bytes else [])
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        y = model(x[dist.get_rank()])
        y.square().sum().backward()
        truth = [whole(x[rank]).square().sum() / 2 for rank in range(2)]
        sum(truth).backward()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert (q.grad is None) == (p.grad is None)
            if q.grad is not None:
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-6, check_dtype=False)
        with torch.no_grad():
            for module in (model, whole):
                for p in module.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
                module.zero_grad()
    names = [(name, type(module)) for name, module in whole.named_modules()]
    journal.commit()
    journal.undo()
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks or isinstance(m, FSDPModule) for m in model.modules())
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 1, 2, 3, 0, 1, 2, 3), (0, 0, 1, 1), (0, 2, 3), (1, 3), (0, 3, 1, 2, 2)])
@pytest.mark.parametrize("odd_bytes", [2**30, 0])
def test_layers_in_any_order(order, odd_bytes):
    on_ranks(2, orders, order, True, odd_bytes)


@pytest.mark.parametrize("odd_bytes", [2**30, 0])
def test_layers_that_do_not_stay(odd_bytes):
    on_ranks(2, orders, (0, 2, 1, 1, 3), False, odd_bytes)


def test_bundles_have_a_size_and_one_dtype():
    layers = [nn.Linear(4, 4, bias=False) for _ in range(5)]
    with mock.patch.object(gather, "BUNDLE_BYTES", 2 * 64):
        assert [len(bundle) for bundle in gather.bundles(layers, set())] == [2, 2, 1]
        assert [len(bundle) for bundle in gather.bundles(layers, set(layers[1].parameters()))] == [3, 2]
        layers[1].to(torch.bfloat16)
        assert [len(bundle) for bundle in gather.bundles(layers, set())] == [1, 1, 2, 1]
