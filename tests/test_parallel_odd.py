"""Parameters of another dtype than their layers, such as fp32 routers in a bf16 model, on gloo ranks: right, and no FSDP2 unit a layer."""

from __future__ import annotations

import collections
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zoo
from ranks import on_ranks
from test_parallel import mesh_of
from test_parallel_gather import batch, train
from test_parallel_passes import Breaks, accumulated, checkpointed
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

import moepatch
from moepatch.parallel import apply, gather
from moepatch.parallel.passes import Passes

NAME = "deepseek_v3"
LAYERS = 5


def build(adapt=None, router=torch.float32, dtype=torch.bfloat16):
    """With routers of a dtype of their own, whatever this transformers keeps in fp32 of itself."""
    model = zoo.build(NAME, dtype, num_hidden_layers=LAYERS)
    for path, parameter in model.named_parameters():
        if path.endswith("mlp.gate.weight"):
            parameter.data = parameter.data.to(router)
    if adapt is not None:
        adapt(model)
    return model


def sharded(model, stay=True, small=True, size=2, dims=None):
    """Layers that stay gathered, `size` at a time, or not; odd parameters in one unit for the model or in units of their own."""
    layer = sum(p.numel() * p.element_size() for name, p in model.model.layers[-1].named_parameters() if ".experts." not in name)
    with (
        mock.patch.object(gather, "BUNDLE_BYTES", size * layer),
        mock.patch.object(gather, "ODD_BYTES", 2**30 if small else 0),
        mock.patch.object(apply, "may_stay", lambda units, experts: stay),
    ):
        return moepatch.optimize(model, mesh_of(dims or {"ep": 2}), verify=False)


def same_tensors(want, got):
    """Whether lists of tensors are equal, none of them with NaN."""
    return len(want) == len(got) and all(map(torch.equal, want, got))


def routers(model):
    return [m.weight for m in model.modules() if type(m).__name__.endswith("TopkRouter")]


def counted(router, stay):
    """Units, and collectives of the second step."""
    model, counts = sharded(build(router=router), stay), collections.Counter()
    real = {name: getattr(_fsdp_param_group, name) for name in ("foreach_all_gather", "foreach_reduce")}

    def count(name):
        def counting(*args, **kwargs):
            counts[name] += 1
            return real[name](*args, **kwargs)

        return counting

    model(**batch(NAME, model, 0)).loss.backward()
    model.zero_grad()
    with mock.patch.multiple(_fsdp_param_group, **{name: count(name) for name in real}):
        model(**batch(NAME, model, 1)).loss.backward()
    assert not routers(model) or all(p.dtype == router for p in routers(model))
    states = {m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)}
    return len(states), counts["foreach_all_gather"], counts["foreach_reduce"]


def plain_and_odd(stay):
    return counted(torch.bfloat16, stay), counted(torch.float32, stay)


@pytest.mark.parametrize("stay", [True, False])
def test_one_unit_and_one_collective_each_way_for_the_whole_model(stay):
    (units, gathers, reductions), odd = on_ranks(2, plain_and_odd, stay)[0]
    assert odd == (units + 1, gathers + 1, reductions + 1)


ADAPT = {
    "as it is": None,
    "frozen": lambda model: [model.model.layers[layer].requires_grad_(False) for layer in (0, 3)],
    "frozen routers": lambda model: [p.requires_grad_(False) for p in routers(model)[1:]],
    "recomputed": checkpointed(False),
}


def same(adapt, stay, dims):
    sums, results = [], []
    for small in (False, True):
        model = sharded(build(ADAPT[adapt]), stay, small, dims=dims)
        members = [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]
        assert sum(len(passes.throughout) for passes in members if isinstance(passes, Passes)) == small
        with mock.patch("test_parallel_passes.batch", lambda name, model, step: batch(NAME, model, step)):
            sums.append(accumulated(model))
        results.append(train(model, NAME))
    assert same_tensors(*results)
    # Two passes in one backward are added up before or after they are reduced.
    assert len(sums[0]) == len(sums[1])
    assert all(torch.equal(a, b) if a.dtype == torch.bfloat16 else torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*sums, strict=True))


@pytest.mark.parametrize("stay", [True, False])
@pytest.mark.parametrize("adapt", ADAPT)
def test_numbers_are_those_of_units_of_their_own_bit_by_bit(adapt, stay):
    on_ranks(2, same, adapt, stay, None)


@pytest.mark.parametrize("mesh", [{"dp_shard": 2, "ep": 1}, {"dp_replicate": 2, "ep": 1}])
def test_numbers_on_other_meshes(mesh):
    on_ranks(2, same, "as it is", True, mesh)


def one_device(stay):
    """Gradients of two batches that are added up, for each parameter, against one device; in fp32 with routers in fp64, so that they are exact."""
    model, whole = sharded(build(dtype=torch.float32, router=torch.float64), stay), build(dtype=torch.float32, router=torch.float64)
    for micro in range(2):
        model(**batch(NAME, model, micro)).loss.backward()
        for rank in range(dist.get_world_size()):
            inputs = zoo.inputs(NAME, whole, seed=10 * micro + rank)
            (whole(**{**inputs, "labels": inputs["input_ids"], "use_cache": False}).loss / dist.get_world_size()).backward()
    ours, truth = (dict(m.named_parameters()) for m in (model, whole))
    assert ours.keys() == truth.keys() and sum(p.dtype == torch.float64 for p in ours.values()) == LAYERS - 1
    for name, p in truth.items():
        off = (ours[name].grad.full_tensor() - p.grad).norm() / p.grad.norm()
        assert ours[name].dtype == ours[name].grad.dtype == p.dtype and off < 1e-5, (name, off)


@pytest.mark.parametrize("stay", [True, False])
def test_gradients_are_those_of_one_device(stay):
    on_ranks(2, one_device, stay)


def left_open(stay):
    """After passes that broke off, in forward and in backward, in inference mode, without gradients, and layers called by themselves."""
    model, fresh = (sharded(build(), stay) for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, fresh)]
    layer = model.model.layers[3]

    def stop(*args):
        raise KeyboardInterrupt

    with torch.inference_mode():
        model(**batch(NAME, model, 7))
    handle = layer.mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch(NAME, model, 5))
    handle.remove()
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: (Breaks.apply(args[0]), *args[1:]))
    with pytest.raises(MemoryError):
        model(**batch(NAME, model, 6)).loss.backward()
    handle.remove()
    optimizers[0].zero_grad()
    for number in range(2):
        for m, optimizer in zip((model, fresh), optimizers, strict=True):
            loss = m(**batch(NAME, m, number)).loss
            if m is model:
                with torch.no_grad():  # parts everything between forward and backward
                    m(**batch(NAME, m, 9))
                    assert all(isinstance(p, DTensor) for p in routers(m))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("stay", [True, False])
def test_whatever_is_left_open_the_next_step_is_right(stay):
    on_ranks(2, left_open, stay)


def alone(where, stay):
    """A layer, called by itself before any pass and after a step, against the same layer with routers in units of their own."""
    found = []
    for small in (True, False):
        model = sharded(build(), True if stay else False, small)
        x = torch.randn(1, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
        calls = {"position_embeddings": model.model.rotary_emb(x, torch.arange(6)[None]), "attention_mask": None}
        if not stay:
            with torch.no_grad():  # FSDP2's own ways want the root to run first
                model(**batch(NAME, model, 0))
        layer, results = model.model.layers[where], []
        for _ in range(2):
            layer.reshard()
            y = layer(x, **calls)
            y.float().square().sum().backward()
            results += [y.detach().clone(), *(p.grad.to_local().clone() for p in layer.parameters())]
            with torch.no_grad():
                for p in layer.parameters():
                    p.to_local().sub_(p.grad.to_local(), alpha=1e-3)
            model.zero_grad()
        with torch.no_grad():
            layer(x, **calls)
        assert all(isinstance(p, DTensor) for p in layer.parameters())
        results += train(model, NAME)
        found.append(results)
    assert same_tensors(*found)


@pytest.mark.parametrize(("where", "stay"), [(1, True), (4, True), (4, False)])
def test_a_layer_called_by_itself(where, stay):
    on_ranks(2, alone, where, stay)


def kept(folder):
    """Saved, loaded, restored, clipped, through state dicts and distributed checkpoints; all bit by bit."""
    model = sharded(build())
    inputs = batch(NAME, model, 0)
    model(**inputs).loss.backward()
    norm = moepatch.clip_grad_norm_(model, 1e9)
    squares = sum(p.grad.full_tensor().double().square().sum() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(norm.double(), squares.sqrt(), rtol=2e-2, atol=0)
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().mul_(1.25)
        want = model(**inputs).logits * 1
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()}
    assert {str(value.dtype) for name, value in state.items() if name.endswith("gate.weight")} == {"torch.float32"}
    model.save_pretrained(folder + "/saved")
    dcp.save(get_model_state_dict(model), checkpoint_id=folder + "/dcp")
    empty = sharded(build())
    moepatch.load_checkpoint(empty, folder + "/saved")
    with torch.no_grad():
        assert torch.equal(want, empty(**inputs).logits * 1)
    resumed = sharded(build())
    taken = get_model_state_dict(resumed)
    dcp.load(taken, checkpoint_id=folder + "/dcp")
    set_model_state_dict(resumed, taken)
    with torch.no_grad():
        assert torch.equal(want, resumed(**inputs).logits * 1)
    names = [(name, type(module)) for name, module in build().named_modules()]
    restored = moepatch.restore(model)
    assert [(name, type(module)) for name, module in restored.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in restored.modules())
    assert all(torch.equal(value, state[name]) for name, value in restored.state_dict().items())


def test_what_is_saved_loaded_and_restored(tmp_path):
    on_ranks(2, kept, str(tmp_path))


class Gate(nn.Module):
    """A module of two dtypes, with one of the layer's below: as attention with sinks, mixers with time steps, hyper-connections."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.sinks, self.scale = nn.Parameter(torch.randn(3, dtype=torch.float64)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.scale) * self.sinks.sum().float()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.out = Gate(), nn.Linear(8, 8)
        self.gate.register_module("norm", nn.LayerNorm(8, dtype=torch.float64))

    def forward(self, x):
        return x + self.out(self.gate(self.gate.norm(x.double()).float()))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.layers, self.norm = nn.Linear(8, 8), nn.ModuleList(Layer() for _ in range(4)), nn.LayerNorm(8, dtype=torch.float64)

    def forward(self, x):
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.double()).float()


def mixed(stay, small):
    """One process against two, with modules whose own parameters are of two dtypes, and steps in between."""
    whole, model = Stack(), Stack()
    journal = moepatch.surgery.Journal()
    with mock.patch.object(apply, "may_stay", lambda units, experts: stay), mock.patch.object(gather, "ODD_BYTES", 2**30 if small else 0):
        apply._shard_dense(model, mesh_of({"dp": 2}), set(), [], journal)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(x[dist.get_rank()]).square().mul(torch.arange(8)).sum().backward()
        sum(whole(x[rank]).square().mul(torch.arange(8)).sum() / 2 for rank in range(2)).backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(p, DTensor) and p.dtype == q.dtype
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
        with torch.no_grad():
            for module in (model, whole):
                for p in module.parameters():
                    p -= 0.01 * p.grad
                module.zero_grad()
    names = [(name, type(module)) for name, module in whole.named_modules()]
    journal.commit()
    journal.undo()
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_pre_hooks or isinstance(m, FSDPModule) for m in model.modules())
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stay", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_modules_of_two_dtypes(stay, small):
    on_ranks(2, mixed, stay, small)


def refused():
    """A layer with a parameter of its own in another dtype: FSDP2 has no way for it. Said in words, and nothing is changed."""
    model = zoo.build("qwen3_moe")
    model.model.layers[0].scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    types = [type(m) for m in model.modules()]
    with pytest.raises(moepatch.MoePatchError, match="DecoderLayer has parameters of several dtypes.*'scale': 'float64'.*Cast"):
        moepatch.optimize(model, mesh_of({"ep": 2}), verify=False)
    assert [type(m) for m in model.modules()] == types and not any(isinstance(p, DTensor) for p in model.parameters())


def test_a_unit_of_two_dtypes_is_refused_in_words():
    on_ranks(2, refused)
