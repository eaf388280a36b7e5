"""Errors that a user can cause: refused before anything changes, in words that name the module, the numbers and what to do."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from facts import facts
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moepatch


def refused(model, error, words, **options):
    """Asserts that optimize and plan refuse, and that the model is as it was."""
    before = facts(model)
    with pytest.raises(error, match=words):
        moepatch.optimize(model, **options)
    assert facts(model) == before


def code(model, **options):
    with pytest.raises(moepatch.CheckFailed) as caught:
        moepatch.optimize(model, **options)
    return [problem.code for problem in caught.value.problems]


def test_nothing_in_the_model():
    refused(nn.Module(), moepatch.NothingMatched, r"Module has no mixture of experts: none of its 1 modules is anything that moepatch can serve.*unchanged")


def test_a_dense_model_is_patched_with_a_note():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    refused(model, moepatch.NothingMatched, "LlamaForCausalLM: the plan leaves every module alone. The model is unchanged", dense=False)
    report = moepatch.report(moepatch.optimize(model))
    assert "there is no mixture of experts in this model" in report.notes
    assert not report.plan.mixture and {"norm", "mlp", "attention_block"} <= {p.site.kind for p in report.plan.patterns}


@pytest.mark.parametrize("name", ["doge", "nllb_moe"])
def test_the_dense_half_around_a_refused_mixture_is_patched(name):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    model = zoo.build(name)
    words = rf"^{type(model).__name__} has a mixture of experts that moepatch cannot serve:\n(  - model\..*\n)+The model is unchanged\.$"
    refused(model, moepatch.NothingMatched, words, dense=False)
    refused(model, moepatch.PlanMismatch, r"nothing that experts='torch' could serve.* model\..* is refused: .*Without experts=", experts="torch")
    report = moepatch.report(moepatch.optimize(model))
    assert not report.plan.mixture and report.plan.refusals and report.patched > 0
    assert "its mixture of experts is left alone: see the reasons" in report.notes
    assert report.plan.refusals[0].reason in " ".join(str(report).split())
    assert moepatch.inspect(model).exit_code == 3


def test_not_a_module():
    with pytest.raises(moepatch.MoePatchError, match="takes a torch.nn.Module.*this is a dict"):
        moepatch.optimize({})


class Params4bit(nn.Parameter):
    """A tensor of its own, as quantizing libraries have it."""


QUANTIZED_EXPERTS = {
    "int8": lambda: nn.Parameter(torch.zeros(8, 64, 48, dtype=torch.int8), requires_grad=False),
    "float8_e4m3fn": lambda: nn.Parameter(torch.zeros(8, 64, 48).to(torch.float8_e4m3fn), requires_grad=False),
    "4-bit": lambda: Params4bit(torch.zeros(8, 64, 48)),
}


@pytest.mark.parametrize("form", QUANTIZED_EXPERTS)
def test_quantized_experts_keep_their_own_code(qwen3, form):
    """The rest of the model is patched, the other experts too; `strict` says that something is left."""
    experts = qwen3.model.layers[1].mlp.experts
    experts.down_proj = QUANTIZED_EXPERTS[form]()
    refused(qwen3, moepatch.LeftAlone, f"Qwen3MoeExperts \\(model.layers.1.mlp.experts\\): its weights are {form}", strict=True)
    report = moepatch.report(moepatch.optimize(qwen3))
    (refusal,) = report.plan.refusals
    assert refusal.fqn == "model.layers.1.mlp.experts" and refusal.reason.startswith(f"its weights are {form}")
    assert isinstance(qwen3.model.layers[0].mlp.experts, moepatch.Patched) and not isinstance(experts, moepatch.Patched)


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_wrapped_in_ddp(qwen3, one_process_group):
    wrapped = nn.parallel.DistributedDataParallel(qwen3)
    refused(wrapped, moepatch.CheckFailed, r"it is wrapped in DistributedDataParallel. Optimize the inner module \(model.module\)")


def test_a_model_sharded_by_fsdp(qwen3, one_process_group):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(qwen3.model.layers[0], mesh=mesh)
    with pytest.raises(moepatch.CheckFailed, match=r"model\.layers\.0: it is sharded by FSDP already.*before fully_shard"):
        moepatch.optimize(qwen3)


def test_a_dtensor_parameter(qwen3, one_process_group):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    experts = qwen3.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)]))
    with pytest.raises(moepatch.CheckFailed, match=r"experts\.down_proj: it is sharded already: a DTensor of global shape \(8, 64, 48\)"):
        moepatch.optimize(qwen3)


def test_offload_hooks(qwen3):
    from accelerate import cpu_offload

    cpu_offload(qwen3, execution_device="cpu")
    with pytest.raises(moepatch.CheckFailed, match=r"accelerate moves its weights.*remove_hook_from_module"):
        moepatch.optimize(qwen3)
    assert code(qwen3) == ["offloaded"]


def test_parameters_held_by_an_optimizer_that_was_passed_in(qwen3):
    optimizer = torch.optim.AdamW(qwen3.parameters())
    held = r"holds 4 of the parameters to be patched \(model\.layers\.0\.mlp\.experts\.gate_up_proj, …\)"
    words = rf"the AdamW that was passed in {held}\. Build the optimizer after"
    refused(qwen3, moepatch.CheckFailed, words, optimizer=optimizer)
    other = torch.optim.AdamW(qwen3.model.embed_tokens.parameters())
    moepatch.optimize(qwen3, optimizer=other)


def test_compiled_models(qwen3):
    assert code(torch.compile(qwen3)) == ["compiled"]
    qwen3.model.layers[0].compile()
    refused(qwen3, moepatch.CheckFailed, r"model\.layers\.0: Qwen3MoeDecoderLayer.compile\(\) was called on it. Optimize the plain model first")


def test_a_forward_replaced_on_the_instance(qwen3):
    """Liger and transformers' expert parallelism do this: it would hide the patched class."""
    experts = qwen3.model.layers[1].mlp.experts
    experts.forward = functools.partial(type(experts).forward, experts)
    refused(qwen3, moepatch.CheckFailed, r"layers\.1\.mlp\.experts: something has replaced its forward on the instance")


def test_a_mesh_without_a_process_group(qwen3):
    refused(qwen3, moepatch.CheckFailed, "there is no process group. Start with torchrun", mesh=object())


def test_every_problem_is_named_at_once(qwen3):
    qwen3.model.layers[0].compile()
    qwen3.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.zeros(8, 64, 48, dtype=torch.int8), requires_grad=False)
    assert code(qwen3, mesh=object()) == ["mesh", "compiled", "quantized"]


def test_mixed_dtypes_are_refused_and_the_rest_is_patched(qwen3):
    experts = qwen3.model.layers[0].mlp.experts
    experts.down_proj.data = experts.down_proj.data.bfloat16()
    moepatch.optimize(qwen3)
    (refusal,) = moepatch.report(qwen3).plan.refusals
    assert refusal.fqn == "model.layers.0.mlp.experts"
    assert "mixed dtypes (gate_up_proj float32, down_proj bfloat16)" in refusal.reason
    assert [p.fqns for p in moepatch.report(qwen3).plan.mixture] == [("model.layers.1.mlp.experts",)]


def test_an_unknown_experts_module_is_refused_and_the_rest_is_patched(qwen3):
    class OddExperts(nn.Module):
        """Looks like experts and adds something of its own."""

        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(8, 96, 64) * 0.1)
            self.down_proj = nn.Parameter(torch.randn(8, 64, 48) * 0.1)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states + top_k_weights.sum() + self.down_proj.sum()

    qwen3.model.layers[1].mlp.experts = OddExperts()
    moepatch.optimize(qwen3)
    (refusal,) = moepatch.report(qwen3).plan.refusals
    assert refusal.fqn == "model.layers.1.mlp.experts" and "does not compute what its parameters suggest" in refusal.reason
    assert "register_matcher" in refusal.hint
    assert [p.fqns for p in moepatch.report(qwen3).plan.mixture] == [("model.layers.0.mlp.experts",)]
    assert "model.layers.1.mlp.experts" in str(moepatch.report(qwen3))


def test_unknown_options_and_backends_are_refused_with_what_exists(qwen3):
    refused(qwen3, moepatch.PlanMismatch, r"no option 'expert'\. Did you mean 'experts'\?", expert="torch")
    there_are = r"There are: quack, triton, torch, reference, te, te_fp8\."
    refused(qwen3, moepatch.BackendUnavailable, rf"No backend named 'cutlass' for 'experts'\. {there_are}", experts="cutlass")


def test_a_backend_that_nothing_is_there_for_is_refused(qwen3):
    has = r".* takes\. It has modules of: experts, .*norm"
    refused(qwen3, moepatch.PlanMismatch, r"nothing that mlp='torch' could serve: no module of that kind" + has, mlp="torch")
    refused(qwen3, moepatch.PlanMismatch, r"nothing that ssd='triton' could serve" + has, ssd="triton", plan=moepatch.plan(qwen3))
    refused(qwen3, moepatch.BackendUnavailable, r"No backend named 'turbo' for 'ssd'\. There are: triton", ssd="turbo")
    refused(nn.Linear(2, 2), moepatch.PlanMismatch, r"nothing that experts='torch' could serve.*It has modules of: no kind\.", experts="torch")
    moepatch.optimize(qwen3, mlp=None, ssd=None)


def test_a_backend_that_cannot_serve_says_why():
    model = zoo.build("qwen3_moe", dtype=torch.float64)
    refused(model, moepatch.BackendUnavailable, r"layers\.0\.mlp\.experts: the backend 'torch' cannot serve E=8 .*no float64", experts="torch")
    moepatch.optimize(model)
    report = moepatch.report(model)
    assert {p.backend for p in report.plan.mixture} == {"reference"} and "no float64" in report.plan.mixture[0].why
    assert any("slow" in note for note in report.notes)


def test_errors_survive_pickling():
    import pickle

    error = moepatch.CheckFailed((moepatch.Problem("mesh", "model", "what.", "hint."),))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.problems == error.problems


def test_a_plan_for_another_model_is_refused(qwen3):
    plan = moepatch.plan(zoo.build("mixtral"))
    refused(qwen3, moepatch.PlanMismatch, r"was made for E=8 H=64 I=80|which this Qwen3MoeForCausalLM does not have", plan=plan)


def test_a_model_that_was_patched_through_another_object_is_refused(qwen3):
    wrapper = nn.ModuleDict({"policy": qwen3})
    moepatch.optimize(qwen3.model)
    for model in (qwen3, wrapper):
        with pytest.warns(UserWarning, match=r"not patched; nothing to do\. '(policy\.)?model' inside it is: moepatch\.restore\(model\.get_submodule"):
            moepatch.restore(model)
    words = r"model\.layers\.0: it is patched already: optimize\(\) was called for 'model' inside this model.*moepatch\.restore"
    refused(qwen3, moepatch.CheckFailed, words)
    assert code(wrapper) == ["patched"]
    moepatch.restore(qwen3.model)
    before = facts(qwen3)
    moepatch.optimize(wrapper)
    refused(qwen3, moepatch.CheckFailed, r"model: it is patched already: optimize\(\) was called for another object that shares it")
    with pytest.warns(UserWarning, match="through the object that optimize"):
        moepatch.restore(qwen3)
    with pytest.raises(moepatch.MoePatchError, match=r"Modules in it are, through the object.*call moepatch\.report\(\) on that one"):
        moepatch.report(qwen3)
    moepatch.restore(wrapper)
    assert facts(qwen3) == before


def test_arguments_without_effect_or_of_the_wrong_kind(qwen3):
    refused(qwen3, moepatch.MoePatchError, r"dispatch='all_to_all' moves tokens between the ranks of a mesh, and there is none", dispatch="all_to_all")
    refused(qwen3, moepatch.MoePatchError, "optimizer is <class 'torch.optim.adamw.AdamW'>; it can be the optimizer", optimizer=torch.optim.AdamW)
    refused(qwen3, moepatch.MoePatchError, "plan is a str; it can be what moepatch.plan", plan="plan.json")
    for call in (moepatch.restore, moepatch.report):
        with pytest.raises(moepatch.MoePatchError, match="takes a torch.nn.Module.*this is a NoneType"):
            call(None)
    report = moepatch.report(moepatch.optimize(qwen3, plan=moepatch.plan(qwen3), dense=False, loss="chunked"))
    assert {p.site.kind for p in report.plan.patterns if p.backend} == {"experts", "loss"}
