"""Stacks whose packages are not here: their adapters against fakes of what they call."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_stacks
import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import models
import stack_automodel
import stack_base
import stack_deepspeed
import stack_v4
import step
from step_weights import materialise, meta_model

from moepatch import balanced_routing
from moepatch.routing import balanced_deal, hot_deal, hot_routing

CPU = torch.device("cpu")
QUICK = ["--tiny", "--repeats", "1", "--warmup", "0"]


def test_options_belong_to_stacks():
    setting = stack_base.Setting(1, 1, CPU, {"loss": None, "automodel.attn": "sdpa", "deepspeed.gate_up_impl": "fused"})
    assert setting.of("moepatch") == {"loss": None} and setting.of("automodel") == {"attn": "sdpa"}
    assert setting.of("deepspeed") == {"gate_up_impl": "fused"} and setting.of("transformers") == {}


def test_options_of_other_stacks_do_not_reach_optimize():
    (row,) = step.main([*QUICK, "--stacks", "moepatch", "--options", "automodel.attn=sdpa", "dense=false"])
    assert row["status"] == "ok", row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_transformers(dtype):
    logits, labels = torch.randn(2, 7, 19, dtype=dtype, requires_grad=True), torch.randint(19, (2, 7))
    loss = stack_base.next_token_loss(logits, labels)
    expected = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 19), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs)


def test_automodel_is_built_filled_forced_and_left(monkeypatch):
    log = fake_stacks.automodel(monkeypatch)
    (row,) = step.main([*QUICK, "--stacks", "automodel", "--options", "automodel.attn=te", "automodel.loss=float32", "--dtype", "float32"])
    assert row["status"] == "ok", row
    assert "attn: te" in row["uses"] and "fake_balanced_gate: False" in row["uses"] and "loss: of torch.float32 logits" in row["uses"]
    (model,) = log.built
    assert model.training and model.moe_overrides == {"aux_loss_coeff": 0.0} and not model.backend.enable_hf_state_dict_adapter
    whole = meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32)
    materialise(whole, CPU, 0)
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight), "the same name and shape: the same weights"
    assert log.freed == 1 and not any(m._forward_hooks for m in model.modules())
    for index, block in enumerate(model.blocks):
        expected_TK = balanced_deal(0)((index, 8), 64, 2)
        assert block.seen and all(torch.equal(ids_TK, expected_TK) for ids_TK in block.seen)


def test_automodel_has_the_routing_of_the_other_stacks(monkeypatch):
    fake_stacks.automodel(monkeypatch)
    hf = meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32)
    own = stack_automodel.prepare(hf, stack_base.Setting(1, 1, CPU))
    own.fill(CPU, 0)
    materialise(hf, CPU, 0)
    ids, theirs = torch.randint(128, (1, 24)), []
    with balanced_routing(hf, 5):
        for layer in hf.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda module, args: theirs.append(args[1]))
        hf(ids)
    with stack_base.forced(own, balanced_deal(5)):
        own(ids, ids)
    assert len(theirs) == 2
    for block, ids_TK in zip(own.model.blocks, theirs, strict=True):
        assert torch.equal(block.seen[-1], ids_TK)
        assert ids_TK.flatten().bincount(minlength=8).tolist() == [6] * 8


def test_automodel_without_a_class_for_it_is_skipped(monkeypatch):
    fake_stacks.automodel(monkeypatch)
    (row,) = step.main([*QUICK, "--model", "Mixtral-8x7B", "--stacks", "automodel"])
    assert (row["status"], row["why"]) == ("skipped", "AutoModel has no class of its own for mixtral")


def test_activation_checkpointing_is_refused(monkeypatch):
    fake_stacks.automodel(monkeypatch)
    (row,) = step.main([*QUICK, "--stacks", "automodel", "--checkpointing"])
    assert row["status"] == "skipped" and "without activation checkpointing" in row["why"]


def test_routing_that_cannot_be_forced_is_not_measured_as_if_it_were(monkeypatch):
    fake_stacks.automodel(monkeypatch)
    monkeypatch.setattr(stack_automodel.AutoModel, "routers", lambda self: [])
    balanced, native = (step.main([*QUICK, "--stacks", "automodel", "--routing", routing])[0] for routing in ("balanced", "native"))
    assert balanced["status"] == "skipped" and "cannot be forced" in balanced["why"] and native["status"] == "ok"


def test_an_option_that_automodel_does_not_know_fails(monkeypatch):
    fake_stacks.automodel(monkeypatch)
    (row,) = step.main([*QUICK, "--stacks", "automodel", "--options", "automodel.atn=te"])
    assert row["status"] == "failed" and "atn" in row["why"]


def test_stacks_that_are_not_installed_say_so():
    rows = step.main(["--tiny", "--stacks", "automodel", "deepspeed"])
    assert [(row["status"], row["why"]) for row in rows] == [("skipped", "nemo_automodel is not installed"), ("skipped", "deepspeed is not installed")]


def test_deepspeed_needs_several_ranks(monkeypatch):
    fake_stacks.deepspeed(monkeypatch)
    (row,) = step.main([*QUICK, "--stacks", "deepspeed"])
    assert (row["status"], row["why"]) == ("skipped", "needs several ranks")


def test_deepspeed_gets_a_filled_model_is_forced_and_reduces_after_the_backward(monkeypatch):
    log = fake_stacks.deepspeed(monkeypatch)
    model = meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32)
    materialise(model, CPU, 0)
    own = stack_deepspeed.prepare(model, stack_base.Setting(2, 2, CPU, {"deepspeed.gate_up_impl": "fused"}))
    assert log.settings[0]["expert_parallel"] == {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe", "gate_up_impl": "fused"}
    ids = torch.randint(128, (1, 24))
    with stack_base.forced(own, hot_deal(3)):
        own(ids, ids).loss.backward()
        own.zero_grad(set_to_none=True)
        own(ids, ids).loss.backward()
    parameters = [name for name, _ in model.named_parameters()]
    assert log.engines[0].reduced == [parameters, parameters], "once a backward, when all gradients are there"
    for index, layer in enumerate(model.model.layers):
        for ids_TK, counts_E in layer.mlp.seen:
            assert torch.equal(ids_TK, hot_deal(3)((index, 8), 24, 2)) and counts_E.dtype is torch.int32
            assert torch.equal(counts_E.long(), ids_TK.flatten().bincount(minlength=8))
    own.close()
    assert log.engines[0].destroyed


def test_deepspeed_without_a_preset_is_not_served(monkeypatch):
    fake_stacks.deepspeed(monkeypatch)
    model = meta_model(models.make_config("gpt-oss-20b", tiny=True), torch.float32)
    with pytest.raises(stack_base.NotServed, match="no preset for gpt_oss"):
        stack_deepspeed.prepare(model, stack_base.Setting(2, 2, CPU))


def test_a_loop_over_a_list_of_experts_computes_what_transformers_does():
    rows = step.main([*QUICK, "--stacks", "transformers", "transformers-v4", "--dtype", "float32"])
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5) and "experts: a loop over a list" in rows[1]["uses"]


def test_the_loop_is_forced_and_has_the_gradients_of_the_fused_experts():
    fused, listed = (meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32) for _ in range(2))
    for model in (fused, listed):
        materialise(model, CPU, 0)
    own = stack_v4.prepare(listed, stack_base.Setting(1, 1, CPU))
    ids = torch.randint(128, (1, 24))
    with stack_base.forced(own, hot_deal(3)), hot_routing(fused, 3):
        own(ids, ids).loss.backward()
        fused(input_ids=ids, labels=ids).loss.backward()
    for ours, theirs in zip(own.model.model.layers, fused.model.layers, strict=True):
        torch.testing.assert_close(ours.mlp.gate.weight.grad, theirs.mlp.gate.weight.grad)
        for index, expert in enumerate(ours.mlp.experts.experts):
            # An expert that no token chose was not called.
            gate, up, down = (torch.zeros_like(p) if p.grad is None else p.grad for p in expert.parameters())
            torch.testing.assert_close(torch.cat([gate, up]), theirs.mlp.experts.gate_up_proj.grad[index])
            torch.testing.assert_close(down, theirs.mlp.experts.down_proj.grad[index])


def test_on_several_ranks_every_expert_of_the_loop_is_a_unit_of_its_own():
    for units, loss in on_ranks(2, _looped):
        assert units == 2 * 8 + 2 + 1 and 4 < loss < 6


def _looped():
    sys.path.insert(0, str(BENCH))
    import models
    import stack_base
    import stack_v4
    from step_weights import meta_model

    own = stack_v4.prepare(meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32), stack_base.Setting(2, 2, CPU))
    own.fill(CPU, 0)
    ids = torch.arange(64).view(1, 64)
    with stack_base.forced(own, balanced_deal(0)):
        loss = own(ids, ids).loss
        loss.backward()
    assert all(p.grad is not None for p in own.parameters())
    return sum(isinstance(m, FSDPModule) for m in own.modules()), loss.item()


def test_experts_that_were_no_list_are_not_served():
    model = meta_model(models.make_config("gpt-oss-20b", tiny=True), torch.float32)
    with pytest.raises(stack_base.NotServed, match="gpt_oss are no list"):
        stack_v4.prepare(model, stack_base.Setting(1, 1, CPU))
