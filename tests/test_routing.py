"""Forced routing has exactly equal load and changes nothing else; recorded routing is what happened."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import zoo
from ranks import on_ranks

import moepatch
from moepatch.routed import routed_layers
from moepatch.routing import balanced_ids, balanced_routing, hot_ids, hot_routing, record_routing

AWKWARD = [(4096, 8, 128), (37, 3, 7), (5, 4, 4), (1, 2, 9), (100, 6, 128), (50, 22, 512), (0, 2, 4), (11, 1, 3), (13, 5, 6)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), AWKWARD)
@pytest.mark.parametrize("seed", [0, 1])
def test_loads_differ_by_at_most_one_and_no_token_has_an_expert_twice(tokens, top_k, experts, seed):
    ids = balanced_ids(tokens, top_k, experts, seed)
    assert ids.shape == (tokens, top_k)
    loads = ids.flatten().bincount(minlength=experts)
    assert len(loads) == experts and loads.max() - loads.min() <= 1
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_draws_depend_on_the_seed_alone():
    assert torch.equal(balanced_ids(64, 2, 8, 3), balanced_ids(64, 2, 8, 3))
    assert not torch.equal(balanced_ids(64, 2, 8, 3), balanced_ids(64, 2, 8, 4))


def test_hot_experts_follow_their_odds():
    ids = hot_ids(20_000, 1, -torch.arange(1, 6).float().log(), seed=0)
    share = ids.flatten().bincount(minlength=5) / len(ids)
    odds = 1 / torch.arange(1, 6)
    assert torch.allclose(share, odds / odds.sum(), atol=0.015)
    assert all(len(set(row)) == 3 for row in hot_ids(200, 3, torch.zeros(5), seed=0).tolist())


def test_hot_layers_are_popular_in_different_experts(qwen3):
    with hot_routing(qwen3), record_routing(qwen3) as record:
        qwen3(**_tokens(qwen3))
    fullest = [int(layer.tokens_E.argmax()) for layer in record.layers]
    assert all(layer.max_over_mean > 1.5 for layer in record.layers) and len(set(fullest)) > 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "llama4_text", "dbrx", "longcat_flash"])
def test_patched_and_unpatched_models_get_the_same_choice(family):
    if zoo.available(family):
        pytest.skip(zoo.available(family))
    model = zoo.build(family)
    batch = zoo.inputs(family, model)
    with balanced_routing(model, seed=5), record_routing(model) as before:
        expected = zoo.loss(model(**batch))
    moepatch.optimize(model, dense=False)
    with balanced_routing(model, seed=5), record_routing(model) as after:
        loss = zoo.loss(model(**batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert torch.equal(one.tokens_E, other.tokens_E)
        assert one.tokens_E.max() - one.tokens_E.min() <= 1 and one.tokens > 0


@pytest.mark.parametrize("patched", [False, True])
def test_the_weights_stay_the_routers_and_carry_its_gradient(qwen3, patched):
    if patched:
        moepatch.optimize(qwen3)
    seen = []
    mixture = qwen3.model.layers[0].mlp
    mixture.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    with balanced_routing(qwen3):
        handle = mixture.experts.register_forward_hook(lambda module, args, output: seen.append(args))
        qwen3(**_tokens(qwen3)).loss.backward()
        handle.remove()
    (*_, chosen_weights, chosen_ids), (_, ids, weights) = seen
    assert weights is chosen_weights and not torch.equal(ids, chosen_ids)
    assert mixture.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("patched", [False, True])
def test_a_recompute_sees_the_same_choice_and_is_counted_once(qwen3, use_reentrant, patched):
    if patched:
        moepatch.optimize(qwen3)
    twin = copy.deepcopy(qwen3)
    batch = _tokens(qwen3)
    with balanced_routing(qwen3):
        # Two forwards before the first backward: what was drawn last is not what the first recompute needs.
        (qwen3(**batch).loss + qwen3(**{key: value[:1] for key, value in batch.items()}).loss).backward()
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    twin.train()
    with balanced_routing(twin), record_routing(twin) as record:
        (twin(**batch).loss + twin(**{key: value[:1] for key, value in batch.items()}).loss).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in qwen3.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    tokens = batch["input_ids"].numel() + batch["input_ids"].shape[1]
    assert [layer.tokens for layer in record.layers] == [tokens * qwen3.config.num_experts_per_tok] * 2


def test_the_record_is_what_the_routers_chose(qwen3):
    chosen = {}
    for index, layer in enumerate(qwen3.model.layers):
        layer.mlp.gate.register_forward_hook(lambda module, args, output, index=index: chosen.setdefault(index, []).append(output[-1]))
    with record_routing(qwen3) as record:
        for _ in range(2):
            qwen3(**_tokens(qwen3))
    qwen3(**_tokens(qwen3))  # after the context: not counted
    for index, layer in enumerate(record.layers):
        expected = torch.cat(chosen[index][:2]).flatten().bincount(minlength=8)
        assert torch.equal(layer.tokens_E, expected)
        row = record.table()[index]
        assert row["tokens"] == int(expected.sum()) and row["dead"] == int((expected == 0).sum())
        assert row["max_over_mean"] == pytest.approx(float(expected.max() / expected.float().mean()), abs=1e-3)


def test_entropy_is_one_for_even_and_zero_for_all_in_one():
    from moepatch.routing_record import LayerLoad

    assert LayerLoad("even", torch.full((8,), 5)).entropy == pytest.approx(1)
    alone = LayerLoad("one", torch.tensor([0, 9, 0, 0]))
    assert alone.entropy == pytest.approx(0) and alone.dead == 3 and alone.max_over_mean == 4
    assert LayerLoad("none", torch.zeros(4, dtype=torch.int64)).max_over_mean == 0


def test_ids_that_mean_no_expert_are_not_counted(qwen3):
    experts = qwen3.model.layers[0].mlp.experts
    moepatch.optimize(qwen3)
    with record_routing(qwen3) as record:
        experts(torch.randn(2, 64), torch.tensor([[0, 99], [-1, 7]]), torch.rand(2, 2))
    assert record.layers[0].tokens_E.tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def test_experts_called_with_keywords(qwen3):
    experts = qwen3.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(4, 64), torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2)
    with balanced_routing(qwen3), record_routing(qwen3) as record:
        by_name = experts(hidden_states=x, top_k_index=ids, top_k_weights=weights)
        assert torch.equal(by_name, experts(x, ids, weights))
    assert record.layers[0].tokens_E.tolist() == [2] * 8


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device(qwen3):
    model = moepatch.optimize(qwen3.cuda().bfloat16(), dense=False)  # torch's grouped GEMM waits in fp32
    experts = model.model.layers[0].mlp.experts
    call = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64, device="cuda"), torch.rand(4, 2, device="cuda")
    with balanced_routing(model), record_routing(model) as record:
        experts(*call)  # the draw is made and moved
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(*call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert record.layers[0].tokens_E.tolist() == [2] * 8


def test_nothing_stays_behind(qwen3):
    batch = _tokens(qwen3)
    before = qwen3(**batch).loss
    with pytest.raises(RuntimeError, match="on purpose"), balanced_routing(qwen3), record_routing(qwen3):
        raise RuntimeError("on purpose")
    assert torch.equal(qwen3(**batch).loss, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in qwen3.modules())


def test_what_cannot_be_intercepted_is_named():
    with pytest.raises(moepatch.MoePatchError, match=r"model\.layers\.0\.mlp\.input_linear"), balanced_routing(zoo.build("jetmoe")):
        pass
    with pytest.raises(moepatch.MoePatchError, match="no mixture of experts"), record_routing(torch.nn.Linear(2, 2)):
        pass


def test_the_record_prints(qwen3):
    with balanced_routing(qwen3), record_routing(qwen3) as record:
        qwen3(**_tokens(qwen3))
    text = str(record)
    assert "model.layers.0.mlp.experts" in text and "max/mean" in text
    html = record._repr_html_()
    assert html.count("data:image/png;base64,") == 2 and "model.layers.1.mlp.experts" in html


def test_heatmap(qwen3, tmp_path):
    pytest.importorskip("matplotlib")
    with record_routing(qwen3) as record:
        qwen3(**_tokens(qwen3))
    record.heatmap().savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 3000


@pytest.mark.parametrize("patched", [False, True])
def test_on_two_ranks_each_draws_for_its_own_tokens(patched):
    for loads, summed, ids in on_ranks(2, functools.partial(_sharded, patched)):
        assert loads == [[6] * 8] * 2
        assert summed == [[12] * 8] * 2
        assert not torch.equal(ids[0], ids[1])


def _sharded(patched: bool):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = zoo.build("qwen3_moe")
    if patched:
        model = moepatch.optimize(model, moepatch.make_mesh(ep=2))
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    assert [layer.num_experts for layer in routed_layers(model)] == [8, 8]
    seen = []
    with balanced_routing(model), record_routing(model) as record:
        handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda module, args, output: seen.append(args[1]))
        model(**_tokens(model)).loss.backward()
        handle.remove()
    loads = [layer.tokens_E.tolist() for layer in record.layers]
    everywhere = [torch.empty_like(seen[0]) for _ in range(2)]
    dist.all_gather(everywhere, seen[0])
    return loads, [layer.tokens_E.tolist() for layer in record.all_reduce().layers], everywhere


def _tokens(model):
    return zoo.inputs("qwen3_moe", model)
