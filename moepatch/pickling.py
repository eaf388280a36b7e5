"""Pickles of patched modules: ordinary modules in a process that does not have moepatch, patched ones in a process that has imported it.

A pickle names the functions that are called to load it, and a name that cannot be imported makes it useless. So everything that is moepatch's
(the mixins, their state, the report, the journal) travels as bytes beside the ordinary state of a module, together with the objects of the
ordinary stream that those bytes refer to; and what is called to set the state is looked up among the modules that are imported by then.
"""

from __future__ import annotations

import copy
import importlib
import io
import operator
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

#: Attributes whose names begin so are moepatch's.
OURS = "_moepatch"
#: What bytes of moepatch's refer to and the ordinary stream holds; hooks lie in ordered dicts.
_SHARED = (nn.Module, Tensor, PreTrainedConfig, OrderedDict)


class _Result:
    """Is unpickled as what a call returns, in the place of a function too, for which pickle wants it to look like one."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError


def _if_imported(name: str, otherwise: Any) -> _Result:
    """A function of this module where moepatch is imported at the time of loading, else something that has to do with nothing of it."""
    modules = _Result(operator.attrgetter("modules"), _Result(importlib.import_module, "sys"))
    return _Result(getattr, _Result(operator.methodcaller("get", __name__), modules), name, otherwise)


def packed(value: Any) -> tuple[bytes, list[Any]]:
    """A value as bytes, and what of the ordinary stream it refers to."""
    shared: list[Any] = []
    places: dict[int, int] = {}

    class Packer(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, _SHARED):
                return None
            if id(item) not in places:
                places[id(item)] = len(shared)
                shared.append(item)
            return places[id(item)]

    buffer = io.BytesIO()
    Packer(buffer).dump(value)
    return buffer.getvalue(), shared


def unpacked(data: bytes, shared: list[Any]) -> Any:
    """The opposite of `packed`."""

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, place):
            return shared[place]

    return Unpacker(io.BytesIO(data)).load()


def reduced(module: nn.Module, parts: tuple[tuple[type, ...], type[nn.Module]]) -> tuple[Any, ...]:
    """What pickle is told about a patched module: an object of the class underneath, its ordinary state, and what sets it.

    Args:
        module: patched.
        parts: its mixins and the class underneath.
    """
    mixins, cls = parts
    state = module.__getstate__()
    ordinary = OrderedDict((key, value) for key, value in state.items() if not key.startswith(OURS))
    # An attribute beside the items: whoever sets the ordinary state sees the items alone.
    ordinary.moepatch = packed((mixins, {key: value for key, value in state.items() if key.startswith(OURS)}))
    return operator.methodcaller("__new__", cls), (cls,), ordinary, None, None, _if_imported("revive", _Result(getattr, cls, "__setstate__"))


def revive(module: nn.Module, state: OrderedDict[str, Any]) -> None:
    """Sets the state of a module that `reduced` has written, and patches it again."""
    from .surgery import made_of

    mixins, ours = unpacked(*state.moepatch)
    cls = made_of((mixins, type(module)))
    vars(state).clear()
    module.__setstate__(state)
    vars(module).update(ours)
    module.__class__ = cls
    if module._moepatch_watch is not None:
        module._moepatch_watch.adopt(module)
    module.made_again()


class OnOthers:
    """Base of what moepatch leaves on modules of somebody else's class: it is unpickled as False in a process without moepatch."""

    def __deepcopy__(self, memo: dict[int, Any]):
        memo[id(self)] = made = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        made.copied()
        return made

    def __reduce__(self):
        return _if_imported("made_again", operator.is_), packed((type(self), vars(self)))

    def copied(self) -> None:
        """What is to be done when a copy has been made, or an unpickled one; the modules that it speaks of are complete by then."""


def made_again(data: bytes, shared: list[Any]) -> Any:
    """What `OnOthers` has written."""
    cls, state = unpacked(data, shared)
    made = cls.__new__(cls)
    vars(made).update(state)
    made.copied()
    return made
