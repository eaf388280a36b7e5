"""Ctrl-C at any line of what changes a model, or puts it back: it is as it was, or it is patched and `restore` knows the way back."""

from __future__ import annotations

import sys

import pytest
import zoo

import moepatch
from moepatch import carrying_out, surgery
from moepatch.experts import expert_list, listed as listed_weights
from moepatch.layers.attention import kind as attention_kind

FILES = {module.__file__ for module in (carrying_out, surgery, expert_list, listed_weights, attention_kind)}
DO, UNDO = {"carry_out", "apply_pattern", "apply_models", "relayout", "do"}, {"undo"}


def everything(model):
    """Whatever hangs on a module, by identity: classes, attributes, parameters, buffers, hooks, children."""
    found = []
    for name, module in model.named_modules():
        attributes = {key: list(value.items()) if isinstance(value, dict) else value for key, value in vars(module).items()}
        found.append((name, type(module), {k: [(a, id(b)) for a, b in v] if isinstance(v, list) else id(v) for k, v in attributes.items()}))
    return found, {key: value for key, value in vars(model.config).items() if isinstance(value, (str, int, float, type(None)))}


class Interrupt:
    """Raises where a line of these functions is about to run for the n-th time; without one, writes down where that happens."""

    def __init__(self, functions, at=None):
        self.functions, self.at, self.seen = functions, at, []

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        code = frame.f_code
        if code.co_filename not in FILES or code.co_name not in self.functions:
            return None
        if event == "line":
            self.seen.append((code.co_filename, frame.f_lineno))
            if self.at is not None and self.seen.count(self.at[0]) == self.at[1] and self.seen[-1] == self.at[0]:
                self.at = None
                raise KeyboardInterrupt
        return self.trace


def places(seen):
    """Every line, the first time that it runs and the last time."""
    return sorted({(line, count) for line in seen for count in (1, seen.count(line))})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_while_it_is_patched(family):
    model = zoo.build(family)
    before = everything(model)
    options = {"verify": False, "measure": False, "norm": None, "mlp": None, "residual": None}
    for _ in range(2):  # what is found out the first time is not looked at again
        with Interrupt(DO) as watched:
            moepatch.optimize(model, **options)
        moepatch.restore(model)
    assert everything(model) == before and len(places(watched.seen)) > 30
    for at in places(watched.seen):
        with pytest.raises(KeyboardInterrupt), Interrupt(DO, at):
            moepatch.optimize(model, **options)
        if "_moepatch_patch" in vars(model):
            moepatch.restore(model)
        assert everything(model) == before, at


def test_while_it_is_restored():
    model = zoo.build("mixtral")
    before = everything(model)
    options = {"verify": False, "measure": False, "loss": None}
    moepatch.optimize(model, **options)
    with Interrupt(UNDO) as watched:
        moepatch.restore(model)
    for at in places(watched.seen):
        moepatch.optimize(model, **options)
        with pytest.raises(KeyboardInterrupt), Interrupt(UNDO, at):
            moepatch.restore(model)
        moepatch.restore(model)
        assert everything(model) == before, at
