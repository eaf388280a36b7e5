"""What plans, reports and inspections have in common as text: as wide as the terminal, equal reasons once, names with ranges."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import zoo

import moepatch
from moepatch.planning import Choice, Pattern
from moepatch.render import words
from moepatch.reporting import Report
from moepatch.trial import Difference
from moepatch.verify import Verified


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def widths(text: object) -> int:
    return max(len(line) for line in str(text).splitlines())


@pytest.mark.parametrize("name", ["qwen3_moe", "ernie4_5_vl_moe", "jetmoe", "longcat_flash", "llama4", "gpt_oss", "switch_transformers"])
def test_no_line_is_wider_than_the_terminal(name, monkeypatch):
    inspection = moepatch.inspect(zoo.config(name))
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert widths(inspection) <= width
        assert widths(inspection.plan) <= width
        assert "\x1b" not in str(inspection)


def test_report_prints_the_verification(qwen3):
    report = moepatch.report(moepatch.optimize(qwen3))
    text = str(report)
    assert text.startswith("Qwen3MoeForCausalLM: 100 % of a step's FLOPs and 22 of 22 modules with weights\nare patched\n\nmixture of experts ")
    assert text.index("mixture of experts") < text.index("dense half") < text.index("modules\n")
    assert "model.layers.{0,1}.mlp.experts" in text
    table = text[text.index("\nverified ") :]
    (row,) = [line for line in table.splitlines() if line.startswith("experts: fused 3-D")]
    assert re.search(r" torch +\S.* 1\.0e-05  ok$", row) and "family's" not in table
    assert table.count("  ok\n") == sum(bool(v.differences) for v in report.verified)
    assert "seconds  plan" in text and widths(text) <= 80


def test_what_was_not_run_and_the_family_s_own_error():
    plan, rows = moepatch.plan(zoo.build("qwen3_moe")), (Difference("output", 2e-3, 3e-3, 4.5e-3), Difference("grad x", 3e-3, 3e-3, 4.5e-3))
    verified = (Verified("norm: RMS norm", "model.norm", "te", rows), Verified("loss: head", "lm_head", "cce", (), "not run: a reason"))
    text = str(Report(plan, verified, (), {}))
    assert re.search(r"\nverified +backend +worst +error +family's +limit\n", text)
    assert re.search(r"\nnorm: RMS norm +te +grad x \(of 2\) +3\.0e-03 +3\.0e-03 +4\.5e-03  ok\n", text)
    assert re.search(r"\nloss: head +cce +not run$", text)


CPU = {"triton": "its kernels run on CUDA GPUs", "cudnn": "needs an NVIDIA GPU, this is cpu", "symm": "needs CUDA GPUs, this is cpu"}
ABSENT = {"triton": "triton: not installed", "liger": "liger_kernel is not installed", "te": "not installed (pip install moepatch[te])"}


@pytest.mark.parametrize(
    ("choices", "why", "short"),
    [
        ({"a": None}, "ok", "ok"),
        (ABSENT, "fallback; {}", "fallback; not installed: triton, liger, te"),
        (CPU, "fallback; {}", "fallback; needs a GPU: triton, cudnn, symm"),
        (CPU | {"te": ABSENT["te"], "own": "no float64"}, "fallback; {}", "fallback; needs a GPU: triton, cudnn, symm; not installed: te; no float64: own"),
        ({"new": "needs CUDA 13; this is 12.6"}, "fallback; {}", "fallback; needs CUDA 13; this is 12.6: new"),
        (ABSENT, "no backend can serve it: {}", "no backend can serve it: not installed: triton, liger, te"),
        (ABSENT, "chosen by the caller", "chosen by the caller"),
        (ABSENT, "measured: x 0.12 ms, y 0.34 ms", "measured: x 0.12 ms, y 0.34 ms"),
    ],
)
def test_equal_reasons_are_given_once(choices, why, short):
    listed = "; ".join(f"{name}: {reason}" for name, reason in choices.items())
    last = () if why.startswith("no backend") else (Choice("reference", None),)
    pattern = Pattern((), "reference", why.format(listed), tuple(Choice(*row) for row in choices.items()) + last)
    assert words.why(pattern) == short


def test_measured_times_stay_on_one_line_where_there_is_room(qwen3, monkeypatch):
    plan = moepatch.plan(qwen3)
    measured = "measured: triton 0.12 ms, torch 0.15 ms, te 0.31 ms"
    plan = replace(plan, patterns=tuple(replace(p, why=measured) for p in plan.patterns))
    for width, count in ((120, len(plan.patterns)), (80, 0)):
        monkeypatch.setenv("COLUMNS", str(width))
        assert str(plan).count(measured) == count


@pytest.mark.parametrize(
    ("fqns", "short"),
    [
        (["a"], ["a"]),
        (["layers.3.x"], ["layers.3.x"]),
        ([f"layers.{i}.x" for i in (0, 1, 2, 4, 7, 8)], ["layers.{0…2,4,7,8}.x"]),
        ([f"layers.{i}.x" for i in range(0, 40, 2)], ["layers.{0,2,4,6,8,10,…,38}.x"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["l.{0,1}.e.0", "l.0.e.1"]),
        (["enc.0.x", "dec.0.x", "enc.1.x", "dec.1.x"], ["enc.{0,1}.x", "dec.{0,1}.x"]),
    ],
)
def test_collapsed_names(fqns, short):
    assert words.collapse(fqns) == short
