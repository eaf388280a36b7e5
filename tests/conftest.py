"""Fixtures that all tests share: single-threaded torch, tiny models by name, what was seen of families for their record."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import zoo

torch.set_num_threads(1)

FAMILIES = {*zoo.FAMILIES, *zoo.EXTRA}
_NONE = SimpleNamespace(params={})


#: Files whose tests take long, each: they come first, so that no worker is left with one of them at the end.
LONG = ("simulation", "global", "interrupts", "demo", "deadlock", "fsdp2", "parallel", "trainer", "symm_mem", "deep_ep", "witness")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` need one; without it they are deselected by name in the summary, not passed.

    With pytest-xdist the tests of a family go to one worker (``--dist loadgroup``), which then has to find out about its classes only once.
    """
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skipif(True, reason="needs a CUDA GPU"))
        family = next((value for value in getattr(item, "callspec", _NONE).params.values() if isinstance(value, str) and value in FAMILIES), None)
        if family is not None and config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(family))
    items.sort(key=lambda item: not item.path.stem.removeprefix("test_").startswith(LONG))


def pytest_terminal_summary(terminalreporter):
    """Where there is a GPU, the closing lines say which, and with what: they are kept as a record."""
    if torch.cuda.is_available():
        have = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
        wanted = ("torch", "triton", "transformers", "transformer-engine", "liger-kernel", "quack-kernels", "flash-attn-4", "deep-ep")
        versions = [f"{name} {have[name]}" for name in wanted if name in have]
        terminalreporter.write_line(", ".join([torch.cuda.get_device_name(), f"{os.cpu_count()} cores", *versions]))


@pytest.fixture
def build():
    """``build(name, **kwargs)``: a tiny model of the zoo."""
    return zoo.build


@pytest.fixture
def qwen3():
    """A tiny Qwen3-MoE: standard layout, per-expert on disk, aux loss."""
    return zoo.build("qwen3_moe")


@pytest.fixture
def seen(request):
    """``seen()``, called where a test of the behaviour suite ends: the record of kinds may say so of the family."""
    from family_kinds import RESULTS, SEES

    family, test = request.node.callspec.params["name"], request.node.originalname
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{family}-{SEES[test].replace(' ', '-')}.json"  # workers of pytest-xdist never write the same one

    def write(passed: bool = True) -> None:
        path.write_text(json.dumps({"family": family, "what": SEES[test], "passed": passed}))

    write(passed=False)  # a test that does not come to its end has seen nothing
    return write
