"""``moepatch bench``: every stack of every kind of module that a backend serves here, timed without weights."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from typer.testing import CliRunner

import moepatch
from moepatch import bench, cli
from moepatch.piece import piece
from moepatch.source import meta_model

CPU = torch.device("cpu")


def command(*args):
    return CliRunner().invoke(cli.app, ["bench", *map(str, args)])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "_PATIENCE", 0.01)


@pytest.fixture
def deepseek(tmp_path, quick):
    zoo.config("deepseek_v3").save_pretrained(tmp_path)
    return tmp_path


def test_rows_of_a_model(deepseek):
    done = command(deepseek, "--tokens", 24, "--json")
    rows = json.loads(done.stdout)["rows"]
    assert done.exit_code == 0 and not any(row["problem"] for row in rows) and all(row["ms"] > 0 for row in rows)
    stacks = {}
    for row in rows:
        stacks.setdefault(row["pattern"].partition(":")[0], []).append((row["stack"], row["planned"]))
    assert stacks["experts"][:2] == [("transformers", False), ("torch", True)]
    assert stacks["mlp"][:2] == [("transformers", False), ("torch", True)] and stacks["loss"][1] == ("chunked", True)
    assert stacks["attention function"][0][0] == "torch"  # nothing of the family stands there


def test_what_is_printed(deepseek):
    done = command(deepseek, "--tokens", 24)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and lines[0].startswith("DeepseekV3ForCausalLM on ")
    (experts,) = [at for at, line in enumerate(lines) if line.startswith("experts: fused 3-D")]
    assert "transformers" in lines[experts] and any("torch ●" in line for line in lines[experts + 1 : experts + 3])


def test_errors(tmp_path, quick):
    missing = command(tmp_path / "nothing")
    assert missing.exit_code == 1 and "no such file" in missing.stderr and not missing.stdout
    assert command(tmp_path, "--tokens", 0).exit_code != 0


def test_a_module_that_has_no_room_and_one_that_fails(quick, monkeypatch):
    model = meta_model(zoo.config("qwen3_moe"), "here")
    plan = moepatch.plan(model, measure=False)
    monkeypatch.setattr(bench, "_free", lambda device: 2**17)
    rows = list(bench.bench(model, plan, CPU, 24))
    assert [row.problem for row in rows if row.pattern.startswith("experts")] == ["needs about 0.0 GiB, and 0.0 are free"] * 2
    assert any(row.ms for row in rows)
    monkeypatch.setattr(bench, "best_ms", None)
    monkeypatch.setattr(bench, "_cpu_ms", lambda run: 1 / 0)
    rows = list(bench.bench(model, plan, CPU, 24))
    assert {row.problem for row in rows if row.ms is None} >= {"failed (ZeroDivisionError: division by zero)"}


def test_the_model_is_left_as_it_was(quick):
    model = meta_model(zoo.config("gpt_oss"), "here")
    plan = moepatch.plan(model, measure=False)
    before = model.config._attn_implementation, [type(m) for m in model.modules()]
    (pattern,) = [p for p in plan.patterns if p.site.kind == "attention_block"]
    piece(model, pattern, "reference", 24, CPU, bench.random_weights(CPU), attention="torch").step()
    assert (model.config._attn_implementation, [type(m) for m in model.modules()]) == before
    assert all(p.is_meta for p in model.parameters())
