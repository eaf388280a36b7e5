"""Test files that check Triton kernels in its interpreter, which has to be chosen before Triton is imported: in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def passes_in_the_interpreter(file: str, words: str) -> None:
    """Runs a test file as a program; it has to say `words` at the end."""
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0 and words in run.stdout, run.stdout + run.stderr


def let_tensors_bound_loops() -> None:
    """numpy 2.4 no longer turns an array of one number into an int, which Triton 3.6's interpreter does with the bounds of a loop."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
