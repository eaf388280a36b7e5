"""A loop over experts that are FSDP units hangs when ranks route differently; patched, the same model trains on the same routing."""

from __future__ import annotations

import copy

import compare
import pytest
import torch
import torch.distributed as dist
from listed import E, K, Listed, listed, routed_apart
from ranks import RankError, on_ranks
from test_parallel import mesh_of, whole
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import moepatch


def choices(model, ids):
    """The experts that any token of a batch chooses, by layer."""
    seen = []

    def hook(module, args, out):
        seen.append(sorted(set(out.topk(K).indices.flatten().tolist())))

    hooks = [layer.mlp.gate.register_forward_hook(hook) for layer in model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_ranks_of_these_tests_route_differently():
    model = listed()
    assert [len(c) for c in choices(model, routed_apart(0))] == [K, K] and [len(c) for c in choices(model, routed_apart(1))] == [E, E]


def loop_under_fsdp():
    model = listed()
    # Experts have a group of their own: on a shared one gloo notices that two different gathers have met, and aborts instead of hanging.
    experts = DeviceMesh.from_group(dist.new_group([0, 1]), "cpu")
    for layer in model.layers:
        for expert in layer.mlp.experts:
            fully_shard(expert, mesh=experts)
        fully_shard(layer)
    fully_shard(model)
    print("ready to train", flush=True)
    for _ in range(2):
        model(routed_apart(dist.get_rank())).backward()


def test_the_loop_hangs_under_fsdp():
    with pytest.raises(RankError, match=r"ranks \[\d.*\] hung") as caught:
        on_ranks(2, loop_under_fsdp, stuck_after="ready to train")
    report = str(caught.value)
    assert report.count("ready to train") == 2, "the ranks were slow, not stuck"
    assert "_fully_shard" in report, "the stacks show where: in a gather of FSDP2"


def patched_under_fsdp():
    truth = listed()
    model = moepatch.optimize(listed(), mesh_of({"ep": 2}))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (truth, model)]
    for _ in range(3):
        for rank in range(2):
            (truth(routed_apart(rank)) / 2).backward()
        model(routed_apart(dist.get_rank())).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    mine = {key: value for key, value in model.state_dict().items() if ".experts." in key}
    assert len(mine) == 2 * E // 2 * 3 and set(mine) < set(truth.state_dict())
    for key, value in mine.items():
        assert compare.error(value, truth.state_dict()[key]) <= 1e-5
    changed = {key: value + 1 if ".experts." in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(changed)
    model.load_state_dict({key: value - 1 if ".experts." in key else value for key, value in model.state_dict().items()})
    moepatch.restore(model)
    for key, value in truth.state_dict().items():
        assert compare.error(whole(model.state_dict()[key]), value) <= 1e-5, key
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_the_patched_model_trains_on_the_same_routing():
    on_ranks(2, patched_under_fsdp)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("tuple_out", [True, False])
def test_on_one_device(normalised, tuple_out):
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
    model = listed(normalised=normalised, tuple_out=tuple_out)
    truth = copy.deepcopy(model)
    experts, parameters = list(model.layers[0].mlp.experts), dict(model.named_parameters())
    moepatch.optimize(model)
    assert isinstance(model.layers[0].mlp.experts, torch.nn.ModuleList)
    for m in (truth, model):
        m(ids).backward()
    for mine, theirs in zip(model.layers[0].mlp.experts.parameters(), truth.layers[0].mlp.experts.parameters(), strict=True):
        assert compare.error(mine.grad, theirs.grad) <= 1e-5
    for m in (truth, model):
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    state = model.state_dict()
    assert set(state) == set(truth.state_dict())
    assert all(compare.error(state[key], value) <= 1e-5 for key, value in truth.state_dict().items())
    model.load_state_dict(truth.state_dict())
    copied = copy.deepcopy(model)
    moepatch.restore(model)
    assert [a is b for a, b in zip(model.layers[0].mlp.experts, experts, strict=True)] == [True] * E
    assert all(model.get_parameter(key) is p for key, p in parameters.items())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in truth.state_dict().items())
    assert type(model.layers[0].mlp.experts) is torch.nn.ModuleList and torch.equal(copied(ids), copied(ids))
    moepatch.optimize(model)


def test_what_is_refused():
    class Jitter(type(listed().layers[0].mlp)):
        """Noise in training only."""

        def forward(self, hidden_states):
            return super().forward(hidden_states * torch.rand_like(hidden_states) if self.training else hidden_states)

    model = listed().eval()
    for layer in model.layers:
        layer.mlp.__class__ = Jitter
    with pytest.raises(moepatch.NothingMatched, match="softmax top-k"):
        moepatch.optimize(model)


def test_a_list_is_inspected_before_and_after_the_patch():
    model = listed()
    before = moepatch.inspect(model)
    assert before.exit_code == 0 and "list of MLPs" in str(before) and "K=2" in str(before)
    moepatch.optimize(model)
    assert moepatch.inspect(model).exit_code == 0 and moepatch.report(model).patched == 2
