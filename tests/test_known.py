"""What a process has found out about a module once holds for equal ones, and for no others."""

from __future__ import annotations

import sys

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


def test_the_config_is_as_it_was(verdicts):
    module = Mlp()
    config, before = module.config, dict(vars(module.config))
    assert taken(module) and module.config is config and type(config) is Config and vars(config) == before


def test_what_a_forward_calls_counts(verdicts, monkeypatch):
    assert taken(Mlp())
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x: F.silu(x).clamp(max=5.0))
    assert not taken(Mlp())


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
