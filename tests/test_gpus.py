"""GPUs that are not here: what own kernels need, against what a GPU has."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moepatch import gpus, needs, registry
from moepatch.gpus import GPUS
from moepatch.kernels import requirements
from moepatch.layers.attention.spec import AttentionSpec
from moepatch.layers.attention.torch_kernels import why_not_cudnn
from moepatch.layers.mixers.backends import ssd_size

ROOT = Path(__file__).parents[1]
TARGETS = {80: "a100", 86: "rtx3090", 89: "rtx4090", 90: "h200", 100: "b200", 120: "rtx5090"}


def test_a_device_may_be_one_that_is_not_here(monkeypatch):
    monkeypatch.setattr(needs, "installed", lambda module: True)
    assert needs.missing(torch.bfloat16, GPUS["a100"], "triton") is None
    assert needs.missing(torch.bfloat16, GPUS["a100"], "quack", capability=(9, 0)) == "needs compute capability ≥ 9.0, this is 8.0"
    old = dataclasses.replace(GPUS["a100"], name="T4", capability=(7, 5))
    assert needs.missing(torch.bfloat16, old, "triton") == "needs compute capability ≥ 8.0, this is 7.5 (older GPUs have no bf16)"


def test_what_does_not_fit_is_said_with_its_numbers(monkeypatch):
    table = {"ssd": {"128x64": {"bfloat16": {"80": [60 * 1024, 8], "86": [60 * 1024, 5000], "89": [132 * 1024, 0], "100": "no such layout"}}}}
    monkeypatch.setattr(requirements, "requirements", lambda: {"triton": "3.6.0", "tables": table})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")

    def asked(gpu, dtype=torch.bfloat16):
        return requirements.why_not("ssd", dtype, gpu, "128x64")

    assert asked(GPUS["rtx4090"]) == "needs 132 KiB of shared memory a block, RTX 4090 (sm_89) has 99 KiB"
    assert asked(GPUS["rtx3090"]) == "its kernels spill 5000 bytes of registers a thread on RTX 3090 (sm_86), more than 4096: too slow"
    assert asked(GPUS["a100"]) is None and asked(GPUS["a100"], torch.float16) is None
    assert asked(GPUS["b200"]) == "Triton 3.6.0 cannot compile its kernels for B200 (sm_100): no such layout"
    # A capability between two, one before all, and another Triton.
    assert asked(dataclasses.replace(GPUS["h200"], shared=100 * 1024)).startswith("needs 132 KiB")
    assert asked(dataclasses.replace(GPUS["a100"], capability=(7, 5))) is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.0")
    assert asked(GPUS["b200"]) is None


compiled = pytest.mark.skipif(not requirements.requirements()["tables"], reason="nothing was compiled yet: make kernels")


@compiled
@pytest.mark.parametrize("capability", TARGETS)
def test_the_file_has_every_known_gpu(capability):
    """And an H200, where it was tried, runs everything."""
    for table, sizes in requirements.requirements()["tables"].items():
        for size, dtypes in sizes.items():
            for dtype, found in dtypes.items():
                assert str(capability) in found, (table, size, dtype)
                if capability == 90:
                    assert requirements.why_not(table, getattr(torch, dtype), GPUS["h200"], size) is None


def test_sizes_of_heads_are_rounded_up_to_those_of_the_file():
    assert [ssd_size(16, 16), ssd_size(64, 80), ssd_size(256, 128)] == ["64x64", "64x128", "256x128"]


@compiled
def test_the_file_has_every_size_of_heads():
    assert set(requirements.requirements()["tables"]["ssd"]) >= {"64x64", "64x128", "128x64", "128x128", "256x64", "256x128"}


def test_the_driver_decides_about_a_gpu_that_is_here(monkeypatch):
    found = {"name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "multi_processor_count": 108, "total_memory": 85 * 10**9}

    class Properties:
        def __init__(self, **facts):
            self.__dict__.update(facts)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(**found))
    gpus._of_driver.cache_clear()
    try:
        assert gpus.described(torch.device("cuda", 0)) == gpus.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 163 * 1024, 108, 85 * 10**9, 2039e9, 312e12)
        gpus._of_driver.cache_clear()
        found |= {"name": "NVIDIA RTX 9090", "major": 13, "shared_memory_per_block_optin": 12345}
        assert gpus.described(torch.device("cuda", 0)) == gpus.Gpu("NVIDIA RTX 9090", (13, 0), 12345, 108, 85 * 10**9)
    finally:
        gpus._of_driver.cache_clear()


@compiled
def test_kernels_compile_for_every_gpu_and_the_file_is_fresh():
    """A sample, recorded and compiled in a process of its own: ``make kernels`` runs it where Triton is, and writes the files first."""
    pytest.importorskip("triton")
    script = (
        "import json, sys, torch, triton; import kernel_requirements as kr; sizes = [(128, 64)];"
        "found = kr.made(torch.bfloat16, ['Qwen3-30B-A3B', 'DeepSeek-V3']);"
        "rows = []; \n"
        "for capability, target in kr.TARGETS.items():\n"
        "    forms = [f for f in kr.forms_for(target, torch.bfloat16, found, sizes) if f.table in ('ssd', 'residual', 'latent', 'router', 'dispatch')]\n"
        "    for form, need in zip(forms, kr.all_needs([(f, capability) for f in forms])):\n"
        "        rows.append([form.table, kr.size_of(form), capability, form.kernel, need])\n"
        "print(json.dumps([triton.__version__, rows]))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "bench", env=_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    version, rows = json.loads(run.stdout.splitlines()[-1])
    data = requirements.requirements()
    assert {row[3].split(".")[1] for row in rows} >= {"norm_jit", "ssd_jit", "latent_jit", "router_jit", "symm_mem_out", "symm_mem_back"}
    for table, size, capability, kernel, need in rows:
        known = data["tables"][table][size]["bfloat16"][str(capability)]
        if version != data["triton"]:
            continue
        fits = isinstance(known, str) or "error" not in need and need["shared"] <= known[0] and need["spills"] <= known[1]
        assert fits, (table, size, capability, kernel, need, known)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", GPUS)
def test_every_backend_can_be_asked_about_a_gpu_that_is_not_here(name, monkeypatch):
    import moepatch.kinds  # noqa: F401  (registers all of them)

    monkeypatch.setattr(needs, "installed", lambda module: module == "triton")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0")
    answers = {(b.table, b.name): b.why_not(None, torch.bfloat16, GPUS[name]) for table in registry.tables() for b in registry.backends(table)}
    assert all(answer is None or isinstance(answer, str) for answer in answers.values())
    assert answers["norm", "triton"] is None and answers["ssd", "triton"] is None
    wide = AttentionSpec(heads=8, kv_heads=8, head_dim=192, v_head_dim=128)
    assert isinstance(why_not_cudnn(wide, torch.bfloat16, GPUS[name]), str | None)
