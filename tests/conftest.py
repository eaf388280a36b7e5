"""Fixtures that all tests share: single-threaded torch, tiny models by name, results of families for the README's table."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import transformers
import zoo

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need one; without it they are deselected by name in the summary, not passed."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skipif(True, reason="needs a CUDA GPU"))


@pytest.fixture
def build():
    """``build(name, **kwargs)``: a tiny model of the zoo."""
    return zoo.build


@pytest.fixture
def qwen3():
    """A tiny Qwen3-MoE: standard layout, per-expert on disk, aux loss."""
    return zoo.build("qwen3_moe")


@pytest.fixture(scope="session")
def family_results(request):
    """``record(family, key, value)``: facts of the run for `tests/family_table.py`."""
    folder = Path(request.config.rootpath, "build", "families", transformers.__version__)
    folder.mkdir(parents=True, exist_ok=True)

    def record(family: str, **facts) -> None:
        # One file for each fact group: workers of pytest-xdist never write the same one.
        name = "-".join([family, *sorted(facts)])
        (folder / f"{name}.json").write_text(json.dumps({"family": family, **facts}))

    return record
