"""What `moepatch.record_routing` gives: tokens per expert and layer, as numbers, as text, as HTML and as a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from .render.routing import figure_of_routing, html_of_routing, text_of_routing


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of one layer were spread.

    Attributes:
        name: of the module.
        tokens_E: for each expert, how many tokens it got.
    """

    name: str
    tokens_E: Tensor

    @property
    def tokens(self) -> int:
        """Tokens times experts per token."""
        return int(self.tokens_E.sum())

    @property
    def entropy(self) -> float:
        """1 if all experts have the same load, 0 if one has everything."""
        share_E = self.tokens_E.double() / max(1, self.tokens)
        return float(-(share_E * share_E.clamp(min=1e-300).log()).sum()) / math.log(max(2, len(share_E)))

    @property
    def max_over_mean(self) -> float:
        """The load of the fullest expert over the mean."""
        return float(self.tokens_E.max()) * len(self.tokens_E) / max(1, self.tokens)

    @property
    def dead(self) -> int:
        """How many experts got nothing."""
        return int((self.tokens_E == 0).sum())

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        measures = {"entropy": round(self.entropy, 4), "max_over_mean": round(self.max_over_mean, 3), "dead": self.dead}
        return {"layer": self.name, "tokens": self.tokens, "experts": len(self.tokens_E), **measures}


@dataclass
class RoutingRecord:
    """Tokens per expert and layer: prints as a table, and as one with a strip of loads in notebooks.

    Attributes:
        names: of the layers.
        counts: for each layer ``[E + 1]``, on its device; the last entry is of ids that mean no expert.
    """

    names: tuple[str, ...]
    counts: list[Tensor] = field(repr=False)

    @property
    def layers(self) -> tuple[LayerLoad, ...]:
        """The loads, on the host: reading them waits for the device."""
        return tuple(LayerLoad(name, counts[:-1].cpu()) for name, counts in zip(self.names, self.counts, strict=True))

    def table(self) -> list[dict[str, object]]:
        """One row per layer: tokens, experts, entropy (1 is even), load of the fullest expert over the mean, dead experts."""
        return [layer.to_dict() for layer in self.layers]

    def all_reduce(self) -> RoutingRecord:
        """The counts of all ranks together; every rank has to call it. Returns the same object."""
        for counts in self.counts:
            dist.all_reduce(counts)
        return self

    def heatmap(self):
        """Layers × experts as a matplotlib figure; colours are loads over the layer's mean.

        Raises:
            MoePatchError: matplotlib is not installed.
        """
        return figure_of_routing(self.layers)

    def __str__(self) -> str:
        return text_of_routing(self.layers)

    def _repr_html_(self) -> str:
        return html_of_routing(self.layers)
