"""What `make demo` runs, with a few steps instead of a few hundred."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_goes_from_checkpoint_to_checkpoint(finetune, tmp_path, capsys):
    finetune.main(steps=8, out=tmp_path / "tuned", max_loss=5.5)
    printed = capsys.readouterr().out
    assert "All of it held" in printed and "✗" not in printed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "tuned").iterdir()}


def test_the_demo_fails_in_words(finetune, capsys):
    with pytest.raises(SystemExit, match=r"this did not hold: the loss fell from .* below 0\.1"):
        finetune.main(steps=2, max_loss=0.1)
    assert "✗ the loss fell" in capsys.readouterr().out


def test_the_sparkline_falls_with_the_values(finetune):
    assert finetune.sparkline([8.0, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert len(finetune.sparkline([float(i) for i in range(300)], width=40)) == 40
    assert finetune.sparkline([1.0]) == "▁"
