"""The examples in docstrings are what Python says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import moepatch

ROOT = Path(moepatch.__file__).parent


def test_examples():
    files = [path for path in ROOT.rglob("*.py") if ">>>" in path.read_text()]
    names = [".".join(("moepatch", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for path in files]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert not [name for name, result in results.items() if result.failed]
    assert sum(result.attempted for result in results.values()) > 15
