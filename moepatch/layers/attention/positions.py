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
from .sight import LookingModel, looking


def _no_borders(position_ids: Tensor) -> None:
    """In the place of transformers' function where the positions were counted from one end to the other."""


_COUNTED = StandIns({(hf, "find_packed_sequence_indices"): _no_borders})


class CountedPositions(LookingModel):
    """A model that asks for the masks of its attention modules."""

    @staticmethod
    def wrapped(forward):
        """See `LookingModel`."""
        memory: dict[Any, Any] = {}  # goes with the class

        @functools.wraps(forward)
        def counted(self, *args, **kwargs):
            forward = super(CountedPositions, self).forward  # as it is now: somebody may have given the class another one
            # Given by position they would be seen nowhere else: such a call is looked at as before.
            if torch.compiler.is_compiling() or len(args) > 1 or kwargs.get("position_ids") is not None or not inspect.ismethod(forward):
                return looking(forward, *args, **kwargs)
            return looking(_COUNTED.remembered(forward.__func__, memory), self, *args, **kwargs)

        return counted
