"""Readings that a process has made before, of modules that are the same in all that a reading can depend on.

Within a planning, layers share readings by what they are; this is for the next model of a class, which may be much larger to plan than to look at.
Only what could be read is kept. What could not is tried again, for it may be the circumstances that were in the way.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..stand_in import names_in
from .around import Same, around
from .settled import forget_verdicts, identity, value_of

_KEPT = 1024
#: What transformers writes down in a config where it loads it.
_ORIGIN = frozenset(("_name_or_path", "_commit_hash", "transformers_version"))
#: By what is equal: specs.
_READINGS: OrderedDict[tuple, Any] = OrderedDict()
_LOCK = threading.Lock()


def known(kind: str, module: nn.Module, read: Callable[..., Any], *args: Any, of: Iterable[Any] = ()) -> Any:
    """``read(module, *args)``, or what that gave for an equal module.

    Args:
        kind: names what is read.
        module: its weights do not matter.
        read: a function of its arguments alone. A reason in words, which it may return, is not kept.
        of: what the result depends on beside the module, in the place of `args`.
    """
    key = _key(kind, module, read, tuple(of))
    with _LOCK:
        if key in _READINGS:
            _READINGS.move_to_end(key)
            return _READINGS[key]
    reading = read(module, *args)
    if key is not None and not (reading is None or isinstance(reading, str) or isinstance(reading, tuple) and isinstance(reading[0], str)):
        with _LOCK:
            _READINGS[key] = reading
            while len(_READINGS) > _KEPT:
                _READINGS.popitem(last=False)
    return reading


def forget() -> None:
    """Begins anew, as a process does: what has been read, and the verdicts of the second witness."""
    with _LOCK:
        _READINGS.clear()
    forget_verdicts()


def _key(kind: str, module: nn.Module, read: Callable[..., Any], of: tuple) -> tuple | None:
    """Equal for readings that are; None where that cannot be told."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None  # somebody watches, or tensors are none
    configs: list[PreTrainedConfig] = []
    of_module = identity(module, configs, indexed=True)
    of_configs = [value_of(_said(config), 5) for config in configs]
    if of_module is None or None in of_configs:
        return None
    named = tuple(Same(read.__globals__[name]) for name in names_in(read.__code__) if name in read.__globals__)
    key = (kind, of, of_module, tuple(of_configs), module.training, named, around(module, configs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _said(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config, but for where it is from and for configs in it, which are asked themselves."""
    return {name: None if isinstance(value, PreTrainedConfig) else value for name, value in vars(config).items() if name not in _ORIGIN}

