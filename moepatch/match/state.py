"""What a module keeps beside its parameters' gradients: attributes, buffers, parameters; and what a call changes of it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Not state: what nn.Module keeps for itself, and what trials write down.
_OWN = frozenset(("_parameters", "_buffers", "_modules", "training"))
_PLAIN = (bool, int, float, str, bytes, type(None))
#: What is looked at in an object that is neither a module nor a container.
_KEPT = (*_PLAIN, Tensor, list, dict, set, deque)
_RANDOM, _RANDOM_TOO = "torch's random state", "Python's random state"


def state_of(module: nn.Module) -> dict[str, Any]:
    """Every attribute, parameter and buffer of a module and its children by name, and the states of random numbers."""
    found: dict[str, Any] = {_RANDOM: torch.get_rng_state(), _RANDOM_TOO: hash(random.getstate())}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        for key, value in vars(part).items():
            if key not in _OWN and "_hooks" not in key and not key.startswith("_moepatch"):
                found[prefix + key] = _frozen(value, ())
        found |= {prefix + key: _frozen(tensor, ()) for tensors in (part._parameters, part._buffers) for key, tensor in tensors.items()}
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What is new or different in the second of two states; what is gone is None."""
    changed = {key: value for key, value in after.items() if key not in before or not same(before[key], value)}
    return changed | {key: None for key in before if key not in after}


def unlike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Words for the first thing that one of two modules changed and the other did not, or otherwise; None if there is none."""
    for key in (*theirs, *(key for key in ours if key not in theirs)):
        if key in theirs and key in ours and same(theirs[key], ours[key], close=True):
            continue
        if key in (_RANDOM, _RANDOM_TOO):
            return "its forward draws random numbers"
        return f"its forward changes {key}" if key in theirs else f"its forward would change {key} when it is patched"
    return None


def same(a: Any, b: Any, close: bool = False) -> bool:
    """Whether two frozen values are equal; `close`: but for rounding in fp32."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        return a.is_meta or torch.equal(a, b) or (close and a.is_floating_point() and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y, close) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or a != a and b != b)


def _frozen(value: Any, above: tuple[int, ...]) -> Any:
    """A value that later changes do not reach."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _PLAIN):
        return value
    if id(value) in above or len(above) > 4:
        return id(value)
    above = (*above, id(value))
    if isinstance(value, (list, tuple, deque)):
        return (type(value).__name__, *(_frozen(item, above) for item in value))
    if isinstance(value, Mapping):
        return (type(value).__name__, *((str(key), _frozen(item, above)) for key, item in value.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, *sorted(map(repr, value)))
    own = None if isinstance(value, nn.Module) or callable(value) else _attributes(value)
    if own is None:
        return id(value)
    # Such as a config, or a record of one's own.
    return (id(value), *((key, _frozen(item, above)) for key, item in own.items() if type(item) in _PLAIN or isinstance(item, _KEPT)))


def _attributes(value: Any) -> dict[str, Any] | None:
    """`vars`, unseen by an object that writes down what it is asked for; None for one that has none."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
