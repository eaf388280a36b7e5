"""A patched model in the hands of torch's and accelerate's wrappers: what two steps do to every weight is what they do to the plain model's."""

from __future__ import annotations

import gc
import types

import accelerate
import pytest
import torch
import torch.distributed as dist
import zoo
from compare import error
from ranks import on_ranks
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from wrappings import PREFETCH, SHARD_GRAD, accelerated, ddp, emptied, fsdp1, fsdp2, steps

import moepatch

#: Family, whether the head is tied, gradient checkpointing (None, or whether it is reentrant), the wrapping.
DDP = {
    "plain": ("qwen3_moe", False, None, ddp()),
    "tied, views": ("qwen3_moe", True, None, ddp(gradient_as_bucket_view=True, broadcast_buffers=False)),
    "unused": ("qwen3_moe", False, None, ddp(find_unused_parameters=True)),
    "static, reentrant": ("gpt_oss", False, True, ddp(static_graph=True)),
    "static": ("qwen3_moe", True, None, ddp(static_graph=True)),
    "hook": ("deepseek_v3", False, None, ddp("allreduce_hook", bucket_cap_mb=0.1)),
    "powersgd": ("qwen3_moe", False, False, ddp("powersgd")),
}
FSDP1 = {
    "whole": ("qwen3_moe", True, None, fsdp1("whole")),
    "layers": ("gpt_oss", False, False, fsdp1("layers", use_orig_params=True)),
    "linears": ("qwen3_moe", False, None, fsdp1("linears")),
    "linears, own": ("gpt_oss", False, None, fsdp1("linears", use_orig_params=True, **PREFETCH)),
    "leaves": ("deepseek_v3", False, None, fsdp1("leaves", use_orig_params=True)),
    "head": ("qwen3_moe", False, None, fsdp1("head", use_orig_params=True)),
    "head, kept": ("qwen3_moe", False, None, fsdp1("head", **SHARD_GRAD)),
    "experts": ("gpt_oss", False, None, fsdp1("experts")),
    "size": ("qwen3_moe", False, None, fsdp1(3000)),
}
FSDP2 = {
    "whole": ("qwen3_moe", True, None, fsdp2()),
    "layers": ("deepseek_v3", False, False, fsdp2("layers")),
    "linears": ("gpt_oss", False, None, fsdp2("linears")),
    "everything": ("qwen3_moe", False, None, fsdp2("layers", "leaves", reshard_after_forward=True)),
    "head": ("gpt_oss", False, None, fsdp2("head", "experts", reshard_after_forward=False)),
    "accelerate": ("qwen3_moe", False, None, accelerated(auto_wrap_policy="transformer_based_wrap")),
}


def built(name: str, tied: bool = False, reentrant: bool | None = None) -> torch.nn.Module:
    model = zoo.build(name, tie_word_embeddings=tied).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def given(name: str, model) -> dict:
    ids = zoo.inputs(name, model, seed=dist.get_rank() if dist.is_initialized() else 0)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def patched(model):
    return moepatch.optimize(model, measure=False, verify=False)


def compare(table: str) -> list[str]:
    """Where the patched model ends elsewhere than the plain one, in words."""
    said = []
    for case, (name, tied, reentrant, wrap) in globals()[table].items():
        plain, model = built(name, tied, reentrant), patched(built(name, tied, reentrant))
        before, inputs = {key: p.detach().clone() for key, p in plain.named_parameters()}, given(name, plain)
        losses, truth = steps(wrap(plain), plain, inputs, accumulated=case == "hook")
        found_losses, found = steps(wrap(model), model, inputs, accumulated=case == "hook")
        assert found.keys() == truth.keys(), (case, found.keys() ^ truth.keys())
        moved = {key: value - before[key] for key, value in truth.items()}
        assert min(step.norm() for step in moved.values()) > 0, f"{case}: a weight of the plain model was not trained"
        said += [f"{case}: {key}" for key, step in moved.items() if error(found[key] - before[key], step) > 5e-5]
        said += [f"{case}: losses {found_losses}, not {losses}"] * (max(abs(a - b) for a, b in zip(losses, found_losses)) > 5e-5)
    return said


def everywhere() -> list[str]:
    return compare("DDP") + compare("FSDP1") + compare("FSDP2")


def test_two_steps_do_what_they_do_to_the_plain_model():
    assert on_ranks(2, everywhere) == [[], []]


def before_and_after() -> None:
    """What a wrapper has is named before the patch; a patched model keeps nothing of what FSDP frees, says what is called, and can be restored."""
    for own in (False, True):
        model = built("qwen3_moe")
        FullyShardedDataParallel(model, use_orig_params=own, device_id=torch.device("cpu"))
        with pytest.raises(moepatch.CheckFailed, match="flat parameter. Optimize the model before FullyShardedDataParallel"):
            moepatch.optimize(model)
    for wrap, said in ((ddp(), False), (fsdp1("linears", use_orig_params=True), True), (fsdp1("head"), True), (fsdp2("leaves"), True)):
        plain, model = built("qwen3_moe"), patched(built("qwen3_moe"))
        wrapped, truth = wrap(model), wrap(plain)
        steps(truth, plain, given("qwen3_moe", plain)), steps(wrapped, model, given("qwen3_moe", model))
        notes = " ".join(moepatch.report(model).notes)
        assert ("called by itself" in notes or "frees its weight before the loss" in notes) == said, notes
        moepatch.restore(model)
        expected, found = (steps(w, m, given("qwen3_moe", m))[1] for w, m in ((truth, plain), (wrapped, model)))
        assert all(error(found[key], value) <= 1e-5 for key, value in expected.items())


def memory() -> list[int]:
    """Bytes of all tensors that are left, with the plain and with the patched model."""
    found = []
    for make in (lambda model: model, patched):
        model = make(built("qwen3_moe"))
        kept = fsdp2("layers")(model)
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not issubclass(type(t), DTensor) and not t.is_meta]
        found.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
        del model, kept, tensors
        gc.collect()
    return found


def test_before_and_after():
    on_ranks(2, before_and_after)
    for plain, ours in on_ranks(2, memory):
        assert ours - plain < 4096, (plain, ours)  # a layer's q, k and v alone are 32768


@pytest.mark.parametrize("storage", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_weights_that_are_there_for_their_module_alone(family, storage):
    results = []
    for make in (lambda model: model, patched):
        model = make(built(family))
        back = emptied(model, storage)
        loss = model(**given(family, model)).loss
        loss.backward()
        back()
        results.append((loss, {key: p.grad for key, p in model.named_parameters()}))
        if make is patched:
            moepatch.restore(model)
    (loss, truth), (found_loss, found) = results
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    assert all(error(found[key], grad) <= 1e-5 for key, grad in truth.items())


def offloads(model, folder):
    """accelerate's ways to keep weights elsewhere: in the CPU's memory, on the disk, both by a device map."""
    yield "cpu", lambda m: accelerate.cpu_offload(m, execution_device=torch.device("cpu"))
    yield "disk", lambda m: accelerate.disk_offload(m, folder / "all", execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    yield "both", lambda m: accelerate.dispatch_model(m, places, main_device="cpu", offload_dir=folder / "some", force_hooks=True)


def test_offloaded_by_accelerate(tmp_path):
    plain = built("qwen3_moe").eval()
    inputs = given("qwen3_moe", plain)
    with torch.no_grad():
        truth = plain(**inputs)
    for way, offload in offloads(plain, tmp_path):
        model = patched(built("qwen3_moe").eval())
        offload(model)
        with torch.no_grad():
            found = model(**inputs)
        torch.testing.assert_close(found.logits, truth.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.loss, truth.loss)
        assert "(accelerate)" in " ".join(moepatch.report(model).notes)
        with pytest.raises(moepatch.MoePatchError, match="forward on the instance.*remove_hook_from_module"):
            moepatch.restore(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        moepatch.restore(model)
        assert type(model.model.layers[1].mlp) is type(plain.model.layers[1].mlp)


def test_a_model_that_was_offloaded_before():
    """accelerate leaves every module a forward of its own."""
    model, inputs = built("qwen3_moe"), given("qwen3_moe", built("qwen3_moe"))
    truth = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(moepatch.CheckFailed, match="remove the hooks with accelerate"):
        moepatch.optimize(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(moepatch.optimize(model, measure=False)(**inputs).logits, truth, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, moepatch.Patched))


def test_hooks_for_all_modules_see_the_modules_that_the_family_calls():
    seen = []
    for make in (lambda model: model, patched):
        model = make(built("deepseek_v3"))
        names = {id(module): name for name, module in model.named_modules()}
        calls = set()
        with register_module_forward_pre_hook(lambda module, args: calls.add(names.get(id(module)))):
            model(**given("deepseek_v3", model))
        seen.append(calls)
    missed = {name for name in seen[0] - seen[1] if next(model.get_submodule(name).parameters(), None) is not None}
    assert not missed, missed


def test_a_forward_of_its_own_that_a_model_had_before_stays():
    """It goes around what was there, and restoring takes nothing from it. One that came since would go on calling what was patched."""
    model = zoo.build("qwen3_moe")
    inner, calls = type(model).forward, []
    own = types.MethodType(lambda self, **kwargs: calls.append(1) or inner(self, **kwargs), model)
    model.forward = own
    batch = zoo.inputs("qwen3_moe", model)
    wanted = model(**batch).logits
    moepatch.restore(moepatch.optimize(model, verify=False, measure=False))
    assert model.forward is own and torch.equal(model(**batch).logits, wanted) and len(calls) == 2
    moepatch.optimize(model, verify=False, measure=False)
    model.forward = types.MethodType(lambda self, **kwargs: own(**kwargs), model)
    with pytest.raises(moepatch.MoePatchError, match="since the patch"):
        moepatch.restore(model)
