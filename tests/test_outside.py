"""Kinds, matchers and backends of other packages."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import moepatch
from moepatch import api, registry
from moepatch.kinds import KINDS
from moepatch.layers.norm import NormSpec

HERE = Path(__file__).parent
OUTSIDE = HERE / "outside_package"

CODE = """
import copy, json, pathlib, tempfile, torch, zoo
from torch import nn
import moepatch

class Square(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(.5, 1.5, width))
    def forward(self, x):
        return (x * self.weight).square()

model = zoo.build("qwen3_moe")
for layer in model.model.layers:
    layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, Square(64))
given = zoo.inputs("qwen3_moe", model)
truth = model(**given).logits
plain = copy.deepcopy(model)
plan = moepatch.plan(model, measure=False)
(pattern,) = [p for p in plan.patterns if p.site.kind == "square"]
assert (pattern.name, len(pattern.sites), pattern.backend) == ("square", 2, "reference"), pattern
assert plan.edited(plan.to_json()) == plan and "square" in str(plan) and "square" in str(moepatch.inspect(model))
moepatch.optimize(model, measure=False)
(row,) = [v for v in moepatch.report(model).verified if v.pattern == "square"]
assert row.ok and {d.what for d in row.differences} == {"output", "grad input 0", "grad weight"}
assert "square" in str(moepatch.report(model)) and "square" in moepatch.report(model)._repr_html_()
square = model.model.layers[0].post_attention_layernorm[1]
assert isinstance(square, Square) and type(square).__name__ == "Square" and type(square) is not Square
for twin in (model, copy.deepcopy(model)):
    torch.testing.assert_close(twin(**given).logits, truth, rtol=1e-4, atol=1e-5)
with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
    model.save_pretrained(one), plain.save_pretrained(two)
    name = "model.safetensors"
    assert pathlib.Path(one, name).read_bytes() == pathlib.Path(two, name).read_bytes()
assert type(moepatch.restore(model).model.layers[0].post_attention_layernorm[1]) is Square
moepatch.optimize(model, square=None, measure=False)
assert type(model.model.layers[0].post_attention_layernorm[1]) is Square
moepatch.restore(model)
try:
    moepatch.optimize(model, square="quick")
except moepatch.BackendUnavailable as error:
    assert "There are: reference" in str(error)
print(json.dumps([row.name for row in moepatch.inspect(model).backends if row.table == "square"]))
"""


def run(*folders, code=CODE, options=()):
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", str(HERE.parent))])
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env={**os.environ, "PYTHONPATH": path}, timeout=900)


def test_a_package_outside_serves_its_own_kind():
    done = run(OUTSIDE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["reference"]


def test_the_documentation_shows_that_package():
    (shown,) = re.findall(r"```python\n(.*?)```", (HERE.parent / "docs" / "extending.md").read_text(), re.S)
    assert shown == (OUTSIDE / "moepatch_square.py").read_text()


def test_a_package_that_is_broken_is_warned_of_and_does_no_harm(tmp_path):
    (tmp_path / "torn.py").write_text("import moepatch\n@moepatch.register_matcher('torn')\ndef match(found, scan, memo): 1 / 0\nimport not_there\n")
    facts = tmp_path / "torn-2.5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torn\nVersion: 2.5\n")
    (facts / "entry_points.txt").write_text("[moepatch.matchers]\ntorn = torn\n")
    done = run(tmp_path, OUTSIDE)
    assert done.returncode == 0, done.stderr
    assert "goes on without the package torn 2.5" in done.stderr and "not_there" in done.stderr and "moepatch.matchers: torn = torn" in done.stderr


@pytest.fixture
def clean():
    """What a test registers is gone after it."""
    tables = [(table, dict(table)) for table in (registry.KINDS, registry._MATCHERS, registry._BACKENDS, registry._LOADED)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


class OddNorm(nn.Module):
    """A norm that no matcher takes: its epsilon is a tensor."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.epsilon = nn.Buffer(torch.tensor(1e-6), persistent=False)

    def forward(self, x):
        return self.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


def odd_model():
    model = zoo.build("qwen3_moe")
    model.model.norm = OddNorm(64)
    return model, zoo.inputs("qwen3_moe", model)


def site_of(found, **changes):
    whole = {"kind": "norm", "fqns": found.fqns, "class_name": type(found.module).__name__, "now": "its own forward", "dtype": "float32", "device": "cpu"}
    return moepatch.Site(**{**whole, **changes})


def odd_spec():
    (known,) = {p.site.spec for p in moepatch.plan(zoo.build("qwen3_moe"), measure=False).patterns if p.site.kind == "norm" and p.site.spec.width == 64}
    return replace(known, weight="scale")


def test_a_matcher_may_answer_with_a_kind_that_is_there(clean):
    model, given = odd_model()
    truth, spec = model(**given).logits, odd_spec()
    assert isinstance(spec, NormSpec) and "model.norm" not in {fqn for p in moepatch.plan(model, measure=False).patterns for fqn in p.fqns}
    moepatch.register_matcher("odd", priority=31)(lambda found, scan, memo: site_of(found, spec=spec) if isinstance(found.module, OddNorm) else None)
    moepatch.optimize(model, measure=False)
    (row,) = [v for v in moepatch.report(model).verified if v.fqn == "model.norm"]
    assert row.ok
    torch.testing.assert_close(model(**given).logits, truth, rtol=1e-4, atol=1e-5)
    assert type(moepatch.restore(model).model.norm) is OddNorm


def test_a_wrong_answer_is_caught_by_its_trial(clean):
    model, _ = odd_model()
    spec = replace(odd_spec(), eps=0.5)
    moepatch.register_matcher("odd", priority=31)(lambda found, scan, memo: site_of(found, spec=spec) if isinstance(found.module, OddNorm) else None)
    try:
        moepatch.optimize(model, measure=False)
    except moepatch.NumericMismatch as error:
        assert "model.norm" in str(error)
    else:
        assert type(model.model.norm) is OddNorm


def test_a_backend_for_a_table_that_is_there(clean):
    called = []

    @moepatch.register_backend("norm", "mine", rank=1000, serves="everything", why_not=lambda spec, dtype, device: None)
    def mine():
        inner = registry.compute("norm", "reference")
        return lambda *args, **kwargs: called.append(1) or inner(*args, **kwargs)

    model = zoo.build("qwen3_moe")
    given = zoo.inputs("qwen3_moe", model)
    truth = model(**given).logits
    moepatch.optimize(model, measure=False)
    assert {p.backend for p in moepatch.report(model).plan.patterns if p.site.kind == "norm"} == {"mine"}
    called.clear()
    torch.testing.assert_close(model(**given).logits, truth, rtol=1e-4, atol=1e-5)
    assert called and ("norm", "mine", None) in {(row.table, row.name, row.why_not) for row in moepatch.inspect(model).backends}


def test_backends_that_fail_say_so_and_others_serve(clean):
    def fails(spec, dtype, device):
        raise KeyError("no such thing")

    moepatch.register_backend("norm", "torn", rank=1000, why_not=fails)(lambda: None)
    moepatch.register_backend("norm", "odd", rank=999, why_not=lambda spec, dtype, device: 3)(lambda: None)
    moepatch.register_backend("norm", "gone", rank=-1)(lambda: __import__("not_there"))
    moepatch.register_backend("norm", "empty", rank=-1)(lambda: None)
    model = zoo.build("qwen3_moe")
    plan = moepatch.plan(model, measure=False)
    (pattern, *_) = [p for p in plan.patterns if p.site.kind == "norm"]
    assert pattern.backend == "reference" and "its why_not failed (KeyError: 'no such thing')" in pattern.why and "answered 3" in pattern.why
    assert "its why_not failed" in str(moepatch.inspect(model))
    for name, words in (("gone", "not_there"), ("empty", "returned None")):
        with pytest.raises(moepatch.BackendUnavailable, match=words):
            registry.compute("norm", name)


@dataclass(frozen=True)
class Spec:
    width: int = 3

    def describe(self):
        return "three wide"

    def to_dict(self):
        return {}


class Mine(moepatch.Patched):
    pass


ANSWERS = {
    "an unknown kind": (lambda found: site_of(found, kind="mine", spec=Spec()), "'mine', which nobody has registered: call moepatch.register_kind"),
    "something else": (lambda found: True, "answered True"),
    "other names": (lambda found: site_of(found, fqns=("here",), spec=Spec()), "fqns has to be found.fqns"),
    "a spec of another kind": (lambda found: site_of(found, kind="scored_block", spec=Spec()), "a spec .Spec. that the kind 'scored_block' cannot use: AttributeError"),
    "a list": (lambda found: site_of(found, spec=[1]), "cannot use: TypeError: unhashable"),
    "no dtype": (lambda found: site_of(found, kind="own", spec=Spec(), dtype="torch.bfloat16"), "the name of a dtype of torch"),
    "an inner module that is not there": (lambda found: site_of(found, kind="deep", spec=Spec()), "'a.b' inside it, and there is no such module"),
    "no mixin": (lambda found: site_of(found, kind="bare", spec=Spec()), "subclass of moepatch.Patched"),
    "a failure": (lambda found: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    "an unknown near miss": (lambda found: moepatch.Left(kind="mine", fqns=found.fqns, class_name="X", reason="so"), "nobody has registered"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_a_matcher_gets_wrong_names_it_and_the_module(case, clean):
    answer, words = ANSWERS[case]
    for name, injections in (("own", {"": (Mine, 1)}), ("deep", {"a.b": (Mine, 1)}), ("bare", {"": (OddNorm, 1)})):
        moepatch.register_kind(moepatch.Kind(name=name, pattern=name, backends=name, injections=lambda spec, backend, implementation, i=injections: i, dense=True))
    moepatch.register_matcher("wrong", priority=1000)(lambda found, scan, memo: answer(found) if found.fqn == "model.norm" else None)
    model = zoo.build("qwen3_moe")
    with pytest.raises(moepatch.MoePatchError, match=words) as raised:
        moepatch.optimize(model)
    assert "The matcher 'wrong' (test_outside), asked about 'model.norm' (Qwen3MoeRMSNorm)" in str(raised.value) and "unregister('wrong')" in str(raised.value)
    assert api.patch_of(model) is None


def kind(**changes):
    return moepatch.Kind(**{"name": "own", "pattern": "own", "backends": "own", **changes})


WRONG = {
    "no kind": (lambda: moepatch.register_kind("norm"), "takes a moepatch.Kind"),
    "a kind twice": (lambda: moepatch.register_kind(kind(name="norm")), "a kind named 'norm' already"),
    "no name": (lambda: moepatch.register_kind(kind(name="")), "its name is ''"),
    "a table that is an argument": (lambda: moepatch.register_kind(kind(backends="mesh")), "optimize.. has an argument of that name"),
    "a table that is no name": (lambda: moepatch.register_kind(kind(backends="my-own")), "a name of Python"),
    "no function": (lambda: moepatch.register_kind(kind(trial=3)), "its trial is 3"),
    "two arguments": (lambda: moepatch.register_matcher("m")(lambda found, scan: None), "cannot be called as match.found, scan, memo."),
    "no matcher": (lambda: moepatch.register_matcher("m")(3), "cannot be called as match"),
    "a matcher without a name": (lambda: moepatch.register_matcher(lambda found, scan, memo: None), "it has to be a text"),
    "a priority in words": (lambda: moepatch.register_matcher("m", priority="high"), "it has to be a number"),
    "a rank in words": (lambda: moepatch.register_backend("own", "b", rank="high"), "it has to be a number"),
    "a backend's why_not": (lambda: moepatch.register_backend("own", "b", rank=1, why_not=lambda spec: None), "why_not.spec, dtype, device."),
    "a backend without a factory": (lambda: moepatch.register_backend("own", "b", rank=1)(lambda x: x), "is not a factory"),
    "a matcher that is not there": (lambda: registry.unregister("nobody"), "no matcher and no kind named 'nobody'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_registered_wrongly_raises_in_words(case, clean):
    call, words = WRONG[case]
    before = set(KINDS), set(registry._MATCHERS), set(registry._BACKENDS)
    with pytest.raises(moepatch.MoePatchError, match=words):
        call()
    assert (set(KINDS), set(registry._MATCHERS), set(registry._BACKENDS)) == before


def test_no_table_can_be_called_like_an_argument():
    import inspect

    taken = {*inspect.signature(moepatch.optimize).parameters, *inspect.signature(moepatch.plan).parameters} - {"overrides"}
    assert taken <= registry.RESERVED


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ParameterList(nn.Parameter(torch.randn(64)) for _ in range(3))

    def forward(self, x):
        return x * sum(self.experts)


class ServedDoubled(moepatch.Patched):
    def forward(self, x):
        return registry.compute("own", self._moepatch)(x, list(self.experts))


def doubled_call(spec, dtype, device, generator):
    return moepatch.Call((torch.randn(4, 64, generator=generator),))


def test_a_kind_of_a_mixture_that_does_not_say_what_its_experts_are(clean):
    moepatch.register_backend("own", "reference", rank=0)(lambda: lambda x, weights: x * sum(weights))
    moepatch.register_kind(kind(injections=lambda spec, backend, implementation: {"": (ServedDoubled, backend)}, trial=doubled_call))
    moepatch.register_matcher("own", priority=1000)(lambda found, scan, memo: site_of(found, kind="own", spec=Spec()) if type(found.module) is Doubled else None)
    model = zoo.build("qwen3_moe")
    model.model.norm = nn.Sequential(model.model.norm, Doubled())
    given = zoo.inputs("qwen3_moe", model)
    truth = model(**given).logits
    assert moepatch.inspect(copy.deepcopy(model)).estimate.active_params is None
    moepatch.optimize(model, measure=False)
    assert "own" in {p.site.kind for p in moepatch.report(model).plan.mixture} and str(moepatch.inspect(model))
    for twin in (model, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**given).logits, truth, rtol=1e-4, atol=1e-5)


ATTENTION = """
import pickle, sys, torch, zoo
from transformers.integrations.sdpa_attention import sdpa_attention_forward
import moepatch

called = []

@moepatch.register_backend("attention", "mine", rank=90)
def load():
    def attend(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None or type(attention_mask) is torch.Tensor
        called.append(module)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend

"""


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_backend_for_attention_from_outside(family, tmp_path):
    """Where it computes the same it is taken, and the model can be unpickled elsewhere; where it does not (sinks) the next one is."""
    patched = f"""
model = zoo.build({family!r})
given = zoo.inputs({family!r}, model)
given["attention_mask"] = torch.ones_like(given["input_ids"]); given["attention_mask"][0, :4] = 0
truth = model(**given).logits
moepatch.optimize(model, measure=False)
pickle.dump((model, given, truth), open({str(tmp_path / "model")!r}, "wb"))
now = [p.backend for p in moepatch.report(model).plan.patterns if p.site.kind == "attention_function"]
assert now == ["torch" if {family!r} == "gpt_oss" else "mine"], moepatch.report(model).notes
"""
    used = f"""
model, given, truth = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
called.clear()
torch.testing.assert_close(model(**given).logits, truth, rtol=1e-4, atol=1e-5)
assert bool(called) == ({family!r} != "gpt_oss")
torch.testing.assert_close(moepatch.restore(model)(**given).logits, truth, rtol=1e-4, atol=1e-5)
"""
    for code in (ATTENTION + patched, ATTENTION + used):
        done = run(code=code)
        assert done.returncode == 0, done.stderr


def test_a_backend_for_residual_sums_from_outside(clean):
    """It needs no norm of its own."""
    used = []

    @moepatch.register_backend("residual", "mine", rank=90)
    def load():
        ops = registry.compute("residual", "reference")
        return ops._replace(add=lambda *args: used.append(args) or ops.add(*args))

    model = zoo.build("qwen3_moe")
    given = zoo.inputs("qwen3_moe", model)
    truth = model(**given).logits
    moepatch.optimize(model, measure=False)
    assert {p.backend for p in moepatch.report(model).plan.patterns if p.site.kind == "residual"} == {"mine"}
    used.clear()
    torch.testing.assert_close(model(**given).logits, truth, rtol=1e-4, atol=1e-5)
    assert used
