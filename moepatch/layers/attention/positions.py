"""Whether a forward pass has several sequences in a row, known without asking the device.

To find packed sequences, transformers looks on the device whether position ids restart, and the host waits for everything that is queued
there: once a step, which keeps it from running ahead. A model that is given no position ids counts them itself, from one end to the other,
and there the answer is known. Hooks on the model say which forward passes those are; position ids that a caller gives are looked at as before.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import masking_utils as hf


class _Forwards(threading.local):
    """The forward passes that this thread is in, the innermost last: the model, and whether it counts the positions itself."""

    def __init__(self):
        self.open: list[tuple[nn.Module, bool]] = []


_FORWARDS = _Forwards()
_LOOK = hf.find_packed_sequence_indices


def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
    """In the place of transformers' function of this name: None at once inside a forward pass whose positions the model has counted."""
    if not torch.compiler.is_compiling() and _FORWARDS.open and _FORWARDS.open[-1][1]:
        return None
    return _LOOK(position_ids)


def register() -> None:
    """Puts the function above in the place of transformers'. For models without `WatchPositions` nothing changes."""
    hf.find_packed_sequence_indices = find_packed_sequence_indices


@dataclass
class WatchPositions:
    """The step that puts the hooks on a model.

    Attributes:
        model: calls transformers' mask functions.
        hooks: while they are on.
    """

    model: nn.Module
    hooks: list[RemovableHandle] = field(default_factory=list)

    def do(self) -> None:
        """Puts them on."""
        self.hooks = [
            self.model.register_forward_pre_hook(_enter, with_kwargs=True),
            self.model.register_forward_hook(_leave, always_call=True),
        ]

    def undo(self) -> None:
        """Takes them off."""
        while self.hooks:
            self.hooks.pop().remove()


def _enter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        # Given by position they would be seen nowhere else: such a call is looked at as before.
        _FORWARDS.open.append((model, len(args) < 2 and kwargs.get("position_ids") is None))


def _leave(model: nn.Module, args: tuple, output: Any) -> None:
    # A hook that failed before ours has kept it from being entered.
    if not torch.compiler.is_compiling() and _FORWARDS.open and _FORWARDS.open[-1][0] is model:
        _FORWARDS.open.pop()
