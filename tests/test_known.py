"""What a process has found out about a module once holds for equal ones, and for no others."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from moepatch import registry
from moepatch.match import known, witness
from moepatch.planning import make_plan
from moepatch.scan import Scan
from moepatch.site import Site


@pytest.fixture
def verdicts(monkeypatch):
    """The modules that the second witness has been asked about; everything was forgotten before."""
    asked, before = [], witness.Witness.objection
    monkeypatch.setattr(witness.Witness, "objection", lambda self, calls: asked.append(type(self.original)) or before(self, calls))
    known.forget()
    return asked


def patterns(plan):
    return [(p.site.kind, p.site.spec, p.fqns) for p in plan.patterns]


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "deepseek_v3"])
def test_another_model_of_the_family_is_not_tried_again(name, verdicts):
    first = make_plan(zoo.build(name))
    assert verdicts
    verdicts.clear()
    assert patterns(make_plan(zoo.build(name))) == patterns(first) and not verdicts
    other = zoo.build(name, dtype=torch.bfloat16)
    other.config._name_or_path = "/somewhere/else"
    assert patterns(make_plan(other)) == patterns(first) and not verdicts


class Config(PreTrainedConfig):
    model_type = "known"


def factor(config):
    return config.factor


def helper(x):
    return F.silu(x)


class Mlp(nn.Module):
    """Remote code that asks its config, by one step and by another."""

    def __init__(self, **values):
        super().__init__()
        self.config = Config(**{"factor": 1.0, "limits": {"most": 1.0}, "remark": "", **values})
        self.up_proj, self.gate_proj, self.down_proj = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x):
        y = self.down_proj(helper(self.gate_proj(x)) * self.up_proj(x))
        if x.shape[0] > 3:
            y = y * factor(self.config)
        return y * self.config.limits["most"] if x.numel() > 16 * 600 else y


def taken(module):
    scan = Scan(nn.ModuleList([module]))
    return isinstance(next(m for m in registry.matchers() if m.name == "mlp").match(scan.of(module), scan, {}), Site)


def test_of_a_config_what_is_asked_counts(verdicts):
    assert taken(Mlp()) and len(verdicts) == 1
    assert taken(Mlp(remark="another")) and len(verdicts) == 1
    assert not taken(Mlp(factor=2.0)) and not taken(Mlp(limits={"most": 2.0}))
    assert taken(Mlp())
    module = Mlp()
    module.config.factor = 2.0
    assert not taken(module)


class Own(Mlp):
    """One with settings of its own, where others of a model have theirs."""

    def __init__(self, number):
        super().__init__()
        self.own = types.SimpleNamespace(number=number)

    def forward(self, x):
        return super().forward(x) * self.own.number


@pytest.mark.parametrize(
    "made", [lambda n: Mlp(factor=n), lambda n: Mlp(limits={"most": n}), Own], ids=["a config", "a dict in a config", "an object"]
)
def test_layers_of_a_model_have_settings_of_their_own(made):
    model = nn.ModuleList([made(1.0), made(1.0), made(2.0)])
    scan, memo = Scan(model), {}
    mlp = next(m for m in registry.matchers() if m.name == "mlp")
    assert [isinstance(mlp.match(scan.of(module), scan, memo), Site) for module in model] == [True, True, False]


def test_the_config_is_as_it_was(verdicts):
    module = Mlp()
    config, before = module.config, dict(vars(module.config))
    assert taken(module) and module.config is config and type(config) is Config and vars(config) == before


def test_what_a_forward_calls_counts(verdicts, monkeypatch):
    assert taken(Mlp())
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x: F.silu(x).clamp(max=5.0))
    assert not taken(Mlp())


FACTORS, NAMED, BOX, LIBRARY = [1.0], {"by": 1.0}, types.SimpleNamespace(factor=1.0), types.ModuleType("library_of_test")
LIBRARY.FACTOR = 1.0
exec("def doubled(x):\n    return x", vars(LIBRARY))


class Settings:
    factor = 1.0


def times(number):
    def decorate(forward):
        @functools.wraps(forward)
        def wrapper(self, x):
            return forward(self, x) * number

        return wrapper

    return decorate


def enclosing():
    number = 1.0

    def scaled(x):
        return x * number

    def give(value):
        nonlocal number
        number = value

    return scaled, give


SCALED, GIVE = enclosing()


class Plain(nn.Module):
    """One that may compute twice as much, for reasons outside of it."""

    how, factor = "", 1.0
    limit = 10**6

    def __init__(self):
        super().__init__()
        self.up_proj, self.gate_proj, self.down_proj = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    @property
    def asked(self):
        return 1.0

    @staticmethod
    def static(x):
        return x

    def forward(self, x):
        y = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        y = SCALED(self.static(LIBRARY.doubled(y))) * self.factor * self.asked * FACTORS[0] * NAMED["by"] * BOX.factor * LIBRARY.FACTOR * Settings.factor
        if torch.are_deterministic_algorithms_enabled():
            return y * 2
        return y * 2 if x.shape[0] > self.limit else y


@pytest.fixture
def told(monkeypatch):
    yield monkeypatch
    GIVE(1.0)
    FACTORS[0] = 1.0
    torch.use_deterministic_algorithms(False)


CHANGES = {
    "an attribute of the class": lambda m: m.setattr(Plain, "factor", 2.0),
    "one that only many tokens ask for": lambda m: m.setattr(Plain, "limit", 3),
    "a property": lambda m: m.setattr(Plain, "asked", property(lambda self: 2.0)),
    "a static method": lambda m: m.setattr(Plain, "static", staticmethod(lambda x: x * 2)),
    "a wrapper around its forward": lambda m: m.setattr(Plain, "forward", times(2.0)(Plain.forward)),
    "an item of a list": lambda m: FACTORS.__setitem__(0, 2.0),
    "an item of a dict": lambda m: m.setitem(NAMED, "by", 2.0),
    "an attribute of an object": lambda m: m.setattr(BOX, "factor", 2.0),
    "a name of a library": lambda m: m.setattr(LIBRARY, "FACTOR", 2.0),
    "a function of a library": lambda m: m.setattr(LIBRARY, "doubled", lambda x: x * 2),
    "an attribute of another class": lambda m: m.setattr(Settings, "factor", 2.0),
    "what a function encloses": lambda m: GIVE(2.0),
    "a setting of torch": lambda m: torch.use_deterministic_algorithms(True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_a_forward_reads_outside_counts(change, verdicts, told):
    assert taken(Plain()) and taken(Plain()) and len(verdicts) == 1
    change(told)
    assert not taken(Plain())


def test_a_wrapper_is_exchanged_for_another(verdicts, monkeypatch):
    forward = Plain.forward
    monkeypatch.setattr(Plain, "forward", times(1.0)(forward))
    assert taken(Plain())
    monkeypatch.setattr(Plain, "forward", times(2.0)(forward))
    assert not taken(Plain())


def test_what_could_not_be_read_is_tried_again(verdicts):
    calls, module = [], Mlp()
    for result in ("a reason", ("a reason", True), None, "spec"):
        assert known.known("of a test", module, lambda m, result=result: calls.append(result) or result) == result
    assert len(calls) == 4


def test_where_somebody_watches_nothing_is_kept(verdicts):
    module, calls = Mlp(), []
    for _ in range(2):
        with torch.device("meta"):
            known.known("of a test", module, lambda m: calls.append(m) or 1)
    assert len(calls) == 2
    for _ in range(2):
        known.known("of a test", module, read_of_test, calls)
    assert len(calls) == 3


def read_of_test(module, calls):
    calls.append(module)
    return 1
