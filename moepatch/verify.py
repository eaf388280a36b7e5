"""Runs one site of each pattern against the untouched module: outputs, input gradients, weight gradients.

The rule is three-way: an fp32 run of the family's own code is the truth; in low precision our error against it may be at most 1.5 times
the error of the family's own code in the same precision (for a backend that rounds to less, such as FP8: of that code rounded likewise). Both sides work on copies, so the model's weights and gradients are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import registry, trial
from .errors import NumericMismatch
from .kind import Kind
from .kinds import KINDS
from .match.experts import implementation
from .planning import Pattern
from .replica import replica, size_map, slice_fill
from .trial import Call, Difference

#: Copies are cut to so many experts that their weights stay at about this count; all experts where they fit.
_WEIGHTS_LIMIT = 2**26
#: So many calls are taken together where one alone is over the limit in low precision.
_MORE_TRIALS = 6


@dataclass(frozen=True)
class Verified:
    """The verification of one pattern.

    Attributes:
        pattern: its name.
        fqn: the site that was tried.
        backend: what computed.
        differences: one row per output and gradient; empty if it was not run.
        note: why it was not run, or on how many experts.
    """

    pattern: str
    fqn: str
    backend: str
    differences: tuple[Difference, ...]
    note: str = ""

    @property
    def worst(self) -> Difference | None:
        """The row closest to (or furthest past) its limit; None if nothing was run."""
        return max(self.differences, key=lambda d: d.ours / d.limit if d.ours == d.ours else float("inf"), default=None)

    @property
    def ok(self) -> bool:
        """Whether every row is within its limit."""
        return all(d.ok for d in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{"what": d.what, "ours": d.ours, "theirs": d.theirs, "limit": d.limit} for d in self.differences]
        return {"pattern": self.pattern, "fqn": self.fqn, "backend": self.backend, "ok": self.ok, "note": self.note, "differences": rows}


def verify(model: nn.Module, pattern: Pattern) -> Verified:
    """Tries the first site of a pattern that was just patched.

    Raises:
        NumericMismatch: it computes something else; the message says by how much. The caller rolls back.
    """
    site, spec = pattern.site, pattern.site.spec
    if site.device == "meta":
        return Verified(pattern.name, site.fqn, pattern.backend, (), "not run: the model has no weights yet (meta device)")
    module, kind = model.get_submodule(site.fqn), KINDS[site.kind]
    if kind.trial is None:
        return Verified(pattern.name, site.fqn, pattern.backend, (), "not run: it cannot be tried apart from its model")
    sizes = {} if kind.dense or kind.widths is None else _affordable(kind, spec)
    cut = spec.resized(sizes) if sizes else spec
    device, dtype = torch.device(site.device), getattr(torch, site.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # A backend of a lower precision is compared with the family's own code at that precision.
    rounded = registry.backend(kind.backends, pattern.backend).rounded
    own_path = _own_path(module) if rounded is None else None

    # One copy at a time: a layer's experts may be most of a device's free memory.
    def tried(backend: str | None, as_dtype: torch.dtype, arguments: Call, forward, rounded=None) -> dict[str, torch.Tensor]:
        subject = kind.subject(module, cut, backend, lambda original: replica(original, sizes, slice_fill(as_dtype)))
        subject = subject if rounded is None else rounded(subject)
        return trial.run(subject, arguments, forward=kind.call or (None if kind.stand_in else forward))

    def results(seed: int) -> tuple[dict[str, torch.Tensor], ...]:
        call = kind.trial(cut, dtype, device, torch.Generator().manual_seed(seed))
        truth = tried(None, wide, call.mapped(lambda t: t.to(wide)), trial.eager_forward(module))
        ours = tried(pattern.backend, dtype, call, None)
        return (truth, ours, tried(None, dtype, call, own_path, rounded)) if rounded or dtype != wide else (truth, ours)

    note = "" if not sizes else f"tried on a part of it: {kind.computes(cut).describe()}"
    first = results(0)
    rows = trial.differences(*first)
    if len(first) == 3 and not all(row.ok for row in rows):
        # A gradient of a few numbers is off by luck, the family's or ours: more calls tell luck from error.
        more = [first, *(results(seed) for seed in range(1, _MORE_TRIALS))]
        rows = trial.differences(*({what: torch.cat([r[i][what].flatten() for r in more]) for what in first[0]} for i in range(3)))
        note = f"{note}; {_MORE_TRIALS} calls taken together".removeprefix("; ")
    result = Verified(pattern.name, site.fqn, pattern.backend, tuple(rows), note)
    if not result.ok:
        raise NumericMismatch(_words(result, site.class_name, kind.backends))
    return result


def _own_path(module: nn.Module) -> Callable[..., Any]:
    """How transformers itself computes in low precision: its default experts function where the family has the switch and the machine
    can run it, else the family's forward."""
    if implementation(module) is None or not hasattr(torch.nn.functional, "grouped_mm"):
        return trial.eager_forward(module)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"]


def _affordable(kind: Kind, spec: Any) -> dict[int, int]:
    """Sizes of the copies: the module's own where that is affordable, else fewer experts, and narrower ones if E is also a width."""
    part = kind.computes(spec)
    sizes = kind.widths(spec)
    if part.num_experts * part.params_per_expert <= _WEIGHTS_LIMIT or vars(part).get("identity_experts", 0):
        return {}
    count, (hidden, intermediate) = part.num_experts, sizes
    if count not in (hidden, intermediate, 2 * intermediate):
        return size_map(
            num_experts=count,
            hidden=hidden,
            intermediate=intermediate,
            experts=max(2, _WEIGHTS_LIMIT // part.params_per_expert),
            wide=hidden,
            narrow=intermediate,
        )
    return size_map(num_experts=count, hidden=hidden, intermediate=intermediate, experts=2, wide=min(256, hidden), narrow=min(128, intermediate))


def _words(result: Verified, class_name: str, table: str) -> str:
    bad = [d for d in result.differences if not d.ok]
    rows = "; ".join(f"{d.what} {d.ours:.1e} (limit {d.limit:.1e})" for d in bad)
    return (
        f"{result.fqn} ({class_name}): the backend {result.backend!r} does not compute what the module does. Relative errors: {rows}. "
        f"Everything was rolled back. Choose another backend, for example optimize(model, {table}='reference'), and please report this."
    )
