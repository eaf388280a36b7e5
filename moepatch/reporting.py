"""What was done to a model: kept on the model, printed as text or HTML, read as a dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .kinds import KINDS
from .planning import SCHEMA_VERSION, Plan
from .quantized import kept_inside
from .regional import LayerGraphs
from .verify import Verified


@dataclass(frozen=True)
class Report:
    """The result of `optimize`.

    Attributes:
        plan: what was patched, with what, what was left alone and why, and (``plan.share``) how much of a step that is.
        verified: one entry per pattern; empty with ``verify=False``.
        notes: what else the user should know.
        seconds: how long each step of the road took.
        compiled: for each class of compiled layers the graphs so far; they fill while the model runs.
    """

    plan: Plan
    verified: tuple[Verified, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    compiled: tuple[LayerGraphs, ...] = ()

    @property
    def patched(self) -> int:
        """How many modules are patched."""
        return sum(len(p.sites) for p in self.plan.patterns if p.backend is not None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "patched": self.patched,
            **{k: v for k, v in self.plan.to_dict().items() if k != "schema_version"},
            "verified": [v.to_dict() for v in self.verified],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "compiled": [graphs.to_dict() for graphs in self.compiled],
        }

    def __str__(self) -> str:
        from .render.terminal import text_of_report

        return text_of_report(self)

    def _repr_html_(self) -> str:
        from .render.html import html_of_report

        return html_of_report(self)

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """IPython's plain text: what `print` shows."""
        printer.text(str(self))


def quantized_since(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """What has been quantized of the modules of a plan since it was carried out, one note for each class and form."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[str, str], list[str]] = {}
    for pattern in plan.patterns:
        kind = KINDS[pattern.site.kind]
        if pattern.backend is None or kind.only_itself or kind.stand_in is not None:
            continue  # that computes with nobody's weights, or with those of norms that are sites of their own
        for site in pattern.sites:
            words = kept_inside(modules[site.fqn]) if site.fqn in modules else None
            if words is not None:
                found.setdefault((site.class_name, words), []).append(site.fqn)
    notes = []
    for (name, words), fqns in found.items():
        others = f" and {len(fqns) - 1} more" if fqns[1:] else ""
        notes.append(f"{fqns[0]}{others} ({name}): quantized since the patch, and what is runs the family's own code ({words})")
    return tuple(notes)
