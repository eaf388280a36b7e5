"""Layers that run one after the other on the same tokens, so that ranks tell each other how many only once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Turn(NamedTuple):
    """What a rank says of one dispatch.

    Attributes:
        chain: whose it is; None if it is by itself.
        begins: whether nothing that was announced before is for it.
        follow: how many dispatches after this one will have the same number of tokens.
    """

    chain: Chain | None = None
    begins: bool = True
    follow: int = 0


ALONE = Turn()


@dataclass(eq=False)
class Chain:
    """The mixtures of experts of one list of layers, in their order.

    A rank announces a number for the whole list if it had one number for all of it the last time, and has never had several. What runs
    otherwise (layers by themselves, left out, or again in a backward pass) is asked one by one.

    Attributes:
        length: how many there are.
    """

    length: int
    _next: int = 0
    _tokens: int = 0
    _varies: bool = False
    _steady: bool = False

    def turn(self, place: int, tokens: int) -> Turn:
        """The turn of the layer at `place`, with so many tokens."""
        if torch._C._current_graph_task_id() != -1:  # recomputed for a backward pass
            return ALONE
        if place == 0:
            self._steady = self._steady and self._next == self.length
            self._next, self._tokens = 1, tokens
            return Turn(self, True, self.length - 1 if self._steady else 0)
        if place != self._next:
            self._steady, self._next = False, -1
            return ALONE
        self._next += 1
        self._varies = self._varies or tokens != self._tokens
        if self._next == self.length:
            self._steady = not self._varies
        return Turn(self, False)
