"""Verdicts of the second witness, kept for modules that are the same in all that a verdict can depend on.

A model has many layers, and a process may see a model many times. The layers of a mixer differ in their number, which only a cache asks for;
whether that is so, the operators of an ordinary call tell.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..trial import Call
from .functions import called_by, functions_of
from .witness import Objection, Witness

_KEPT = 256
_VERDICTS: OrderedDict[tuple, Objection | None] = OrderedDict()
_LOCK = threading.Lock()
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
#: Tells a cache which layer asks.
_INDEX = "layer_idx"


def settled(witness: Witness, kind: tuple, call: Call, calls: Callable[[], Iterable[tuple[str, Call, bool]]]) -> Objection | None:
    """The verdict on a module: the one on an equal module, or a new one.

    Args:
        witness: has seen nothing yet.
        kind: what the calls and the twin depend on beside the module.
        call: an ordinary one.
        calls: makes those of `Witness.objection`.
    """
    key = _key(witness, kind, call)
    with _LOCK:
        if key is not None and key in _VERDICTS:
            return _VERDICTS[key]
    verdict = witness.objection(calls())
    if key is not None:
        with _LOCK:
            _VERDICTS[key] = verdict
            while len(_VERDICTS) > _KEPT:
                _VERDICTS.popitem(last=False)
    return verdict


def _key(witness: Witness, kind: tuple, call: Call) -> tuple | None:
    """Equal for modules that are; None for one that holds what cannot be compared."""
    trace, identity = witness.trace(call), _identity(witness.original)
    key = None if trace is None or identity is None else (kind, identity, trace)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _identity(module: nn.Module) -> tuple | None:
    """Classes, their functions and what these call by name, attributes, shapes, and the same of children."""
    attributes = []
    for name, value in sorted(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules", "training", _INDEX) or name.startswith("_moepatch") or "_hooks" in name:
            continue
        found = _value(value, 3)
        if found is None:
            return None
        attributes.append((name, found))
    functions = tuple(function for part in functions_of(module) for function in (part, part.__code__, *called_by(part)))
    children = tuple((name, None if child is None else _identity(child)) for name, child in module._modules.items())
    if any(child is None for name, child in children if module._modules[name] is not None):
        return None
    shapes = tuple((name, None if t is None else (tuple(t.shape), t.dtype)) for ts in (module._parameters, module._buffers) for name, t in ts.items())
    return type(module), functions, tuple(attributes), shapes, children


def _value(value: Any, depth: int) -> tuple | None:
    """What is equal for equal values; None for what cannot be told apart."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return None if value.is_meta or value.numel() > 64 else (tuple(value.shape), value.dtype, tuple(value.flatten().tolist()))
    if isinstance(value, BuiltinFunctionType) or isinstance(value, FunctionType) and value.__closure__ is None or isinstance(value, type):
        return (value,)
    if isinstance(value, (list, tuple)):
        items = [_value(item, depth) for item in value]
    elif isinstance(value, (set, frozenset)):
        items = [_value(item, depth) for item in sorted(value, key=repr)]
    elif isinstance(value, dict):
        items = [_value((str(key), item), depth) for key, item in value.items()]
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module) and not callable(value):
        items = [_value((key, item), depth - 1) for key, item in sorted(vars(value).items())]
    else:
        return None
    return None if any(item is None for item in items) else (type(value), *items)
