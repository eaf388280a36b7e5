"""Dense MLPs and shared experts: what is recognised, the same numbers in every form, and the activation's kernels in Triton's interpreter."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re

import compare
import pytest
import torch
import zoo
from interpreter import needs_triton, passes_in_the_interpreter
from torch import nn
from torch.nn import functional as F

from moepatch import trial
from moepatch.errors import MoePatchError
from moepatch.experts.activation import FORMULAS, Activation
from moepatch.kernels import gated, gated_formulas
from moepatch.layers.mlp import MLP, MlpState, PatchedMlp
from moepatch.layout.adjacent import adjacent
from moepatch.match.mlp import match_mlp
from moepatch.scan import Scan
from moepatch.site import Site
from moepatch.surgery import InjectClass, Journal

NUMBERS = {"limit": 1.2, "alpha": 1.702}
#: Families with the activation, and how many of their MLPs are taken.
FAMILIES = {
    "qwen2_moe": ("swiglu", "gate and up apart", 2),
    "deepseek_v3": ("swiglu", "gate and up apart", 3),
    "glm4_moe": ("swiglu", "gate and up apart", 3),
    "ernie4_5_moe": ("swiglu", "gate and up apart", 3),
    "lfm2_moe": ("swiglu", "gate and up apart", 1),
    "llama4_text": ("swiglu", "gate and up apart", 3),
    "granitemoeshared": ("swiglu", "gate and up in one", 2),
    "minimax_m3_vl_text": ("swiglu_oai(alpha=1.702, limit=7)", "gate and up in one", 3),
    "deepseek_v4": ("clamped_swiglu(limit=10)", "gate and up apart", 3),
    "nemotron_h": ("relu2", "no gate", 2),
}


def activations():
    """Every formula, with numbers that random input reaches."""
    return [Activation(name, tuple(NUMBERS[n] for n in formula.numbers)) for name, formula in FORMULAS.items()]


class Mlp(nn.Module):
    """An MLP as remote code writes it, in any form."""

    def __init__(self, form="separate", activation=None, bias=False, up_first=False, hidden=20, width=28):
        super().__init__()
        self.form, self.up_first = form, up_first
        self.activation = activation or Activation("relu2" if form == "none" else "swiglu")
        for number, value in enumerate(self.activation.numbers):
            setattr(self, f"number_{number}", value)
        if form == "separate":
            self.a, self.b = nn.Linear(hidden, width, bias=bias), nn.Linear(hidden, width, bias=bias)
        else:
            self.a = nn.Linear(hidden, width if form == "none" else 2 * width, bias=bias)
        self.out = nn.Linear(width, hidden, bias=bias)

    def forward(self, x):
        if self.form == "separate":
            parts = (self.a(x), self.b(x))
        elif self.form == "none":
            parts = (self.a(x), None)
        else:
            pre = self.a(x)
            parts = (pre[..., ::2], pre[..., 1::2]) if self.form == "interleaved" else pre.chunk(2, -1)
        gate, up = parts[::-1] if self.up_first else parts
        return self.out(self.activation.forward(gate, up))


FORMS = [("separate", False), ("concatenated", False), ("concatenated", True), ("interleaved", False), ("interleaved", True), ("none", False)]


def found(model):
    scan, memo = Scan(model), {}
    return {f.fqn: site for f in scan if isinstance(site := match_mlp(f, scan, memo), Site)}


def patch(model, backend="torch"):
    """Every MLP of a model on a backend, weights moved; the journal undoes it."""
    journal = Journal()
    for fqn, site in found(model).items():
        module = model.get_submodule(fqn)
        for mixin, state in MLP.injections(site.spec, backend, None).values():
            journal.do(InjectClass(module, mixin, state))
        for step in MLP.relayout(module, site.spec):
            journal.do(step)
    return journal


def results(module, x, **kwargs):
    """Output and all gradients of one call."""
    leaves = {"x": x.detach().clone().requires_grad_(), **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    y = module(leaves["x"], **kwargs)
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[-1])).sum(), list(leaves.values()), allow_unused=True)
    return {"y": y.detach(), **{name: g for name, g in zip(leaves, grads, strict=True) if g is not None}}


def same(ours, theirs, limit=1e-5):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert compare.error(ours[key], value) <= limit, key


# --- matching ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "up_first"), FORMS)
def test_any_form_is_found_by_what_it_computes(form, up_first):
    module = Mlp(form, bias=form == "interleaved", up_first=up_first)
    (site,) = found(module).values()
    assert (site.spec.gate_form, site.spec.activation, site.spec.hidden, site.spec.intermediate) == (form, module.activation, 20, 28)
    # Two layers are taken in the order that makes the first one the gate.
    assert site.spec.up_first == up_first and site.spec.inputs == (("a", "b") if form == "separate" else ("a",))


@pytest.mark.parametrize("activation", activations(), ids=str)
def test_any_activation_is_recognised(activation):
    (site,) = found(Mlp("separate" if FORMULAS[activation.name].gated else "none", activation)).values()
    assert site.spec.activation == activation


class Limited(Mlp):
    """Its activation differs from what it looks like for large numbers only."""

    limit = 50

    def forward(self, x):
        return self.out(F.silu(self.a(x)).clamp(max=self.limit) * self.b(x))


def test_a_limit_that_no_float_tells_is_seen():
    assert not any(site.spec.activation.name == "swiglu" for site in found(Limited()).values())


@pytest.mark.parametrize("sizes", [(28, 28), (56, 28), (14, 28)])
def test_widths_that_coincide(sizes):
    hidden, width = sizes
    (site,) = found(Mlp("separate", hidden=hidden, width=width)).values()
    assert (site.spec.hidden, site.spec.intermediate) == sizes


class Scaled(Mlp):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(20)

    def forward(self, x):
        return super().forward(self.norm(x))


class Dropping(Mlp):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


class Twice(Mlp):
    def forward(self, x, y=None):
        return super().forward(x)


class Quick(Mlp):
    def forward(self, x):
        gate = self.a(x)
        return self.out(gate * torch.sigmoid(1.3 * gate) * self.b(x))


@pytest.mark.parametrize("other", [Scaled, Normed, Dropping, Twice, Quick])
def test_modules_with_more_to_them_are_left_alone(other):
    assert not found(other().eval())


def test_experts_of_a_list_are_not_mlps():
    layer = nn.Module()
    layer.experts = nn.ModuleList(Mlp() for _ in range(4))
    layer.mlps = nn.ModuleList(Mlp() for _ in range(2))
    assert list(found(layer)) == ["mlps.0", "mlps.1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Found on the meta device, the same outputs and gradients, and bit-equal weights when it is undone."""
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    activation, layout, count = FAMILIES[name]
    model = zoo.build(name)
    sites = found(copy.deepcopy(model).to("meta"))
    assert sites == {fqn: site for fqn, site in sites.items() if (str(site.spec.activation), site.spec.to_dict()["layout"]) == (activation, layout)}
    assert len(sites) == count
    outputs, grads = compare.step(name, model)
    before = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    for backend in ("reference", "torch"):
        journal = patch(model, backend)
        assert sum(isinstance(m, PatchedMlp) for m in model.modules()) == count
        found_outputs, found_grads = compare.step(name, model)
        assert all(compare.error(found_outputs[key], value) < 1e-5 for key, value in outputs.items())
        assert compare.together(found_grads, grads) < 1e-5
        journal.undo()
    assert not any(isinstance(m, PatchedMlp) for m in model.modules())
    assert all(now is before[key][0] and torch.equal(now, before[key][1]) for key, now in model.state_dict(keep_vars=True).items())


# --- computing -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("form", "up_first"), FORMS)
def test_outputs_and_gradients(form, up_first, bias, backend):
    module = Mlp(form, bias=bias, up_first=up_first)
    x = torch.randn(2, 5, 20)
    theirs = results(module, x)
    patch(module, backend)
    same(results(module, x), theirs)
    if form == "separate":
        assert adjacent(module.a.weight, module.b.weight) is not None
        module.b.weight.data = module.b.weight.data.clone()  # as FSDP2 or `load_state_dict(assign=True)` do
        same(results(module, x), theirs)


def test_no_tokens_and_strided_tokens():
    module = Mlp()
    none, strided = torch.randn(0, 20), torch.randn(20, 6).t()
    theirs = [results(module, x) for x in (none, strided)]
    patch(module)
    for x, wanted in zip((none, strided), theirs, strict=True):
        same(results(module, x), wanted)


@pytest.mark.parametrize("frozen", [("a",), ("out",), ("a", "b"), ("a", "b", "out")])
def test_frozen_layers_get_no_gradient_and_keep_no_input(frozen):
    module = Mlp(bias=True)
    for name in frozen:
        module.get_submodule(name).requires_grad_(False)
    x = torch.randn(7, 20)
    theirs = results(module, x)
    patch(module)
    same(results(module, x), theirs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda t: t):
        module(x.clone().requires_grad_())
    assert ((7, 20) in kept) == ("a" not in frozen or "b" not in frozen)


def test_what_is_kept_for_backward_is_x_and_the_preactivation():
    module = Mlp()
    patch(module)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda t: t):
        module(torch.randn(7, 20))
    assert sorted(kept) == sorted([(7, 20), (7, 56), (28, 20), (28, 20), (20, 28)])


def test_no_grad_keyword_call_deepcopy_and_pickle():
    module = Mlp()
    x = torch.randn(3, 20)
    with torch.no_grad():
        wanted = module(x)
        patch(module)
        for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert isinstance(twin, PatchedMlp) and compare.error(twin(x=x), wanted) < 1e-6
    assert "moepatch: H=20 I=28 swiglu, backend=torch" in repr(module)


def test_autocast_computes_in_its_dtype():
    module = Mlp(bias=True)
    x = torch.randn(9, 20)
    truth = results(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = results(module, x)
    patch(module)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(module, x)
    assert ours["y"].dtype == theirs["y"].dtype == torch.bfloat16
    assert all(ours[key].dtype == value.dtype for key, value in theirs.items())
    for key, value in truth.items():
        assert compare.error(ours[key], value) <= 1.5 * compare.error(theirs[key], value), key


def test_double_backward_says_no():
    module = Mlp()
    patch(module)
    x = torch.randn(3, 20, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(MoePatchError, match="Second derivatives do not go through"):
        grad.sum().backward()


def test_lora_and_hooks_that_come_later_are_honoured():
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 20)
    config = peft.LoraConfig(target_modules=["a"], init_lora_weights=False, r=2)
    plain = nn.ModuleDict({"mlp": Mlp()})
    patched = copy.deepcopy(plain)
    patch(patched)
    outs = []
    for model in (plain, patched):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model)
        outs.append(results(model["mlp"], x))
    same(outs[1], outs[0])
    module = Mlp()
    patch(module)
    calls = []
    handle = module.out.register_forward_hook(lambda *_: calls.append(1))
    module(x)
    handle.remove()
    module(x)
    assert calls == [1]


def test_trial_is_a_call_of_the_module():
    module = Mlp()
    (site,) = found(module).values()
    generator = torch.Generator().manual_seed(0)
    call = MLP.trial(site.spec, torch.float32, torch.device("cpu"), generator)
    theirs = trial.run(module, call)
    InjectClass(module, PatchedMlp, MlpState(site.spec, "torch")).do()
    assert all(d.ok for d in trial.differences(theirs, trial.run(module, call)))
    assert MLP.bench(site.spec, torch.bfloat16, torch.device("cpu"), generator, 4096).args[0].shape == (2, 2048, 20)


@pytest.mark.parametrize("state", ["training", "frozen", "no_grad"])
def test_it_is_one_graph_for_compile(state):
    module = Mlp()
    x = torch.randn(6, 20, requires_grad=True)
    patch(module)
    module.requires_grad_(state != "frozen")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(state != "no_grad"):
        wanted, got = module(x), compiled(x)
    assert compare.error(got.detach(), wanted.detach()) < 1e-6
    if state != "no_grad":
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        for ours, theirs in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True):
            assert compare.error(ours, theirs) < 1e-5


# --- kernels -------------------------------------------------------------------------------------------------------------------------


def test_every_formula_has_a_kernel_and_every_kernel_a_formula():
    named = re.findall(r'NAME == "(\w+)"', inspect.getsource(gated_formulas))
    assert sorted(named) == sorted(FORMULAS)


def arrangements():
    """Every activation in every form; both orders for one of them."""
    for activation in activations():
        forms = ("concatenated", "interleaved") if FORMULAS[activation.name].gated else ("none",)
        yield from ((activation, form, up_first) for form in forms for up_first in ((False, True) if activation.name == "swiglu" else (False,)))


@pytest.mark.parametrize(("activation", "form", "up_first"), list(arrangements()), ids=str)
def test_reference_gradients_are_autograds(activation, form, up_first):
    generator = torch.Generator().manual_seed(0)
    columns = 10 if form == "none" else 20
    pre = (torch.randn(6, columns, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    weights = torch.rand(6, generator=generator, dtype=torch.float64).requires_grad_()
    grad = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    h = gated.gated_forward_reference(pre, activation, form, up_first=up_first, weights_R=weights)
    wanted = torch.autograd.grad(h, (pre, weights), grad)
    dpre, again, dweights = gated.gated_backward_reference(pre.detach(), grad, activation, form, want_h=True, up_first=up_first, weights_R=weights.detach())
    assert torch.equal(again, h.detach()) and torch.allclose(dpre, wanted[0]) and torch.allclose(dweights, wanted[1])


def check_kernels() -> None:
    """In a process of its own, with TRITON_INTERPRET set before Triton is imported."""
    generator = torch.Generator().manual_seed(0)
    cases = 0
    for (activation, form, up_first), (rows, width) in itertools.product(arrangements(), ((17, 20), (3, 150))):
        pre = torch.randn(rows, width * (1 if form == "none" else 2), generator=generator) * 2
        grad = torch.randn(rows, width, generator=generator)
        for weights in (None, torch.rand(rows, generator=generator)):
            given = {"up_first": up_first, "weights_R": weights}
            ours = gated.gated_forward(pre, activation, form, **given), *gated.gated_backward(pre, grad, activation, form, want_h=True, **given)
            truths = gated.gated_backward_reference(pre, grad, activation, form, want_h=True, **given)
            theirs = gated.gated_forward_reference(pre, activation, form, **given), *truths
            for mine, truth in zip(ours, theirs, strict=True):
                assert (mine is None) == (truth is None)
                assert mine is None or compare.error(mine, truth) < 1e-6, (activation, form, up_first, rows, weights is not None)
            cases += 1
    check_row_limit()
    print(cases, "cases equal")


def check_row_limit() -> None:
    """NaN beyond `rows` stays where it is, and rows that nobody computes have no weight gradient."""
    pre, grad, weights = torch.randn(40, 14), torch.randn(40, 7), torch.rand(40)
    for limit in (0, 16, 23):
        beyond = torch.arange(40) >= limit
        dirty, dirty_grad = (torch.where(beyond.unsqueeze(1), torch.nan, t) for t in (pre, grad))
        given = {"weights_R": weights, "rows": torch.tensor([limit])}
        h = gated.gated_forward(dirty, Activation("swiglu"), "concatenated", **given)
        dpre, again, dweights = gated.gated_backward(dirty, dirty_grad, Activation("swiglu"), "concatenated", want_h=True, **given)
        h_all = gated.gated_forward_reference(pre, Activation("swiglu"), "concatenated", weights_R=weights)
        dpre_all, _, dweights_all = gated.gated_backward_reference(pre, grad, Activation("swiglu"), "concatenated", want_h=False, weights_R=weights)
        for mine, truth in ((h, h_all), (again, h_all), (dpre, dpre_all), (dweights, dweights_all)):
            assert torch.allclose(mine[:limit], truth[:limit], rtol=1e-5, atol=1e-6)
        assert (dweights[limit:] == 0).all()


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "84 cases equal")


if __name__ == "__main__":
    check_kernels()
