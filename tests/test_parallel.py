"""Expert parallelism and FSDP2 on gloo ranks: the same numbers as one process, parameter by parameter."""

from __future__ import annotations

import compare
import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moepatch

MESHES = {
    "ep2": {"ep": 2},
    "shard2": {"dp_shard": 2, "ep": 1},
    "ep4": {"ep": 4},
    "shard2 x ep2": {"dp_shard": 2, "ep": 2},
    "replicate2 x ep2": {"dp_replicate": 2, "ep": 2},
}
FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "mixtral"]


def mesh_of(dims):
    return init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch(name, model, rank, **options):
    """Every rank's own tokens."""
    return zoo.inputs(name, model, seed=100 + rank, **options)


def reference(name, ranks, inputs=batch, adapt=None):
    """One process: logits of every rank's batch, and the gradients of the mean of the ranks' losses."""
    model = zoo.build(name)
    if adapt is not None:
        adapt(model)
    logits = []
    for rank in range(ranks):
        output = model(**inputs(name, model, rank))
        (zoo.loss(output) / ranks).backward()
        logits.append(output.logits.detach())
    return logits, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def check_gradients(model, truths, limit=1e-5):
    for key, p in model.named_parameters():
        if key not in truths or truths[key] is None:
            continue
        assert p.grad is not None, f"{key} has no gradient"
        error = compare.error(whole(p.grad), truths[key])
        assert error <= limit, f"{key}: {error:.1e}"


def train_step(names, dims):
    for name in names:
        logits, grads = reference(name, dist.get_world_size())
        model = moepatch.optimize(zoo.build(name), mesh_of(dims))
        output = model(**batch(name, model, dist.get_rank()))
        assert compare.error(output.logits, logits[dist.get_rank()]) <= 1e-6, name
        zoo.loss(output).backward()
        check_gradients(model, grads)
        experts = [p for key, p in model.named_parameters() if key.endswith("experts.down_proj")]
        assert all(isinstance(p, DTensor) and "ep" in p.device_mesh.mesh_dim_names for p in experts)
        assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_and_gradients_are_those_of_one_process(mesh):
    dims = MESHES[mesh]
    on_ranks(torch.Size(dims.values()).numel(), train_step, FAMILIES, dims)


@pytest.mark.parametrize("dims", [(("ep", 2), ("dp_shard", 2)), (("ep", 2), ("dp_replicate", 2)), (("dp_shard", 2), ("ep", 1), ("dp_replicate", 2))])
def test_mesh_dims_in_any_order(dims):
    on_ranks(4, train_step, ["mixtral"], dict(dims))


def uneven(widths):
    """Experts that do not divide evenly: ranks hold more or less of them, and all gather the same. In between they would differ by what they hold."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for width in widths:
        model, one = (zoo.build("mixtral", num_local_experts=3, intermediate_size=width) for _ in range(2))
        model = moepatch.optimize(model, mesh_of({"dp_shard": 2, "ep": 1}), verify=False)
        zoo.loss(model(**batch("mixtral", model, rank))).backward()
        for other in range(ranks):
            (zoo.loss(one(**batch("mixtral", one, other))) / ranks).backward()
        check_gradients(model, {key: p.grad for key, p in one.named_parameters()})


def test_experts_that_do_not_divide_evenly():
    on_ranks(2, uneven, (16, 32, 48, 64, 96, 128))


def choices():
    """What the report says of the dispatcher, for the automatic choice, a name, a function, and a name that cannot serve."""
    import functools

    from moepatch.dispatch.all_to_all import AllToAll

    notes = []
    for dispatch in (None, "all_to_all", functools.partial(AllToAll)):
        model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of({"ep": 2}), dispatch=dispatch)
        notes.append(next(note for note in moepatch.report(model).notes if note.startswith("dispatch")))
    model = zoo.build("qwen3_moe")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(moepatch.BackendUnavailable, match="symm_mem: needs CUDA GPUs, this is cpu"):
        moepatch.optimize(model, mesh_of({"ep": 2}), dispatch="symm_mem")
    with pytest.raises(moepatch.BackendUnavailable, match="local: it moves nothing, and the experts are spread over 2 ranks. Use dispatch='all_to_all'"):
        moepatch.optimize(model, mesh_of({"ep": 2}), dispatch="local")
    assert [type(m) for m in model.modules()] == classes
    return notes


def test_the_dispatcher_is_chosen_and_the_report_says_why_not_another():
    automatic, named, passed = on_ranks(2, choices)[0]
    assert automatic.startswith("dispatch: all_to_all (symm_mem: needs CUDA GPUs, this is cpu; deep_ep: ")
    assert named == "dispatch: all_to_all (chosen by the caller)" and "passed in by the caller" in passed
