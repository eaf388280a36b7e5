"""Readings are kept for all layers that are equal but for their index, where the index is only handed on, to a cache.

Whether it is, a run of the scale model shows, with an index that writes down whatever is asked of it.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import trial
from .probe import fingerprint
from .roles import StandIn

_NAME = "layer_idx"


class _Index(StandIn):
    """In place of the number of a layer. It can be handed on, and nothing else goes unseen."""

    @property
    def __class__(self):
        return self.moepatch_look("__class__")

    def __hash__(self):
        return self.moepatch_look("__hash__")

    def __str__(self):
        return self.moepatch_look("__str__")

    def __repr__(self):
        return self.moepatch_look("__repr__")

    def __format__(self, form):
        return self.moepatch_look("__format__")


def is_handed_on(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether nothing but a cache asks for the index of a layer.

    Args:
        model: a scale model, which gets its own index back.
        run: calls it in all ways that have a reading; it looks at no attributes of the model itself.
    """
    if _NAME not in vars(model):
        return True
    own, index = model.layer_idx, _Index(_NAME)
    vars(model)[_NAME] = index
    try:
        run()
    except Exception:  # then it is not known
        return False
    finally:
        vars(model)[_NAME] = own
    return not index.moepatch_looks


def remembered(memo: dict, kind: tuple, module: nn.Module, read: Callable[[], tuple[Any, bool]]) -> Any:
    """What is read of a module: kept from an equal one, or new.

    Args:
        memo: of one planning.
        kind: what the reading depends on beside the module.
        read: a spec, and whether the index is only handed on; or the reason why there is none.
    """
    equal, full = (*kind, _without_index(module)), (*kind, fingerprint(module))
    found = next((memo[key] for key in (equal, full) if key in memo), memo)
    if found is memo:
        found, handed_on = read()
        memo[equal if handed_on else full] = found
    return found


def looks_once(module: nn.Module) -> bool:
    """Whether the forward names the index at most once, as it does for a cache; good enough where nothing is patched."""
    return sum(i.argval == _NAME for i in dis.get_instructions(trial.eager_forward(module))) <= 1


def _without_index(module: nn.Module) -> tuple:
    cls, plain, *rest = fingerprint(module)
    return cls, tuple(item for item in plain if item[0] != _NAME), *rest
