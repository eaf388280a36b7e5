"""Functions that are called in the place of others, by copies: nothing that exists is changed."""

from __future__ import annotations

import functools
import sys
import threading
import types

import pytest
from torch import nn

from moepatch.stand_in import StandIns
from moepatch.surgery import original_class

library = types.ModuleType("test_library")
exec(  # a module of its own, as transformers' is
    """
import functools
def is_exporting(): return False
def wrap(function):
    @functools.wraps(function)
    def wrapped(x): return function(x) if is_exporting() else "library"
    return wrapped
""",
    vars(library),
)


@library.wrap
def kernel(x):
    return f"torch {x}"


class Function(nn.Module):
    """A function as a module, which the package `kernels` makes of some."""

    def forward(self, x):
        return kernel(x)


as_module = Function()


def helper(x):
    return kernel(x)


def decorated(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class Base(nn.Module):
    def forward(self, x):
        return [kernel(x)]

    @staticmethod
    def fixed(x):
        return kernel(x)


class Inner(nn.Module):
    def forward(self, x):
        return helper(x)


class Outer(Base):
    def __init__(self):
        super().__init__()
        self.function, self.inner = kernel, Inner()

    @decorated
    def forward(self, x):
        return [*super().forward(x), helper(x), self.fixed(x), self.function(x), self.inner(x), as_module(x), *(kernel(y) for y in [x]), self.again(x, 1)]

    def again(self, x, times):
        return self.again(x, times - 1) if times else kernel(x)


IN_TORCH = StandIns({(library, "is_exporting"): lambda: True})


def test_a_module_and_all_that_it_calls_does_otherwise_while_it_is_entered_and_nobody_else():
    module, other = Outer(), Outer()
    elsewhere = []
    with IN_TORCH.within(module, Outer.forward, print) as (forward, untouched):
        assert module(3) == forward(module, 3) == ["torch 3"] * 8 and untouched is print
        assert isinstance(module, Outer) and original_class(module) is Outer and type(module).__name__ == "Outer"
        thread = threading.Thread(target=lambda: elsewhere.extend(other(3)))
        thread.start()
        thread.join()
    assert elsewhere == module(3) == ["library"] * 8
    assert type(module) is Outer and type(module.inner) is Inner and module.function is kernel


def test_it_is_left_however_it_ends():
    module = Outer()
    with pytest.raises(ZeroDivisionError), IN_TORCH.within(module):
        1 / 0
    assert type(module) is Outer and module(1) == ["library"] * 8


def test_what_does_not_come_by_the_name_is_not_copied():
    module = nn.Sequential(nn.Linear(2, 2))
    with IN_TORCH.within(module):
        assert type(module) is nn.Sequential
    assert IN_TORCH.copied(decorated) is decorated and IN_TORCH.copied(helper) is not helper


def test_a_copy_is_made_anew_when_a_name_means_something_else(monkeypatch):
    memory = {}
    first = IN_TORCH.remembered(helper, memory)
    assert first(1) == "torch 1" and IN_TORCH.remembered(helper, memory) is first
    monkeypatch.setattr(sys.modules[__name__], "kernel", lambda x: f"mine {x}")
    assert IN_TORCH.remembered(helper, memory)(1) == "mine 1"
