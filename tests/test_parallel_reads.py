"""Weights that somebody reads while the model's forward runs, outside of their modules' own forward, on gloo ranks: as in one process."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from unittest import mock

import compare
import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import batch, check_gradients, mesh_of
from test_parallel_passes import checkpointed
from torch.distributed.tensor import DTensor

import moepatch
from moepatch.parallel import apply, gather

LAYERS = 3
#: Weights by where they are.
PLACES = {
    "head": "lm_head.weight",
    "embeddings": "model.embed_tokens.weight",
    "last norm": "model.norm.weight",
    "norm of a layer": "model.layers.1.input_layernorm.weight",
    "router": "model.layers.0.mlp.gate.weight",
    "router of the last layer": f"model.layers.{LAYERS - 1}.mlp.gate.weight",
    "bias": "model.layers.1.self_attn.q_proj.bias",
    "projection": "model.layers.2.self_attn.o_proj.weight",
}


def penalty(model, place, input_ids):
    """Of a weight and of this rank's tokens; its backward needs the weight."""
    weight = functools.reduce(getattr, PLACES[place].split("."), model)
    assert not isinstance(weight, DTensor)
    return (weight.float() ** 3).sum() * input_ids.float().mean() / 5


def reads(model, early=(), late=()):
    """A forward whose loss depends on weights that are read before and after everything else."""
    forward = type(model).forward

    def reading(self, input_ids, **kwargs):
        before = [penalty(self, place, input_ids) for place in early]
        out = forward(self, input_ids=input_ids, **kwargs)
        out.loss = out.loss + sum([*before, *(penalty(self, place, input_ids) for place in late)])
        return out

    model.forward = types.MethodType(reading, model)


def own_head(model, of="lm_head"):
    """A model whose loss multiplies by a weight itself, and whose head is never called."""

    def forward(self, input_ids, labels, **kwargs):
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        weight = self.get_submodule(of).weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        loss = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1).float(), labels[:, 1:].flatten())
        return types.SimpleNamespace(loss=loss)

    model.forward = types.MethodType(forward, model)


def across_layers(model):
    """Layers that read weights of layers before and behind them."""
    for index, other in ((0, 2), (1, 0), (2, 1)):
        gate = model.model.layers[other].mlp.gate

        def add(module, args, kwargs, gate=gate):
            return (args[0] + gate.weight.pow(3).mean(), *args[1:]), kwargs

        model.model.layers[index].register_forward_pre_hook(add, with_kwargs=True)


def after(model):
    """A hook on the model that comes after all others reads what is not in any layer."""

    def add(module, args, kwargs, out):
        out.loss = out.loss + sum(penalty(module, place, kwargs["input_ids"]) for place in ("head", "embeddings", "last norm"))
        return out

    model.after = add


WAYS = {
    **{f"{place}, {when}": functools.partial(reads, **{when: [place]}) for place in PLACES for when in ("early", "late")},
    "all": functools.partial(reads, early=list(PLACES), late=list(PLACES)),
    "own head": own_head,
    "embeddings as head": functools.partial(own_head, of="model.embed_tokens"),
    "across layers": across_layers,
    "after the forward": after,
}


def hooked(model):
    """With the hook that `after` wants, on a model that is as it will be run."""
    if hasattr(model, "after"):
        model.register_forward_hook(model.after, with_kwargs=True)
    return model


def build(adapt, tied=False):
    model = zoo.build("qwen2_moe", num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    adapt(model)
    return model


def labelled(model, rank):
    inputs = batch("qwen2_moe", model, rank)
    return {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}


def truth(adapt, passes=(0,), tied=False):
    """One process: the loss of this rank's first batch, and the gradients of the mean of the ranks' losses."""
    model, losses = hooked(build(adapt, tied)), []
    for r in range(dist.get_world_size()):
        for step in passes:
            loss = model(**labelled(model, r + 10 * step)).loss
            (loss / dist.get_world_size()).backward()
            losses.append(loss.item())
    return losses[dist.get_rank() * len(passes)], {key: p.grad for key, p in model.named_parameters()}


@contextlib.contextmanager
def units(layers):
    """Units of so many layers that stay gathered, or of a layer each that are gathered for each pass."""
    with mock.patch.object(apply, "may_stay", lambda units, experts: layers is not None), contextlib.ExitStack() as stack:
        if layers is not None:
            model = build(lambda model: None)
            size = sum(p.numel() * p.element_size() for name, p in model.model.layers[0].named_parameters() if ".experts." not in name)
            stack.enter_context(mock.patch.object(gather, "BUNDLE_BYTES", layers * size))
        yield


def sharded(adapt, layers, dims, tied=False):
    with units(layers):
        return hooked(moepatch.optimize(build(adapt, tied), mesh_of(dims), verify=False))


def agree(ways, layers, dims):
    for name in ways:
        loss, grads = truth(WAYS[name])
        model = sharded(WAYS[name], layers, dims)
        for _ in range(2 if name in FEW else 1):
            out = model(**labelled(model, dist.get_rank()))
            assert abs(out.loss.item() / loss - 1) <= 1e-5, name
            out.loss.backward()
            try:
                check_gradients(model, grads)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            model.zero_grad()
        assert all(isinstance(p, DTensor) for module in model.modules() for p in module._parameters.values() if p is not None), name


def test_a_weight_that_is_read_elsewhere():
    on_ranks(2, agree, list(WAYS), None, {"ep": 2})


FEW = ["all", "own head", "embeddings as head", "across layers", "after the forward"]


@pytest.mark.parametrize(("layers", "dims"), [(2, {"ep": 2}), (None, {"dp_shard": 2, "ep": 1})])
def test_weights_that_are_read_elsewhere_on_other_meshes_and_in_other_units(layers, dims):
    on_ranks(2, agree, FEW, layers, dims)


def odd_ways(dims):
    """Recomputed layers, two passes in one backward, passes that are not reduced, and passes without gradients in between."""
    rank = dist.get_rank()
    for name, layers, tied in [("all", None, False), ("all", 2, True), ("across layers", None, False), ("across layers", 99, False), ("own head", 2, False)]:
        for recompute in (False, True)[layers == 2 :]:
            adapt = lambda model: (WAYS[name](model), checkpointed(False)(model) if recompute else None)  # noqa: B023, E731
            _, grads = truth(adapt, (0, 1, 2), tied)
            model = sharded(adapt, layers, dims, tied)
            with torch.no_grad():
                model(**labelled(model, rank))
            assert all(isinstance(p, DTensor) for p in model.model.layers[0].parameters())
            with model.no_sync():
                model(**labelled(model, rank)).loss.backward()
            losses = [model(**labelled(model, rank + 10)).loss]
            with torch.no_grad():
                model(**labelled(model, rank + 30))
            losses.append(model(**labelled(model, rank + 20)).loss)
            sum(losses).backward()
            check_gradients(model, grads)


def test_reads_in_odd_orders_of_passes():
    on_ranks(2, odd_ways, {"ep": 2})


def once():
    """A pass that reads is followed by passes that do not; what such a pass gathers, keeps and sends is what it was before."""
    rank = dist.get_rank()
    on = [False]

    def sometimes(model):
        forward = type(model).forward

        def reading(self, input_ids, **kwargs):
            extra = sum(penalty(self, place, input_ids) for place in PLACES) if on[0] else 0
            out = forward(self, input_ids=input_ids, **kwargs)
            out.loss = out.loss + extra
            return out

        model.forward = types.MethodType(reading, model)

    model = sharded(sometimes, None, {"ep": 2})
    gathered = []
    for reading in (False, True, False):
        on[0] = reading
        with counted() as calls:
            model(**labelled(model, rank)).loss.backward()
        gathered.append(calls)
        model.zero_grad()
        held = vars(model.model.embed_tokens)["_parameters"].passes.held
        assert bool(held) is reading
    assert gathered[0][0] == gathered[2][0] - 1  # embeddings that were read elsewhere are gathered for their backward too, from then on
    assert gathered[0][1] == gathered[1][1] == gathered[2][1]
    for name, module in model.named_modules():  # a copy of a module is an ordinary one
        if "norm" in name:
            assert type(copy.deepcopy(module)._parameters) is dict
    fresh = build(lambda model: None)
    model.__dict__.pop("forward")  # what a user has put over the patch is the user's to take off
    moepatch.restore(model)
    assert all(type(vars(m)["_parameters"]) is dict for m in model.modules())
    assert compare.error(model(**labelled(model, rank)).logits, fresh(**labelled(fresh, rank)).logits) <= 1e-6


@contextlib.contextmanager
def counted():
    """Numbers of gathers and of reductions of FSDP2."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    with mock.patch.object(group, "foreach_all_gather", wraps=group.foreach_all_gather) as gathers:
        with mock.patch.object(group, "foreach_reduce", wraps=group.foreach_reduce) as reductions:
            calls = [0, 0]
            yield calls
            calls[:] = gathers.call_count, reductions.call_count


def test_a_read_is_paid_for_by_the_pass_that_reads():
    on_ranks(2, once)
