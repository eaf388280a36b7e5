"""Models that notice a choice of the function that computes experts, also of the one that stood before the patch.

The configuration keeps the name of that function. A patched module knows its name from any that is set later by which string object it is
(see `watch`), so that the configuration reads as it did, and a name that was read before and is put back, as `generate` does, is no choice.
transformers does not set the name that is there: for `set_experts_implementation` with an equal one, that is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from .surgery import Patched
from .watch import EXPERTS_CHOICE


class Choosing:
    """Mixed into the classes of patched ``PreTrainedModel``s."""

    def set_experts_implementation(self, experts_implementation: str | dict[str, str], *args, **kwargs):
        """As transformers' own: the user's choice, which patched experts leave their work to."""
        super().set_experts_implementation(experts_implementation, *args, **kwargs)
        for config, name in _chosen(self, experts_implementation):
            if config is not None and vars(config).get(EXPERTS_CHOICE) == name:
                vars(config)[EXPERTS_CHOICE] = name


def _chosen(model: PreTrainedModel, asked: str | dict[str, str]) -> Iterator[tuple[Any, str]]:
    """Configurations and the names that are asked for."""
    if isinstance(asked, dict):
        yield from ((getattr(model.config, key, None) if key else model.config, name) for key, name in asked.items())
    else:
        yield from ((part.config, asked) for part in model.modules() if isinstance(part, PreTrainedModel))


class PatchedPart(Choosing, Patched):
    """A ``PreTrainedModel`` inside a patched one."""

    _moepatch: str
