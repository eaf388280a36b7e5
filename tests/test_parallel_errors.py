"""What a user may do wrong on several ranks, and the way back from sharding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import batch, check_gradients, mesh_of, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moepatch
from moepatch.parallel import apply as applying
from moepatch.parallel.agree import RankFailed

MIXED = {"dp_shard": 2, "ep": 2}


def raises(error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)


def meshes_that_do_not_fit():
    model = zoo.build("qwen3_moe")
    before = snapshot(model)
    line = init_device_mesh("cpu", (3,), mesh_dim_names=("ep",))
    raises(moepatch.CheckFailed, r"8 experts cannot be spread over 3 ranks.*\n?.*1, 2, 4, 8", moepatch.optimize, model, line)
    raises(moepatch.CheckFailed, "2 experts cannot be spread over 3", moepatch.optimize, zoo.build("qwen3_moe", num_experts=2), line)
    raises(moepatch.CheckFailed, "no 'ep'", moepatch.optimize, model, init_device_mesh("cpu", (3,), mesh_dim_names=("dp_shard",)))
    raises(moepatch.CheckFailed, "no 'ep'", moepatch.optimize, model, init_device_mesh("cpu", (3,)))
    strange = init_device_mesh("cpu", (1, 3), mesh_dim_names=("tp", "ep"))
    raises(moepatch.CheckFailed, r"does not know: \['tp'\]", moepatch.optimize, model, strange)
    raises(moepatch.CheckFailed, "int, not a torch DeviceMesh", moepatch.optimize, model, 3)
    raises(moepatch.CheckFailed, "does not know", moepatch.plan, model, strange)
    raises(moepatch.MoePatchError, "3 ranks cannot be divided", moepatch.make_mesh, ep=2)
    raises(moepatch.MoePatchError, "3 ranks cannot be divided", moepatch.make_mesh, ep=3, dp_replicate=2)
    raises(moepatch.MoePatchError, "3 ranks cannot be divided", moepatch.make_mesh, ep=0)
    raises(moepatch.MoePatchError, "have to be integers", moepatch.make_mesh, ep="2")
    raises(moepatch.BackendUnavailable, "nonesuch", moepatch.optimize, model, moepatch.make_mesh(ep=1), dispatch="nonesuch")
    unchanged(model, before)
    assert moepatch.make_mesh(ep=3, device="cpu").mesh.shape == (1, 1, 3)


def snapshot(model):
    classes = {name: type(module) for name, module in model.named_modules()}
    return classes, dict(model.named_parameters()), {key: p.detach().clone() for key, p in model.named_parameters()}, hooks_of(model)


def hooks_of(model):
    """Every hook of every module, by kind."""
    kinds = [name for name, value in vars(model).items() if "_hooks" in name and isinstance(value, dict)]
    return {(name, kind): list(vars(module)[kind].values()) for name, module in model.named_modules() for kind in kinds if vars(module)[kind]}


def unchanged(model, before):
    classes, parameters, values, hooks = before
    assert {name: type(module) for name, module in model.named_modules()} == classes
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[key] is p for key, p in parameters.items())
    assert all(torch.equal(now[key], value) for key, value in values.items())
    assert hooks_of(model) == hooks


def test_meshes_that_do_not_fit_are_refused_in_words():
    on_ranks(3, meshes_that_do_not_fit)


class _Mesh:
    """Stands for a mesh where there is no process group to make one of."""


def test_without_a_process_group(qwen3):
    raises(moepatch.MoePatchError, "init_process_group", moepatch.make_mesh, ep=2)
    raises(moepatch.CheckFailed, "no process group", moepatch.optimize, qwen3, _Mesh())


def one_rank_fails():
    rank = dist.get_rank()
    # On the way: the second of two sharding steps of rank 1 fails, when rank 0 has done all of its own.
    model = zoo.build("qwen3_moe")
    before = snapshot(model)
    if rank == 1:
        steps, original = [], applying.ShardExperts.do

        def failing(self):
            steps.append(self)
            if len(steps) == 2:
                raise MemoryError("no room for the experts")
            original(self)

        applying.ShardExperts.do = failing
    if rank == 1:
        raises(MemoryError, "no room", moepatch.optimize, model, moepatch.make_mesh(ep=2))
        applying.ShardExperts.do = original
    else:
        raises(RankFailed, r"failed on rank 1 .*MemoryError: no room", moepatch.optimize, model, moepatch.make_mesh(ep=2))
    unchanged(model, before)

    # Before anything is changed: rank 1 has a model that must not be patched.
    other = zoo.build("qwen3_moe")
    if rank == 1:
        other.hf_quantizer = object()
        raises(moepatch.CheckFailed, "quantiz|loaded by", moepatch.optimize, other, moepatch.make_mesh(ep=2))
        del other.hf_quantizer
    else:
        raises(RankFailed, "rank 1", moepatch.optimize, other, moepatch.make_mesh(ep=2))

    # Nobody is left behind: the next call works.
    moepatch.optimize(model, moepatch.make_mesh(ep=2))
    wrapped = zoo.build("qwen3_moe")
    torch.distributed.fsdp.fully_shard(wrapped)
    raises(moepatch.CheckFailed, "FSDP|sharded already", moepatch.optimize, wrapped, moepatch.make_mesh(ep=2))


def test_what_one_rank_raises_all_raise():
    on_ranks(2, one_rank_fails)


def there_and_back(dims):
    rank = dist.get_rank()
    model = zoo.build("qwen3_moe")
    hook_calls = []
    model.model.layers[0].register_forward_hook(lambda *args: hook_calls.append(1))
    model(**batch("qwen3_moe", model, rank))  # transformers hooks its modules in their first forward
    classes, parameters, _, hooks = snapshot(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for _ in range(2):
        moepatch.optimize(model, mesh_of(dims), verify=False)
        assert isinstance(model, FSDPModule)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        zoo.loss(model(**batch("qwen3_moe", model, rank))).backward()
        optimizer.step()
        trained = {key: whole(p).detach().clone() for key, p in model.named_parameters()}
        assert moepatch.restore(model) is model
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert hooks_of(model) == hooks, {k: v for k, v in hooks_of(model).items() if hooks.get(k) != v}
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        now = dict(model.named_parameters())
        assert all(now[key] is p for key, p in parameters.items()) and not any(isinstance(p, DTensor) for p in now.values())
        assert all(torch.equal(now[key], value) for key, value in trained.items())
        assert all(p.grad is None and p.requires_grad for p in now.values())
        before = len(hook_calls)
        zoo.loss(model(**batch("qwen3_moe", model, rank))).backward()
        assert len(hook_calls) == before + 1 and all(p.grad is not None for p in now.values())
        model.zero_grad()
    # What was restored is trained on by plain means on every rank alike; it can be sharded again and computes what one process does.
    twin = zoo.build("qwen3_moe")
    twin.load_state_dict(model.state_dict())
    for r in range(dist.get_world_size()):
        (zoo.loss(twin(**batch("qwen3_moe", twin, r))) / dist.get_world_size()).backward()
    moepatch.optimize(model, mesh_of(dims), verify=False)
    zoo.loss(model(**batch("qwen3_moe", model, rank))).backward()
    check_gradients(model, {key: p.grad for key, p in twin.named_parameters()})


@pytest.mark.parametrize("dims", [MIXED, {"dp_replicate": 2, "ep": 2}], ids=["shard2 x ep2", "replicate2 x ep2"])
def test_restore_undoes_sharding_and_keeps_what_was_trained(dims):
    on_ranks(4, there_and_back, dims)


def wrong_device():
    with torch.device("meta"):
        empty = zoo._model_class(zoo.entry("qwen3_moe"))._from_config(zoo.config("qwen3_moe"))
    moepatch.optimize(empty, moepatch.make_mesh(ep=2))  # a model without weights has no device yet
    mesh = moepatch.make_mesh(ep=2)
    mesh._device_type = "cuda"
    raises(moepatch.CheckFailed, r"on cpu and the mesh is for cuda", moepatch.optimize, zoo.build("qwen3_moe"), mesh)


def test_a_mesh_of_another_device_is_refused():
    on_ranks(2, wrong_device)
