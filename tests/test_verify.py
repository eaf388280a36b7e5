"""A failed verification costs a site, not the model; and what is verified is the backend, whatever the weights hold and the caller has switched on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import zoo
from facts import facts
from listed import Block, Listed
from ranks import on_ranks
from torch.nn import functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook, register_module_full_backward_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import moepatch
from moepatch import api, planning, registry, trial
from moepatch.layers.attention.sight import choices
from moepatch.match import experts as match_experts

#: A family for each table of backends that serves on the CPU.
TABLES = {
    "experts": "qwen3_moe",
    "norm": "qwen3_moe",
    "mlp": "deepseek_v3",
    "attention_block": "qwen3_moe",
    "latent": "deepseek_v3",
    "router": "deepseek_v3",
    "loss": "qwen3_moe",
    "residual": "qwen3_moe",
    "delta": "qwen3_next",
}


def wrong(compute, by=1.001):
    """A backend that computes something else: whatever it returns is a little too large."""

    def off(*args, **kwargs):
        return tree_map(lambda t: t * by if isinstance(t, torch.Tensor) and t.is_floating_point() else t, compute(*args, **kwargs))

    return compute._replace(**{name: wrong(part, by) for name, part in compute._asdict().items()}) if hasattr(compute, "_asdict") else off


def raising(compute):
    """A backend that fails on everything."""

    def fails(*args, **kwargs):
        raise ZeroDivisionError("this library knows no such size\nand more")

    return compute._replace(**{name: fails for name in compute._asdict()}) if hasattr(compute, "_asdict") else fails


def in_bf16(how):
    """The same in bf16 only, so that matchers, which try in fp32, do not see it."""

    def made(compute):
        bad = how(compute)
        return lambda *args: (bad if any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args) else compute)(*args)

    return made


def spoil(monkeypatch, table, how):
    """Makes every backend of a table that the CPU has a bad one, in bf16."""
    for row in registry.backends(table):
        if row.why_not(None, torch.bfloat16, torch.device("cpu")) is None:
            monkeypatch.setitem(registry._LOADED, (table, row.name), in_bf16(how)(registry.compute(table, row.name)))


@contextlib.contextmanager
def broken(table, how, rank=1000, name="broken"):
    """A backend of a table that is preferred to all others and is not right."""
    tables = {table: rank} | ({"norm": -1} if table == "residual" else {})  # sums are tried together with norms
    for each, at in tables.items():
        registry.register_backend(each, name, rank=at)(lambda each=each: how(registry.compute(each, "reference")))
    try:
        yield
    finally:
        for each in tables:
            registry.unregister(name, each)


def of(plan, table):
    return [p for p in plan.patterns if planning.KINDS[p.site.kind].backends == table]


@pytest.mark.parametrize("how, words", [(wrong, "(limit 1.0e-05)"), (raising, "it raised ZeroDivisionError: this library knows no such size")])
@pytest.mark.parametrize("table", TABLES)
def test_the_next_backend_is_taken(table, how, words):
    family = TABLES[table]
    if zoo.available(family):
        pytest.skip(zoo.available(family))
    plain = zoo.build(family)
    usual = of(moepatch.plan(plain), table)
    with broken(table, how):
        assert {p.backend for p in of(moepatch.plan(plain), table)} == {"broken"}
        model = moepatch.optimize(copy.deepcopy(plain))
        report = moepatch.report(model)
        found = of(report.plan, table)
        assert [p.backend for p in found] == [p.backend for p in usual] and report.patched == sum(len(p.sites) for p in report.plan.patterns)
        for pattern in found:
            note = next(n for n in report.notes if n.startswith(pattern.site.fqn) and f"{pattern.backend!r} was taken instead" in n)
            assert "the backend 'broken' does not compute what the module does" in note and words in note and words in pattern.why
            assert dict((c.backend, c.why_not) for c in pattern.choices)["broken"].startswith("failed its verification")
        assert all(v.ok and v.backend != "broken" for v in report.verified) and "broken" in str(report)
        batch = zoo.inputs(family, plain)
        torch.testing.assert_close(zoo.loss(model(**batch)), zoo.loss(plain(**batch)), rtol=1e-5, atol=1e-5)
        moepatch.restore(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_where_no_backend_fits_the_pattern_keeps_the_familys_code(monkeypatch):
    """All other patterns stay patched, the experts of a list included, whose weights move afterwards."""
    plain = zoo.build("deepseek_v3", torch.bfloat16)
    spoil(monkeypatch, "mlp", lambda compute: wrong(compute, 1.2))
    before = {n: type(m) for n, m in plain.named_modules()}
    model = moepatch.optimize(plain)
    report = moepatch.report(model)
    mlps = of(report.plan, "mlp")
    assert mlps and all(p.backend is None and "failed its verification" in p.why for p in mlps)
    assert all(type(model.get_submodule(fqn)) is before[fqn] for p in mlps for fqn in p.fqns)
    assert all(p.backend for p in report.plan.patterns if p not in mlps) and report.patched
    notes = [n for n in report.notes if "'torch' does not compute" in n or "'reference' does not compute" in n]
    assert len(notes) == 2 * len(mlps) and any("keep the family's own code" in n or "keeps the family's own code" in n for n in notes)
    assert "mlp" not in {planning.KINDS[p.site.kind].backends for p in report.plan.patterns if p.backend}


def test_the_attention_function(monkeypatch):
    """It is patched through what is seen of the configuration, and tried as something that stands in its place."""
    monkeypatch.setitem(registry._LOADED, ("attention", "torch"), wrong(registry.compute("attention", "torch")))
    model = moepatch.optimize(zoo.build("qwen3_moe"))
    (choice,) = set(choices(model))
    assert choice.backend == "reference" and model.config._attn_implementation == zoo.build("qwen3_moe").config._attn_implementation
    (pattern,) = of(moepatch.report(model).plan, "attention")
    assert pattern.backend == "reference" and "torch: failed its verification" in pattern.why
    assert any("'torch' does not compute" in note and "'reference' was taken instead" in note for note in moepatch.report(model).notes)
    moepatch.restore(model)
    assert not set(choices(model))


def test_a_model_of_which_nothing_is_left_is_as_it_was(monkeypatch):
    model = zoo.build("qwen3_moe", torch.bfloat16)
    before = facts(model)
    spoil(monkeypatch, "experts", raising)
    with pytest.raises(moepatch.NothingMatched, match=r"no backend computes what its modules do:\n.*it raised ZeroDivisionError.*\n.*keep the family's own code"):
        moepatch.optimize(model, dense=False)
    assert facts(model) == before


@pytest.mark.parametrize("how, words", [(wrong, r"relative errors: .*output 1\.0e-03"), (raising, "it raised ZeroDivisionError")])
def test_a_backend_that_the_caller_named_raises(qwen3, how, words):
    before = facts(qwen3)
    with broken("experts", how, rank=-1):
        asked = moepatch.plan(qwen3, experts="broken")
        text = moepatch.plan(qwen3).to_json().replace('"planned": "torch"', '"planned": "broken"', 1)
        edited = moepatch.plan(qwen3).edited(text)
        for arguments in ({"experts": "broken"}, {"plan": asked}, {"plan": edited}):
            with pytest.raises(moepatch.NumericMismatch, match=f"'broken' does not compute what the module does: {words}") as caught:
                moepatch.optimize(qwen3, **arguments)
            assert facts(qwen3) == before
            advice = str(caught.value).partition("rolled back.")[2]
            assert "experts=None" in advice and "moepatch takes another backend" in advice and "broken" not in advice
        moepatch.optimize(qwen3)  # by itself it does without


def test_the_reference_by_name(qwen3, monkeypatch):
    monkeypatch.setitem(registry._LOADED, ("experts", "reference"), wrong(registry.compute("experts", "reference")))
    for name in ("misfit", "misfit_of_all"):
        monkeypatch.setattr(match_experts, name, lambda *args: None)
    with pytest.raises(moepatch.NumericMismatch, match="'reference' does not compute") as caught:
        moepatch.optimize(qwen3, experts="reference")
    assert "experts=None" in str(caught.value) and "reference" not in str(caught.value).partition("rolled back.")[2]


def test_a_family_that_cannot_be_tried(qwen3, monkeypatch):
    """Nothing is known of any backend then: the module is left alone, and the words do not blame a backend."""
    run = trial.run

    def fails(module, *args, **kwargs):
        if type(module).__name__ == "Qwen3MoeExperts":
            raise RuntimeError("only on Tuesdays")
        return run(module, *args, **kwargs)

    monkeypatch.setattr(trial, "run", fails)
    monkeypatch.setattr(match_experts, "misfit", lambda *args: None)
    report = moepatch.report(moepatch.optimize(qwen3))
    (pattern,) = of(report.plan, "experts")
    assert pattern.backend is None and "its own code cannot be run on a trial (RuntimeError: only on Tuesdays)" in pattern.why
    assert any("cannot be verified" in note for note in report.notes)
    with pytest.raises(moepatch.NumericMismatch, match=r"cannot be verified: its own code.*experts=None.*verify=False"):
        moepatch.optimize(zoo.build("qwen3_moe"), experts="torch")


def test_a_keyboard_interrupt_in_the_second_try(qwen3, monkeypatch):
    before = facts(qwen3)

    def interrupted(compute):
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        return stop

    monkeypatch.setitem(registry._LOADED, ("experts", "torch"), interrupted(None))
    with broken("experts", wrong), pytest.raises(KeyboardInterrupt):
        moepatch.optimize(qwen3)
    assert facts(qwen3) == before


def test_fastest_first(qwen3):
    """Where backends were timed, the next fastest is next, whatever its rank."""
    with broken("experts", wrong):
        (pattern,) = of(moepatch.plan(qwen3), "experts")
        assert planning.serving(pattern) == ["torch", "reference"] and planning.serving(pattern, ["broken", "reference"]) == ["reference", "torch"]
        later = planning.next_best(pattern, "a reason", ["torch"])
        assert later.backend == "torch" and later.why.startswith("fallback; broken: a reason")
        last = planning.next_best(later, "another", planning.serving(later, ["reference"]))
        assert last.backend == "reference" and "broken: a reason; " in last.why and last.why.endswith("torch: another")
        none = planning.next_best(last, "the last", planning.serving(last))
        assert none.backend is None and "no backend can serve it: broken: a reason" in none.why and "reference: the last" in none.why


def test_an_interrupt_at_the_very_end(qwen3, monkeypatch):
    """While the record is made, which is the last thing before there is a way back."""
    before = facts(qwen3)
    monkeypatch.setattr(api, "Report", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        moepatch.optimize(qwen3)
    assert facts(qwen3) == before


# --- several ranks -------------------------------------------------------------------------------------------------------------------


def wrong_on_one_rank(rank, named):
    how = wrong if dist.get_rank() == rank else (lambda compute: compute)
    model = zoo.build("qwen3_moe")
    with broken("experts", how):
        if named:
            with pytest.raises(moepatch.NumericMismatch, match=rf"'broken' does not compute.*on rank {rank}"):
                moepatch.optimize(model, moepatch.make_mesh(ep=2, device="cpu"), experts="broken")
            return facts(model) == facts(zoo.build("qwen3_moe")) or [type(m) for m in model.modules()] == [type(m) for m in zoo.build("qwen3_moe").modules()]
        moepatch.optimize(model, moepatch.make_mesh(ep=2, device="cpu"))
        report = moepatch.report(model)
        zoo.loss(model(**zoo.inputs("qwen3_moe", model))).backward()
        return [(p.backend, p.why) for p in report.plan.patterns], [n for n in report.notes if "broken" in n]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_take_the_same_backend(rank):
    first, second = on_ranks(2, wrong_on_one_rank, rank, False)
    assert first == second and first[0][0][0] == "torch" and f"(on rank {rank})" in first[1][0]


def test_all_ranks_raise_for_a_name():
    assert all(on_ranks(2, wrong_on_one_rank, 1, True))


def a_family_that_fails_on_one_rank():
    """The experts of both ranks keep the family's code, and are sharded as dense weights are."""
    run = trial.run

    def fails(module, *args, **kwargs):
        if dist.get_rank() == 1 and type(module).__name__ == "Qwen3MoeExperts":
            raise RuntimeError("only here")
        return run(module, *args, **kwargs)

    match_experts.misfit = lambda *args: None
    trial.run = fails
    model = moepatch.optimize(zoo.build("qwen3_moe"), moepatch.make_mesh(ep=2, device="cpu"))
    zoo.loss(model(**zoo.inputs("qwen3_moe", model))).backward()
    return [p.backend for p in of(moepatch.report(model).plan, "experts")]


def test_what_cannot_be_tried_on_one_rank_is_left_alone_on_all():
    assert on_ranks(2, a_family_that_fails_on_one_rank) == [[None], [None]]


# --- whose error it is ---------------------------------------------------------------------------------------------------------------


def initialised(family, seed):
    """As transformers initialises it: there these families' gradients of a few parameters are sums that cancel."""
    torch.manual_seed(seed)
    return zoo._model_class(zoo.entry(family))._from_config(zoo.config(family), dtype=torch.float32).train()


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_float64_says_whose_error_it_is(family):
    if zoo.available(family):
        pytest.skip(zoo.available(family))
    arbitrated = 0
    for seed in range(8):
        report = moepatch.report(moepatch.optimize(initialised(family, seed)))
        assert all(p.backend for p in of(report.plan, "delta")) and of(report.plan, "delta")
        arbitrated += any("compared with float64" in v.note and "dt_bias" in v.note for v in report.verified)
    assert arbitrated >= 3


def test_an_error_of_ours_is_found_all_the_same():
    if zoo.available("qwen3_next"):
        pytest.skip(zoo.available("qwen3_next"))
    for seed in (0, 3, 5):
        with broken("delta", lambda compute: wrong(compute, 1 + 1e-4), rank=-1):
            with pytest.raises(moepatch.NumericMismatch, match=r"output (1\.0e-04|9\.\de-05) \(limit 1\.0e-05\)"):
                moepatch.optimize(initialised("qwen3_next", seed), delta="broken")


def test_arbitration():
    truth = torch.linspace(1, 2, 7, dtype=torch.float64)
    theirs, ours, bad = {"a": (truth * (1 + 1e-3)).float()}, {"a": (truth * (1 + 1e-6)).float()}, {"a": (truth * (1 - 1e-2)).float()}
    exact = {"a": truth}
    assert trial.arbitrated(theirs, theirs, lambda: 1 / 0)[1] == ""  # not asked
    (row,), note = trial.arbitrated(theirs, ours, lambda: exact)
    assert row.ok and row.theirs > 9e-4 and "by: a 1.0e-03 and" in note
    (row,), note = trial.arbitrated(theirs, bad, lambda: exact)
    assert not row.ok and row.limit < 2e-3
    (row,), note = trial.arbitrated(theirs, ours, lambda: 1 / 0)
    assert not row.ok and "cannot run in float64" in note and "ZeroDivisionError" in note


def test_what_code_asks_in_fp32_is_in_float64_there():
    class Casts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

        def forward(self, x):
            h = torch.nn.functional.linear(x.float(), self.w.to(torch.float32))
            return torch.softmax(h, -1, dtype=torch.float32) + h.to(dtype=torch.float32).sum(-1, keepdim=True, dtype=torch.float32)

    module, call = Casts(), trial.Call((torch.randn(4, 8),))
    out = trial.run_in_double(module, call)["output"]
    h = call.args[0].double() @ module.w.T
    torch.testing.assert_close(out, (h.softmax(-1) + h.sum(-1, keepdim=True)).detach().flatten(0, -2), rtol=1e-13, atol=1e-13)
    assert torch.ones(1).float().dtype == torch.float32


# --- weights -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_hold_no_numbers(dtype, number):
    model = zoo.build("qwen3_moe", dtype)
    experts, norm = model.model.layers[0].mlp.experts, model.model.layers[0].input_layernorm
    with torch.no_grad():
        experts.gate_up_proj[1, :3, 0] = number
        norm.weight.fill_(number)
    usual = [p.backend for p in moepatch.plan(model).patterns]
    report = moepatch.report(moepatch.optimize(model))
    assert [p.backend for p in report.plan.patterns] == usual and all(v.ok for v in report.verified)
    (note,) = [n for n in report.notes if n.startswith("model.layers.0.mlp.experts:")]
    assert "its weights hold NaN or inf: 3 in gate_up_proj; tried with random numbers in their place" in note
    assert any(n.startswith("model.layers.0.input_layernorm:") and "64 in weight" in n for n in report.notes)


def test_a_wrong_backend_is_found_whatever_the_weights_hold(qwen3):
    with torch.no_grad():
        for parameter in qwen3.model.layers[0].mlp.experts.parameters():
            parameter.fill_(float("nan"))
    with broken("experts", wrong, rank=-1), pytest.raises(moepatch.NumericMismatch, match=r"1\.0e-03.*hold NaN or inf"):
        moepatch.optimize(qwen3, experts="broken")


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e25), (torch.bfloat16, 1e25), (torch.float16, 3e4), (torch.float32, 1e9)])
def test_weights_that_overflow(dtype, size):
    model = zoo.build("qwen3_moe", dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "q_proj" in name:
                parameter.mul_(size / parameter.abs().max())
    usual = [p.backend for p in moepatch.plan(model).patterns]
    report = moepatch.report(moepatch.optimize(copy.deepcopy(model)))
    assert [p.backend for p in report.plan.patterns] == usual and all(v.ok for v in report.verified)
    with broken("experts", wrong, rank=-1):
        if dtype is torch.float32:
            with pytest.raises(moepatch.NumericMismatch, match="experts"):
                moepatch.optimize(model, experts="broken")


class Own(Block):
    """Its router in whatever it has."""

    def logits(self, x):
        return self.gate(x)


class Cast(Own):
    """A router that is kept in fp32."""

    def logits(self, x):
        return self.gate(x.float())


class Wide(Own):
    """A router that is computed in fp32, whatever it is kept in."""

    def logits(self, x):
        return F.linear(x.float(), self.gate.weight.float())


class Product(Own):
    """The same, in a form that nobody looks for."""

    def logits(self, x):
        return x.float() @ self.gate.weight.float().T


def list_of(block, kept):
    torch.manual_seed(0)
    model = Listed().to(torch.bfloat16)
    for layer in model.layers:
        layer.mlp.__class__ = block
        layer.mlp.gate.to(kept)
    return model


def listed_forward(self, hidden_states):
    batch, seq, hidden = hidden_states.shape
    x = hidden_states.view(-1, hidden)
    logits = self.logits(x)
    weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
    final = torch.zeros_like(x)
    for index in range(self.num_experts):
        token, slot = torch.where(chosen == index)
        final.index_add_(0, token, (self.experts[index](x[token]) * weights[token, slot, None]).to(x.dtype))
    return final.view(batch, seq, hidden), logits


Own.forward = listed_forward


@pytest.mark.parametrize("block, kept, linear", [
    (Own, torch.bfloat16, "own"), (Cast, torch.float32, "weight"), (Wide, torch.float32, "weight"), (Wide, torch.bfloat16, "float"),
])  # fmt: skip
def test_a_router_in_another_precision_than_the_experts(block, kept, linear):
    plain = list_of(block, kept)
    model = moepatch.optimize(copy.deepcopy(plain))
    (pattern,) = moepatch.report(model).plan.mixture
    assert pattern.backend and pattern.site.spec.linear == linear and len(pattern.sites) == 2
    ids = torch.arange(12).view(2, 6)
    compared = (plain.layers[0].mlp, model.layers[0].mlp)
    x = plain.layers[0].norm(plain.embed(ids))
    theirs, ours = (block(x) for block in compared)
    assert torch.equal(theirs[1], ours[1])  # the logits
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2, atol=2e-2)
    moepatch.optimize(copy.deepcopy(plain), experts="torch")


class Normed(torch.nn.Module):
    """With something that is patched whatever becomes of the experts."""

    def __init__(self, block, kept):
        super().__init__()
        self.model = zoo.build("deepseek_v3", torch.bfloat16).model.layers[0].mlp
        self.listed = list_of(block, kept)


def test_a_router_that_cannot_be_served_costs_its_sites():
    model = Normed(Product, torch.bfloat16)
    report = moepatch.report(moepatch.optimize(model))
    (pattern,) = report.plan.mixture
    assert pattern.backend is None and "failed its verification" in pattern.why and report.patched
    assert any("they keep the family's own code" in note for note in report.notes)
    with pytest.raises(moepatch.NumericMismatch, match="experts=None"):
        moepatch.optimize(Normed(Product, torch.bfloat16), experts="torch")


def test_a_router_that_the_familys_own_code_cannot_run():
    report = moepatch.report(moepatch.optimize(Normed(Own, torch.float32)))
    assert report.patched and not report.plan.mixture and report.plan.refusals
    assert all("does not run with a router in float32 and experts in bfloat16" in r.reason for r in report.plan.refusals)


# --- losses that are asked for by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["liger", "cce"])
@pytest.mark.parametrize("numerics", ["exact", "relaxed"])
def test_a_loss_that_waits_for_the_device_can_be_asked_for(name, numerics, monkeypatch):
    """It rounds where the others do, and is never chosen by itself."""
    row = registry.backend("loss", name)
    monkeypatch.setitem(registry._BACKENDS, ("loss", name), dataclasses.replace(row, why_not=lambda spec, dtype, device: None))
    calls, compute = [], registry.compute("loss", "reference")
    monkeypatch.setitem(registry._LOADED, ("loss", name), lambda *args: calls.append(name) or compute(*args))
    model = moepatch.optimize(zoo.build("qwen3_moe"), numerics=numerics)
    assert [p.backend for p in of(moepatch.report(model).plan, "loss")] == ["chunked"] and not calls
    model = moepatch.optimize(zoo.build("qwen3_moe"), loss=name, numerics=numerics)
    assert [p.backend for p in of(moepatch.report(model).plan, "loss")] == [name] and calls
    calls.clear()
    model(**zoo.inputs("qwen3_moe", model)).loss.backward()
    assert calls


# --- what the caller has switched on ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Watches(TorchDispatchMode):
    """What a caller counts is the caller's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was seen")


class WatchesFunctions(TorchFunctionMode):
    """The same one level higher: whatever makes a tensor is seen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.randn, torch.rand, torch.empty, torch.zeros, torch.ones, torch.cat), f"{func} was seen"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def hooks_on_all_modules():
    """Counters of FLOPs and printers of names have them. Activations that a family makes within a call are seen, and no harm is done."""

    def seen(module, *args):
        assert not list(module.parameters()), f"{type(module).__name__} was seen"

    with register_module_forward_pre_hook(seen), register_module_forward_hook(seen), register_module_full_backward_hook(seen):
        yield


@contextlib.contextmanager
def many():
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), FakeTensorMode(), torch.inference_mode(), default_dtype(torch.bfloat16):
        yield


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of CUDA": lambda: torch.autocast("cuda", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "fake": FakeTensorMode,
    "anomaly": torch.autograd.detect_anomaly,
    "deterministic": deterministic,
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
    "a mode that sees operators": lambda: Watches(),
    "a mode that sees functions": lambda: WatchesFunctions(),
    "FLOPs": lambda: FlopCounterMode(display=False),
    "hooks on all modules": hooks_on_all_modules,
    "many at once": many,
}


def _switched_on() -> tuple:
    modes = [*map(id, _get_current_function_mode_stack()), *map(id, _get_current_dispatch_mode_stack())]
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), modes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts(context, family):
    if zoo.available(family):
        pytest.skip(zoo.available(family))
    model = zoo.build(family)
    usual = [(p.name, p.backend, p.fqns) for p in moepatch.plan(model).patterns]
    state = _switched_on()
    with CONTEXTS[context]():
        inside = _switched_on()
        planned = moepatch.plan(model)
        seen = moepatch.inspect(model)
        assert moepatch.optimize(model) is model
        moepatch.restore(model)
        moepatch.optimize(model)
        assert inside == _switched_on()
    report = moepatch.report(model)
    for plan in (planned, seen.plan, report.plan):
        assert [(p.name, p.backend, p.fqns) for p in plan.patterns] == usual
    assert all(v.ok and v.differences for v in report.verified if "not run" not in v.note)
    assert not any("float64" in v.note for v in report.verified)
    assert state == _switched_on()
    zoo.loss(model(**zoo.inputs(family, model))).backward()
    assert all(p.device.type == "cpu" and not p.is_inference() for p in model.parameters())


def test_inspect_of_a_configuration_in_contexts():
    config = zoo.config("qwen3_moe")
    usual = str(moepatch.inspect(config))
    for context in CONTEXTS.values():
        with context():
            assert str(moepatch.inspect(config)) == usual


def test_inside_a_backward_hook(qwen3):
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: moepatch.optimize(qwen3) and None)
    (x * 2).sum().backward()
    assert all(v.ok for v in moepatch.report(qwen3).verified)


def test_in_threads_with_other_defaults():
    """The default dtype is one for all threads."""
    models, errors = [zoo.build("qwen3_moe", seed=seed) for seed in range(4)], []

    def work(model):
        try:
            with torch.inference_mode():
                moepatch.optimize(model)
        except BaseException as error:
            errors.append(error)

    with default_dtype(torch.float64):
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    assert not errors and all(v.ok for m in models for v in moepatch.report(m).verified)


def test_other_threads_keep_the_default_dtype(qwen3, monkeypatch):
    """Whoever builds a model in another thread meanwhile gets the dtype that was asked for."""
    seen, run = set(), trial.run

    def watched(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            seen.add(pool.submit(lambda: torch.nn.Linear(2, 2).weight.dtype).result())
        return run(*args, **kwargs)

    monkeypatch.setattr(trial, "run", watched)
    with default_dtype(torch.bfloat16):
        moepatch.optimize(qwen3)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_no_random_number_of_the_callers_is_drawn(family):
    model = zoo.build(family)
    drawn, filters = (torch.get_rng_state(), random.getstate()), list(warnings.filters)
    moepatch.restore(moepatch.optimize(model))
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1] and warnings.filters == filters


def test_what_cannot_be_left_is_refused_in_words(qwen3):
    before = facts(qwen3)

    def loss(x):
        moepatch.optimize(qwen3)
        return x.sum()

    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        with pytest.raises(moepatch.MoePatchError, match=r"inside a torch\.func transform.*Nothing was changed"):
            transform(loss)(torch.ones(2, 2))
    with pytest.raises(moepatch.MoePatchError, match="inside torch.jit.trace"):
        torch.jit.trace(loss, torch.ones(2, 2))
    assert facts(qwen3) == before


def test_torch_compile_calls_it_between_graphs(qwen3):
    graphs = []

    def patched(x):
        y = x * 2
        moepatch.optimize(qwen3)
        return y + moepatch.report(qwen3).patched

    compiled = torch.compile(patched, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert compiled(torch.ones(2)).tolist() == [2 + moepatch.report(qwen3).patched] * 2
    assert len(graphs) <= 2 and all(v.ok for v in moepatch.report(qwen3).verified)


def test_weights_without_numbers():
    with FakeTensorMode():
        model = zoo._model_class(zoo.entry("qwen3_moe"))._from_config(zoo.config("qwen3_moe"))
    for call in (moepatch.optimize, moepatch.plan):
        with pytest.raises(moepatch.CheckFailed, match=r"fake tensors.*torch\.device\('meta'\)"):
            call(model)


def test_weights_that_were_loaded_in_inference_mode():
    with torch.inference_mode():
        model = zoo.build("qwen3_moe")
    for call in (moepatch.optimize, moepatch.plan):
        with pytest.raises(moepatch.CheckFailed, match=r"made inside torch\.inference_mode.*Load the model outside"):
            call(model)
    assert any("inference_mode" in warning for warning in moepatch.inspect(model).warnings)
