"""Whether a forward pass has several sequences in a row, known without asking the device.

To find packed sequences, transformers looks on the device whether position ids restart, and the host waits for everything that is queued
there: once a step, which keeps it from running ahead. A model that is given no position ids counts them itself, from one end to the other,
and there the answer is known: such a call runs a copy of the model's forward that does not look. Position ids that a caller gives are looked
at as before.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as hf

from ...stand_in import StandIns
from ...surgery import Patched
from . import PREFIX, name_of


def _no_borders(position_ids: Tensor) -> None:
    """In the place of transformers' function where the positions were counted from one end to the other."""


_COUNTED = StandIns({(hf, "find_packed_sequence_indices"): _no_borders})


class CountedPositions(Patched):
    """A model that asks for attention masks. Its class keeps its name, its forward its signature."""

    _moepatch: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A process that has unpickled a model may not have heard of its attention function."""
        super().__setstate__(state)
        name = self.config._attn_implementation_internal
        if name is not None and name.startswith(PREFIX):
            name_of(name.removeprefix(PREFIX))

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "_moepatch_parts" in vars(cls) and issubclass(cls._moepatch_parts[0], CountedPositions):
            cls.forward = _counting(cls._moepatch_parts[1].forward)


def _counting(forward):
    memory: dict[Any, Any] = {}  # goes with the class

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        forward = super(CountedPositions, self).forward  # as it is now: somebody may have given the class another one
        # Given by position they would be seen nowhere else: such a call is looked at as before.
        if torch.compiler.is_compiling() or len(args) > 1 or kwargs.get("position_ids") is not None or not inspect.ismethod(forward):
            return forward(*args, **kwargs)
        return _COUNTED.remembered(forward.__func__, memory)(self, *args, **kwargs)

    return counted
