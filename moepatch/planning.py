"""The plan: which modules get which backend, and why. A value that prints, becomes JSON, can be edited and passed back in."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import registry
from .errors import BackendUnavailable, PlanMismatch
from .kinds import KINDS
from .match.near import near_misses
from .match.suspects import expert_signs, suspects
from .needs import best_device
from .progress import counted
from .scan import Scan
from .site import Left, Refusal, Site
from .stored import advised
from .work import Share, Work, work_of

SCHEMA_VERSION = 1

_BY_CALLER = "chosen by the caller"
#: Reasons for which a pattern has no backend because the caller wanted it so.
_ASKED = ("dense=False", _BY_CALLER, "a backend has to be asked for by name")
#: How closely the patched model has to follow the family's own rounding.
NUMERICS = ("exact", "relaxed")


def backend_options() -> tuple[str, ...]:
    """What may be chosen with ``optimize(model, experts="reference")``: the tables of backends of all kinds."""
    return tuple(dict.fromkeys(kind.backends for kind in KINDS.values()))


@dataclass(frozen=True)
class Choice:
    """One backend as seen from one pattern: available, or why not."""

    backend: str
    why_not: str | None


@dataclass(frozen=True)
class Pattern:
    """All sites that compute the same thing, and what they will get.

    Attributes:
        sites: equal but for their names.
        backend: the chosen one, or None to leave these modules alone.
        why: the reason for the choice.
        choices: every backend of the table with its availability.
    """

    sites: tuple[Site, ...]
    backend: str | None
    why: str
    choices: tuple[Choice, ...]

    @property
    def site(self) -> Site:
        """The first site, which stands for all."""
        return self.sites[0]

    @property
    def name(self) -> str:
        """Kind and layout, for tables."""
        kind, layout = KINDS[self.site.kind], self.site.spec.to_dict().get("layout")
        return kind.pattern if layout is None else f"{kind.pattern}: {layout}"

    @property
    def fqns(self) -> tuple[str, ...]:
        """The names of all modules of the pattern, shared ones once."""
        return tuple(site.fqn for site in self.sites)

    @property
    def by_caller(self) -> bool:
        """Whether the caller has named the backend, or left these modules alone."""
        return self.why == _BY_CALLER

    @property
    def available(self) -> tuple[str, ...]:
        """The backends that can serve on this machine, but for the reference."""
        return tuple(choice.backend for choice in self.choices if choice.why_not is None and choice.backend != "reference")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        site = self.site
        return {
            "pattern": self.name,
            "kind": site.kind,
            "count": len(self.sites),
            "class": site.class_name,
            "spec": site.spec.to_dict(),
            "dtype": site.dtype,
            "device": site.device,
            "now": site.now,
            "planned": self.backend,
            "why": self.why,
            "choices": {c.backend: c.why_not or "available" for c in self.choices},
            "fqns": list(self.fqns),
        }


@dataclass(frozen=True)
class Plan:
    """What `optimize` would do to one model.

    Attributes:
        model_class: the model's class name.
        patterns: what is patched, the mixture of experts first.
        refusals: what looks like MoE and is left alone, with reasons.
        left: what is nearly of a kind and is left alone, with reasons.
        work: what each site would patch of a step; `share` sums it up.
        signs: what in the model speaks of experts, in words, if it does.

    >>> print(moepatch.plan(model))                                    # doctest: +SKIP
    >>> moepatch.optimize(model, plan=moepatch.plan(model).without("model.layers.0.mlp.experts"))   # doctest: +SKIP
    """

    model_class: str
    patterns: tuple[Pattern, ...]
    refusals: tuple[Refusal, ...]
    left: tuple[Left, ...] = ()
    work: Work = Work()
    signs: str | None = None

    def without(self, *fqns: str) -> Plan:
        """The plan with these modules left alone.

        Raises:
            PlanMismatch: a name that no pattern has.
        """
        known = [fqn for pattern in self.patterns for site in pattern.sites for fqn in site.fqns]
        for fqn in fqns:
            if fqn not in known:
                raise PlanMismatch(f"The plan has no module named {fqn!r}.{_suggest(fqn, known)}")
        kept = (replace(p, sites=tuple(s for s in p.sites if not set(s.fqns) & set(fqns))) for p in self.patterns)
        return replace(self, patterns=tuple(p for p in kept if p.sites))

    def with_backends(self, **tables: str | None) -> Plan:
        """The plan with the backend of every pattern of a table chosen by name, for example ``experts="reference"``; None leaves them alone.

        Raises:
            BackendUnavailable: it does not exist, or cannot serve; the message says why.
            PlanMismatch: there is no such table, or a backend is chosen where the plan has no module of its table.
        """
        for table in tables:
            if table not in backend_options():
                raise PlanMismatch(f"optimize() has no option {table!r}.{_suggest(table, backend_options())} Options are: {', '.join(backend_options())}.")
        patterns = list(self.patterns)
        for table, name in tables.items():
            at = [i for i, p in enumerate(patterns) if KINDS[p.site.kind].backends == table]
            if name is not None:
                registry.backend(table, name)  # a name that nobody has is an error of its own
                if not at:
                    raise self._without_effect(table, name)
            asked = [_with_backend(patterns[i], name) for i in at]
            # The dense half has many patterns, of which a library serves some: those that it does not serve keep theirs.
            refused = [a for a in asked if isinstance(a, BackendUnavailable)]
            if refused and (len(refused) == len(asked) or not KINDS[patterns[at[0]].site.kind].dense):
                raise refused[0]
            for i, answer in zip(at, asked, strict=True):
                patterns[i] = answer if isinstance(answer, Pattern) else replace(patterns[i], why=f"not the one asked for: {answer}")
        given_up = {table for table, name in tables.items() if name is None}
        near = tuple(n for n in self.left if n.kind not in KINDS or KINDS[n.kind].backends not in given_up)
        return replace(self, patterns=tuple(patterns), left=near)

    def _without_effect(self, table: str, name: str) -> PlanMismatch:
        """The error for a backend that was asked for where the plan has no module of its table; says what there is instead."""
        unmade = f", or the plan was made without {table}=" if any(kind.on_request and kind.backends == table for kind in KINDS.values()) else ""
        has = ", ".join(dict.fromkeys(KINDS[p.site.kind].backends for p in self.patterns)) or "no kind"
        refused = "".join(f" {refusal.fqn} is refused: {refusal.reason}." for refusal in self.refusals[:1])
        return PlanMismatch(
            f"The plan has nothing that {table}={name!r} could serve: no module of that kind that moepatch takes{unmade}. It has modules of: {has}.{refused} "
            f"Without {table}= the report says what is left alone, and why."
        )

    def without_dense(self) -> Plan:
        """The plan with everything but the mixture of experts left alone."""
        kept = tuple(replace(p, backend=None, why="dense=False") if KINDS[p.site.kind].dense else p for p in self.patterns)
        return replace(self, patterns=kept, left=self.mixture_left)

    @property
    def share(self) -> Share:
        """How much of a step the plan patches: see `moepatch.work`."""
        return self.work.share(site for p in self.patterns if p.backend is not None for site in p.sites)

    @property
    def mixture_left(self) -> tuple[Left, ...]:
        """The near misses that would be part of a mixture of experts."""
        return tuple(near for near in self.left if near.kind in KINDS and not KINDS[near.kind].dense)

    @property
    def unserved(self) -> tuple[Pattern, ...]:
        """The patterns that are left alone though nobody asked for that."""
        return tuple(p for p in self.patterns if p.backend is None and p.why not in _ASKED)

    @property
    def mixture(self) -> tuple[Pattern, ...]:
        """The patterns that are part of a mixture of experts."""
        return tuple(p for p in self.patterns if not KINDS[p.site.kind].dense)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_json` reads what this writes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model_class": self.model_class,
            "patterns": [p.to_dict() for p in self.patterns],
            "refusals": [r.to_dict() for r in self.refusals],
            "left": [near.to_dict() for near in self.left],
            "share": self.share.to_dict(),
        }

    def to_json(self) -> str:
        """The plan as JSON text. Edit ``planned`` (a backend's name, or null to leave modules alone) or ``fqns`` and read it back."""
        return json.dumps(self.to_dict(), indent=2)

    def edited(self, text: str) -> Plan:
        """This plan with the choices of an edited JSON text.

        Raises:
            PlanMismatch: the text names modules or patterns that this plan does not have.
        """
        data = json.loads(text)
        by_fqn = {fqn: entry["planned"] for entry in data["patterns"] for fqn in entry["fqns"]}
        known = [fqn for pattern in self.patterns for fqn in pattern.fqns]
        for fqn in by_fqn:
            if fqn not in known:
                raise PlanMismatch(f"The edited plan names {fqn!r}, which this model's plan does not have.{_suggest(fqn, known)}")
        patterns = []
        for pattern in self.patterns:
            for backend in dict.fromkeys(by_fqn[fqn] for fqn in pattern.fqns if by_fqn.get(fqn) is not None):
                sites = tuple(s for s in pattern.sites if by_fqn.get(s.fqn) == backend)
                chosen = replace(pattern, sites=sites)
                if backend != pattern.backend:
                    table = KINDS[pattern.site.kind].backends
                    (chosen,) = replace(self, patterns=(chosen,)).with_backends(**{table: backend}).patterns
                patterns.append(chosen)
        return replace(self, patterns=tuple(patterns))

    def __str__(self) -> str:
        from .render.terminal import text_of_plan

        return text_of_plan(self)

    def _repr_html_(self) -> str:
        from .render.html import html_of_plan

        return html_of_plan(self)

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """IPython's plain text: what `print` shows, not the fields of a dataclass."""
        printer.text(str(self))


def make_plan(
    model: nn.Module, overrides: Mapping[str, str | None] | None = None, numerics: str = "exact", asked: Collection[str] = ()
) -> Plan:
    """Scans and matches `model` and chooses a backend for every pattern. Changes nothing.

    Kinds that exist on request are part of it if their table is in `overrides` or `asked`.

    Raises:
        PlanMismatch: `numerics` is neither ``exact`` nor ``relaxed``, or an override names no table or one without modules.
        BackendUnavailable: an override that cannot serve.
    """
    if numerics not in NUMERICS:
        raise PlanMismatch(f"numerics is {numerics!r}; it can be {' or '.join(NUMERICS)}.")
    scan = Scan(model)
    with counted(registry.matchers(), "matching", lambda matcher: matcher.name) as turns:
        sites, refusals, left = match(scan, {*asked, *(overrides or ())}, turns)
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        groups.setdefault((site.kind, site.spec, site.class_name, site.now, site.dtype, site.device), []).append(site)
    patterns = sorted((_choose(tuple(group), numerics) for group in groups.values()), key=lambda p: KINDS[p.site.kind].dense)
    work = work_of(scan, sites, refusals, left)
    plan = Plan(type(model).__name__, tuple(patterns), tuple(advised(refusals, model)), tuple(left), work, expert_signs(model))
    return plan.with_backends(**overrides) if overrides else plan


def spreadable(model: nn.Module, plan: Plan) -> Plan:
    """The plan for a mesh: modules whose experts would lose something if they were spread over ranks are refused, each for its reason."""
    lost = {
        site: reason
        for pattern in plan.patterns if pattern.backend is not None
        for site in pattern.sites if (reason := KINDS[site.kind].why_not_spread(model.get_submodule(site.fqn), site.spec, model)) is not None
    }  # fmt: skip
    hint = "It keeps its own forward, and its weights are sharded like all others."
    refusals = tuple(Refusal(fqns=site.fqns, class_name=site.class_name, reason=reason, hint=hint) for site, reason in lost.items())
    return replace(plan.without(*(site.fqn for site in lost)), refusals=(*plan.refusals, *refusals)) if lost else plan


def match(
    scan: Scan, asked: Collection[str] = (), matchers: Iterable[registry.Matcher] | None = None
) -> tuple[list[Site], list[Refusal], list[Left]]:
    """Asks the matchers about every module. Modules inside a site belong to it; only matchers that look around are asked about its holders.

    A matcher that nearly took a module answers `Left`; that stands unless another one takes the module. Kinds that exist on request are
    answered for if their table is in `asked`.
    """

    def wanted(kind: str) -> bool:
        return kind not in KINDS or not KINDS[kind].on_request or KINDS[kind].backends in asked

    memo: dict = {}
    answers: dict[int, Site | Refusal] = {}
    near: dict[int, Left] = {}
    inside: set[int] = set()
    holding: set[int] = set()
    hollow = _hollow(scan)
    for matcher in registry.matchers() if matchers is None else matchers:
        for found in scan:
            key = id(found.module)
            if key in answers or key in hollow or not matcher.around and (key in inside or key in holding):
                continue
            answer = registry.asked(matcher, found, scan, memo)
            if isinstance(answer, Left) and wanted(answer.kind):
                near.setdefault(key, answer)
            if answer is None or isinstance(answer, Left) or isinstance(answer, Site) and not wanted(answer.kind):
                continue
            answers[key] = answer
            if not matcher.around:
                inside |= {id(m) for m in found.module.modules()}
                holding |= scan.above(found)
    in_order = [answers[id(found.module)] for found in scan if id(found.module) in answers]
    settled = {key for key, answer in answers.items() if isinstance(answer, Refusal) or not KINDS[answer.kind].dense}
    refusals = [a for a in in_order if isinstance(a, Refusal)] + suspects(scan, settled, near)
    # What is refused keeps its own forward, whole.
    alone = tuple(f"{fqn}." for refusal in refusals for fqn in refusal.fqns)
    sites = [a for a in in_order if isinstance(a, Site) and not (KINDS[a.kind].dense and f"{a.fqn}.".startswith(alone))]
    return sites, refusals, near_misses(scan, sites, refusals, [n for key, n in near.items() if key not in answers and not _refused(n, refusals)])


def _hollow(scan: Scan) -> set[int]:
    """The ids of modules with a weight of no numbers somewhere: nothing can be found out by trying them. Models are not tried."""
    empty = [found for found in scan if any(p is not None and p.numel() == 0 for p in found.module._parameters.values())]
    models = {id(found.module) for found in scan if isinstance(found.module, PreTrainedModel)}
    ids = {id(found.module) for found in empty}.union(*map(scan.above, empty))
    return ids - models


def _refused(near: Left, refusals: list[Refusal]) -> bool:
    """Whether experts are refused inside of a block that was nearly taken, for its reason."""
    return near.kind in KINDS and not KINDS[near.kind].dense and any(r.reason == near.reason for r in refusals)


def _choose(sites: tuple[Site, ...], numerics: str) -> Pattern:
    site, kind = sites[0], KINDS[sites[0].kind]
    dtype, device = getattr(torch, site.dtype), torch.device(site.device)
    # A model on the meta device will run somewhere else: the question is then what this machine could do.
    device = best_device() if device.type == "meta" else device
    spec = kind.computes(site.spec)
    choices = tuple(Choice(b.name, registry.reason_against(b, spec, dtype, device) or _inexact(b, spec, numerics)) for b in registry.backends(kind.backends))
    best = next((c.backend for c in _automatic(site, choices) if c.why_not is None), None)
    return _with_best(sites, choices, best)


def serving(pattern: Pattern, order: Sequence[str] = ()) -> list[str]:
    """The backends that could take the place of a pattern's, the preferred first.

    Args:
        order: the preferred ones; those that are not in it follow by rank.
    """
    names = [c.backend for c in _automatic(pattern.site, pattern.choices) if c.why_not is None and c.backend != pattern.backend]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def next_best(pattern: Pattern, why_not: str, names: Sequence[str]) -> Pattern:
    """The pattern without the backend that it has, and why; with the first of others (see `serving`), or with none."""
    choices = tuple(replace(c, why_not=why_not) if c.backend == pattern.backend else c for c in pattern.choices)
    return _with_best(pattern.sites, choices, names[0] if names else None)


def _automatic(site: Site, choices: tuple[Choice, ...]) -> list[Choice]:
    """Those that need not be asked for by name."""
    ranks = {b.name: b.rank for b in registry.backends(KINDS[site.kind].backends)}
    return [c for c in choices if ranks[c.backend] >= 0]


def _with_best(sites: tuple[Site, ...], choices: tuple[Choice, ...], best: str | None) -> Pattern:
    """The pattern with a backend, and what stood in the way of those that would have been preferred."""
    automatic = _automatic(sites[0], choices)
    if not automatic:
        return Pattern(sites, None, "a backend has to be asked for by name", choices)
    if best is None:
        return Pattern(sites, None, "no backend can serve it: " + "; ".join(f"{c.backend}: {c.why_not}" for c in choices if c.why_not), choices)
    before = itertools.takewhile(lambda c: c.backend != best, automatic)
    passed = [f"{c.backend}: {c.why_not}" for c in before if c.why_not]
    return Pattern(sites, best, "; ".join(["ok"] if not passed else ["fallback", *passed]), choices)


def _inexact(backend: registry.Backend, spec: Any, numerics: str) -> str | None:
    return None if numerics == "relaxed" or backend.exact(spec) else "rounds elsewhere than this module does (numerics='relaxed' allows it)"


def _with_backend(pattern: Pattern, name: str | None) -> Pattern | BackendUnavailable:
    """The pattern with the backend that the caller asked for, or why it cannot have it."""
    if name is not None:
        why_not = next(c.why_not for c in pattern.choices if c.backend == name)
        if why_not is not None:
            return BackendUnavailable(f"{pattern.site.fqn}: the backend {name!r} cannot serve {pattern.site.spec.describe()}: {why_not}.")
    return replace(pattern, backend=name, why=_BY_CALLER)


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
