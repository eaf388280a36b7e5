"""Runs one site of each pattern against the untouched module: outputs, input gradients, weight gradients.

The rule is three-way: an fp32 run of the family's own code is the truth; in low precision our error against it may be at most 1.5 times
the error of the family's own code in the same precision (for a backend that rounds to less, such as FP8: of that code rounded likewise).
In fp32 both have to agree; where they do not, float64 is the truth and the same rule says whose error it is. Both sides work on copies, so
the model's weights and gradients are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import registry, trial
from .errors import in_words
from .kind import Kind
from .kinds import KINDS
from .match.experts import implementation
from .planning import Pattern
from .quantized import is_plain
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
        note: why it was not run, or how: on how many experts, with which weights.
        failure: what was raised instead of a result, in words.
        untried: it was the family's own code that failed, so that nothing is known of any backend.
    """

    pattern: str
    fqn: str
    backend: str
    differences: tuple[Difference, ...] = ()
    note: str = ""
    failure: str = ""
    untried: bool = False

    @property
    def worst(self) -> Difference | None:
        """The row closest to (or furthest past) its limit; None if nothing was run."""
        return max(self.differences, key=lambda d: d.ours / d.limit if d.ours == d.ours else float("inf"), default=None)

    @property
    def ok(self) -> bool:
        """Whether nothing failed and every row is within its limit."""
        return not self.failure and all(d.ok for d in self.differences)

    @property
    def missed(self) -> str:
        """What was raised, or what is furthest past its limit; empty if all is well."""
        bad = sorted((d for d in self.differences if not d.ok), key=lambda d: d.ours / d.limit if d.ours == d.ours else float("inf"))
        return self.failure or (f"{_row(bad[-1])}{f' and {len(bad) - 1} more' if bad[1:] else ''}" if bad else "")

    @property
    def missed_whole(self) -> str:
        """The same with everything that is past its limit, and how it was tried."""
        rows = "; ".join(_row(d) for d in self.differences if not d.ok)
        return self.failure or f"relative errors: {rows}{f' [{self.note}]' if self.note else ''}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{"what": d.what, "ours": d.ours, "theirs": d.theirs, "limit": d.limit} for d in self.differences]
        facts = {"pattern": self.pattern, "fqn": self.fqn, "backend": self.backend, "ok": self.ok, "note": self.note}
        return {**facts, "failure": self.failure, "differences": rows}


def _row(d: Difference) -> str:
    return f"{d.what} {d.ours:.1e} (limit {d.limit:.1e})"


def verify(model: nn.Module, pattern: Pattern) -> Verified:
    """Tries the first site of a pattern with its backend. Whether it may stay is for the caller to decide: see `Verified.ok`."""
    site, kind = pattern.site, KINDS[pattern.site.kind]
    result = Verified(pattern.name, site.fqn, pattern.backend)
    if site.device == "meta":
        return replace(result, note="not run: the model has no weights yet (meta device)")
    if kind.trial is None:
        return replace(result, note="not run: it cannot be tried apart from its model")
    trials = _Trials(model.get_submodule(site.fqn), pattern)
    odd = trials.odd_weights()
    if odd:
        trials.fill = _finite_fill
    try:
        rows, note = trials.compared()
        if not all(row.ok for row in rows) and not trials.finite:
            trials.fill, odd = _tame_fill, odd or "with its weights its own results are not finite; tried with weights between -1 and 1"
            rows, note = trials.compared()
    except getattr(torch, "AcceleratorError", ()):
        raise  # the device itself has failed: nothing after this can be trusted
    except _FamilyFails as error:
        return replace(result, failure=str(error), untried=True)
    except Exception as error:  # a library may fail in any way on a shape or a machine that it was not made for
        return replace(result, failure=f"it raised {in_words(error)}")
    return replace(result, differences=tuple(rows), note="; ".join(filter(None, (trials.note, odd, note))))


class _FamilyFails(Exception):
    """The family's own code cannot be run on a trial."""


class _Trials:
    """Calls of one module: as it is patched, as its family computes it in the same precision, and as the truth.

    Attributes:
        note: on what part of the module.
        fill: makes the weights of the copies, from the dtype they are wanted in (None: their own).
        finite: whether the family's own results were, so far.
    """

    def __init__(self, module: nn.Module, pattern: Pattern):
        spec = pattern.site.spec
        self.module, self.backend, self.kind = module, pattern.backend, KINDS[pattern.site.kind]
        self.sizes = {} if self.kind.dense or self.kind.widths is None else _affordable(self.kind, spec)
        self.spec = spec.resized(self.sizes) if self.sizes else spec
        self.device, self.dtype = torch.device(pattern.site.device), getattr(torch, pattern.site.dtype)
        self.note = f"tried on a part of it: {self.kind.computes(self.spec).describe()}" if self.sizes else ""
        # A backend of a lower precision is compared with the family's own code at that precision.
        self.rounded = registry.backend(self.kind.backends, pattern.backend).rounded
        self.fill, self.finite = _own_fill, True

    def compared(self) -> tuple[list[Difference], str]:
        """One row for each result, and how it came to that if one trial was not enough."""
        self.finite = True
        wide = torch.promote_types(self.dtype, torch.float32)
        first = self._results(0, wide)
        if len(first) == 2:
            return trial.arbitrated(*first, self._in_double) if wide == torch.float32 else (trial.differences(*first), "")
        rows = trial.differences(*first)
        if all(row.ok for row in rows) or not self.finite:
            return rows, ""
        # A gradient of a few numbers is off by luck, the family's or ours: more calls tell luck from error.
        more = [first, *(self._results(seed, wide) for seed in range(1, _MORE_TRIALS))]
        rows = trial.differences(*({what: torch.cat([r[i][what].flatten() for r in more]) for what in first[0]} for i in range(3)))
        return rows, f"{_MORE_TRIALS} calls taken together"

    def odd_weights(self) -> str:
        """Where the module holds numbers that are none, and how many; empty if it does not or has no weights of its own."""
        found = [] if self.kind.stand_in else [f"{count} in {name}" for name, t in _floats(self.module) if (count := _not_finite(t))]
        return f"its weights hold NaN or inf: {', '.join(found)}; tried with random numbers in their place" if found else ""

    def _results(self, seed: int, wide: torch.dtype) -> tuple[dict[str, Tensor], ...]:
        """The truth, ours, and in low precision the family's."""
        call = self._call(seed)
        truth = self._theirs(call.mapped(lambda t: t.to(wide)), wide, trial.eager_forward(self.module))
        ours = trial.run(self._subject(self.backend, None), call, forward=self.kind.call)
        if not self.rounded and self.dtype == wide:
            return truth, ours
        return truth, ours, self._theirs(call, None, _own_path(self.module) if self.rounded is None else None, self.rounded)

    def _in_double(self) -> dict[str, Tensor]:
        return self._theirs(self._call(0), torch.float64, trial.eager_forward(self.module))

    def _theirs(self, call: Call, dtype: torch.dtype | None, forward, rounded=None) -> dict[str, Tensor]:
        """What the family computes, with weights of a dtype or their own."""
        try:
            subject = self._subject(None, dtype)
            subject = subject if rounded is None else rounded(subject)
            run = trial.run_in_double if dtype == torch.float64 and self.dtype != dtype else trial.run
            results = run(subject, call, forward=self.kind.call or (None if self.kind.stand_in else forward))
        except getattr(torch, "AcceleratorError", ()):
            raise
        except Exception as error:  # a family's code may fail in any way on a call that is not its own
            raise _FamilyFails(f"its own code cannot be run on a trial ({in_words(error)})") from error
        self.finite = self.finite and all(bool(torch.isfinite(t).all()) for t in results.values())
        return results

    def _subject(self, backend: str | None, dtype: torch.dtype | None) -> nn.Module:
        # One copy at a time: a layer's experts may be most of a device's free memory.
        return self.kind.subject(self.module, self.spec, backend, lambda original: replica(original, self.sizes, self.fill(dtype)))

    def _call(self, seed: int) -> Call:
        return self.kind.trial(self.spec, self.dtype, self.device, torch.Generator().manual_seed(seed))


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that a checkpoint has: others may hold an infinity on purpose, as masks do."""
    return ((name, t) for name, t in module.state_dict().items() if isinstance(t, Tensor) and is_plain(t))


def _not_finite(tensor: Tensor) -> int:
    if not tensor.numel() or all(map(torch.isfinite, torch.aminmax(tensor))):  # without a second tensor of this size
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _own_fill(dtype: torch.dtype | None) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """The module's own numbers. Weights that it keeps in another dtype than the rest stay in that."""
    return lambda tensor, shape: slice_fill(tensor.dtype if dtype is None else dtype)(tensor, shape)


def _finite_fill(dtype: torch.dtype | None) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """The same with random numbers in the place of those that are not finite: the same ones in each copy."""

    def fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        part = slice_fill(tensor.dtype)(tensor, shape)
        if part.is_floating_point():
            finite = torch.isfinite(part)
            noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(part)
            scale = part[finite].abs().mean() if finite.any() else 1 / max(1, part.shape[-1] if part.ndim else 1) ** 0.5
            part = torch.where(finite, part, noise * scale)
        return part if dtype is None or not part.is_floating_point() else part.to(dtype)

    return fill


def _tame_fill(dtype: torch.dtype | None) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Finite numbers that are small enough to be multiplied."""

    def fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        part = _finite_fill(None)(tensor, shape)
        if part.is_floating_point() and part.numel():
            part = part / part.abs().amax().clamp_min(1)
        return part if dtype is None or not part.is_floating_point() else part.to(dtype)

    return fill


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
