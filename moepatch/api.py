"""The road, from top to bottom: scan → match → plan → check → apply → verify → Report; and back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from . import planning
from .carrying_out import Done, carry_out, timed
from .check import check_model, check_plan
from .dispatch.base import Dispatcher
from .errors import LeftAlone, MoePatchError, NothingMatched, PlanMismatch
from .experts.expert_list import PatchedExpertList
from .experts.listed import HELD
from .frameworks import called, own_forwards, shadowed
from .kinds import KINDS
from .layers.attention.sight import choices
from .layout.adjacent import Adjacent
from .match.attention_function import left_alone
from .measure import agreed, fastest, is_measured
from .parallel.agree import together
from .parallel.apply import Dispatch, choose_dispatch, why_whole
from .parallel.memory import why_not_whole
from .parallel.mesh import in_order
from .pickling import OnOthers
from .plainly import runs_plainly
from .planning import Plan
from .regional import layer_graphs
from .render import words
from .reporting import Report, quantized_since
from .surgery import Journal, Patched

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Patch(OnOthers):
    """What stays with a patched model. Plain attributes, so that deepcopy and pickle follow the references to modules."""

    report: Report
    journal: Journal
    mesh: DeviceMesh | None = None
    forwards: dict[str, Any] = field(default_factory=dict)  #: that instances had of their own before it

    def copied(self) -> None:
        """Weights that the copy of the model has apart lie together again."""
        for step in self.journal.steps if self.mesh is None else ():
            if isinstance(step, Adjacent):
                step.copied()


@runs_plainly
def optimize(
    model: Model,
    mesh: DeviceMesh | None = None,
    *,
    plan: Plan | None = None,
    verify: bool = True,
    fsdp: bool = True,
    dispatch: str | Callable[[ProcessGroup, int], Dispatcher] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dense: bool = True,
    numerics: str = "exact",
    measure: bool = True,
    compile: str | None = None,
    strict: bool = False,
    **overrides: str | None,
) -> Model:
    """Makes a loaded model fast, in place: its mixture of experts, and with it the dense half of the model.

    Args:
        model: as ``from_pretrained`` returns it; on any device. A model on the meta device is patched without verification.
        mesh: None on one device. Else a DeviceMesh with dims out of ``dp_replicate``, ``dp_shard`` and ``ep`` (see `make_mesh`), and every
            rank calls `optimize` with the same model: experts are spread over `ep`, everything is sharded by FSDP2, and gradients are
            those of the mean of the ranks' losses.
        plan: an edited plan from `plan(model)`; made here if None.
        verify: try one module of each pattern against the untouched one. Where they differ, the next backend is tried, and where none fits the
            modules of that pattern keep the family's code; the report says so.
        fsdp: with a mesh, shard dense parameters too. With False they stay whole, and averaging their gradients is up to you.
        dispatch: with a mesh, the name of the dispatcher (`moepatch doctor` lists them), or a function ``(group, num_experts)`` that makes
            one, such as ``functools.partial(DeepEP, num_sms=24)``. Chosen if None; the report's notes say why.
        optimizer: if given, it is checked that it does not hold parameters that are about to be patched.
        dense: patch norms, attention, dense MLPs, mixers and the loss as well. A model without a mixture of experts gets these alone.
        numerics: ``"relaxed"`` allows backends that round elsewhere than the family's own code (a norm that multiplies by its weight in
            fp32 where the family does so in bf16).
        measure: on a GPU, time the backends that can serve a pattern and take the fastest. Done once for each shape; results are kept in
            ``$MOEPATCH_CACHE``, else in the user's cache directory.
        compile: ``"regional"`` compiles every decoder layer with ``torch.compile``, in place. Norms, residual sums, rope and dense MLPs are plain
            torch then, which it fuses by itself; the report counts its graphs.
        strict: raise instead of leaving anything alone for a reason of its own: what is refused, what is nearly of a kind, and what no backend
            serves. What the caller leaves alone (``dense=False``, ``loss=None``, a plan without it) is no reason to raise.
        overrides: a backend by table, for example ``experts="reference"``, which has to serve something; None leaves that table's modules
            alone (``loss=None``).

    Returns:
        The same object. `report(model)` says what was done; `restore(model)` undoes it.

    Raises:
        NothingMatched: there is nothing in the model that moepatch can serve.
        LeftAlone: with ``strict=True``, something would be left alone; the message says what and why.
        CheckFailed: the model must not be changed as it is (wrapped, quantized, offloaded, compiled, …).
        NumericMismatch: a backend that was asked for by name computes something else than the module does.
        MoePatchError: all others that a user can cause. Whatever is raised, the model is as it was.

    >>> model = moepatch.optimize(model)          # doctest: +SKIP
    """
    if isinstance(model, nn.Module) and patch_of(model) is not None:
        return _again(model)
    if compile not in (None, "regional"):
        raise MoePatchError(f"compile is {compile!r}; it can be 'regional' (every decoder layer by itself) or None.")
    if mesh is None and dispatch is not None:
        why = "moves tokens between the ranks of a mesh, and there is none: optimize(model, moepatch.make_mesh(ep=…), …)."
        raise MoePatchError(f"dispatch={dispatch!r} {why}")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise MoePatchError(f"optimizer is {optimizer!r}; it can be the optimizer of a training loop, whose parameters are then looked at, or None.")
    if not isinstance(plan, Plan | None):
        raise MoePatchError(f"plan is a {type(plan).__name__}; it can be what moepatch.plan(model) returns, edited or not, or None.")
    seconds: dict[str, float] = {}
    with together("optimize()", mesh), timed(seconds, "plan"):
        chosen = _checked_plan(model, mesh, plan, optimizer, dense, numerics, measure, overrides)
    forwards = own_forwards(model)
    if mesh is not None:
        mesh = in_order(mesh)
    if mesh is not None and measure:
        chosen = agreed(chosen)
    alone = {fqn: why for fqn, why in left_alone(model).items() if not any(n.kind == "attention_function" and fqn in n.fqns for n in chosen.left)}
    accept = functools.partial(_demand_all, alone=alone) if strict else _accept
    accept(chosen)
    moved = None if mesh is None else choose_dispatch(chosen, mesh, dispatch)

    def record(done: Done | None) -> None:
        if done is None:
            model.__dict__.pop("_moepatch_patch", None)
            return
        made = Report(done.plan, done.verified, _notes(done, verify, moved, alone), seconds, tuple(layer_graphs(done.journal.steps)))
        model.__dict__["_moepatch_patch"] = _Patch(made, done.journal, mesh, forwards)

    carry_out(model, chosen, mesh, moved, verify, fsdp, compile, seconds, record, accept)
    return model


def _checked_plan(
    model: nn.Module, mesh: DeviceMesh | None, given: Plan | None, optimizer, dense: bool, numerics: str, measure: bool, overrides: dict[str, str | None]
) -> Plan:
    """The plan to carry out, after everything that forbids it has been looked for."""
    check_model(model, mesh)
    asked = () if given is None else [KINDS[p.site.kind].backends for p in given.patterns]
    chosen = _made(model, mesh, dense, numerics, measure and given is None, {} if given is not None else overrides, asked)
    if given is not None:
        chosen = _fitting(given, chosen)
        chosen = (chosen if dense else chosen.without_dense()).with_backends(**overrides)
    if not any(pattern.backend for pattern in chosen.patterns):
        raise NothingMatched(_nothing(model, chosen))
    check_plan(model, chosen, optimizer, mesh)
    return chosen


@runs_plainly
def plan(model: nn.Module, mesh: DeviceMesh | None = None, *, dense: bool = True, numerics: str = "exact", measure: bool = True, **overrides) -> Plan:
    """The road up to *check*: what `optimize` would do with the same arguments. Changes nothing.

    Raises:
        CheckFailed, MoePatchError: as `optimize`.
    """
    if isinstance(model, nn.Module) and patch_of(model) is not None:
        return patch_of(model).report.plan
    check_model(model, mesh)
    made = _made(model, mesh, dense, numerics, measure, overrides)
    check_plan(model, made, None, mesh)
    return made


def _made(
    model: nn.Module, mesh: DeviceMesh | None, dense: bool, numerics: str, measure: bool, overrides: dict[str, str | None], asked: Collection[str] = ()
) -> Plan:
    """A fresh plan: what matches and can be spread over the mesh, what the caller wants, and of what is left the fastest."""
    made = planning.make_plan(model, numerics=numerics, asked=[*asked, *overrides])
    made = made if mesh is None else planning.spreadable(model, made)
    made = (made if dense else made.without_dense()).with_backends(**overrides)
    return fastest(model, made) if measure else made


@runs_plainly
def restore(model: Model) -> Model:
    """Undoes `optimize`: the original classes, parameters and hooks, with the trained weights. Returns the same object.

    A sharded model is gathered: every rank has to call it, and every rank has the whole model afterwards, without gradients. A model that
    is not patched is returned as it is, with a warning.

    Raises:
        MoePatchError: the whole model does not fit a rank; nothing was changed.
    """
    patch = patch_of(model)
    if patch is None:
        warnings.warn(f"moepatch.restore: this {type(model).__name__} is not patched; nothing to do.{_elsewhere(model, 'restore')}", stacklevel=4)
        return model
    with together("restore()", patch.mesh):
        reason = why_not_whole(model) if patch.mesh is not None else None
        if reason is not None:
            raise MoePatchError(f"restore() gathers the model on every rank, but {reason}. Save it with save_pretrained instead.")
    name = shadowed(model, patch.forwards)
    if name is not None:
        raise MoePatchError(
            f"{name}: something has replaced its forward on the instance since the patch, and would go on calling the patched one. Undo that first "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True) for offloaded models). Nothing was restored."
        )
    patch.journal.undo()
    del model.__dict__["_moepatch_patch"]
    return model


def report(model: nn.Module) -> Report:
    """What `optimize` did to a model.

    Raises:
        MoePatchError: the model is not patched.
    """
    patch = patch_of(model)
    if patch is None:
        where = _elsewhere(model, "report") or " Call moepatch.optimize(model) first."
        raise MoePatchError(f"This {type(model).__name__} is not patched.{where}")
    since = (*words.changed(_changes(model)), *called(model), *words.apart(_apart(model)), *quantized_since(model, patch.report.plan))
    return replace(patch.report, notes=(*patch.report.notes, *since)) if since else patch.report


def _changes(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """By module what its family reads and what is, or was for a time, not as at the patch; and what came of it."""
    found = {}
    watched = {fqn or "the model": module for fqn, module in model.named_modules() if isinstance(module, Patched)}
    for fqn, module in watched.items():
        said, now = module.met(), module.changes()
        found[fqn] = [(str(change), words.outcome(change in now, _can_leave(module))) for change in dict.fromkeys((*said, *now))]
    for choice in dict.fromkeys(choices(model)):
        now, said = choice.changes(), () if choice.watch is None else choice.watch.said.values()
        found.setdefault("attention", []).extend((str(change), words.outcome(change in now, True)) for change in said)
    return found


def _apart(model: nn.Module) -> list[str]:
    """The lists whose experts' weights each call copies together."""
    lists = {fqn: vars(m).get(HELD) for fqn, m in model.named_modules() if isinstance(m, PatchedExpertList) and not m.changes()}
    return [fqn for fqn, held in lists.items() if held is not None and held.are_apart()]


def _can_leave(module: Patched) -> bool:
    try:
        module.leave_to_family()
    except MoePatchError:
        return False
    return True


def _elsewhere(model: nn.Module, call: str) -> str:
    """Where the patch of a model is that has none itself: inside it, or with an object around it or beside it."""
    inner = next((name for name, m in model.named_modules() if patch_of(m) is not None), None)
    if inner is not None:
        return f" {inner!r} inside it is: moepatch.{call}(model.get_submodule({inner!r}))."
    if any(isinstance(m, Patched) for m in model.modules()):
        return f" Modules in it are, through the object that optimize() was called with: call moepatch.{call}() on that one."
    return ""


def patch_of(model: nn.Module) -> _Patch | None:
    """What `optimize` left on a model, or None."""
    if not isinstance(model, nn.Module):
        raise MoePatchError(f"moepatch takes a torch.nn.Module, such as from_pretrained returns; this is a {type(model).__name__}.")
    return vars(model).get("_moepatch_patch")


def _again(model: Model) -> Model:
    """The second `optimize` of a model changes nothing and says so."""
    patch = patch_of(model)
    note = "optimize() was called again: the model is patched already, nothing was changed. Call moepatch.restore(model) first to patch it differently."
    warnings.warn(f"moepatch: {note}", stacklevel=5)
    if note not in patch.report.notes:
        patch.report = replace(patch.report, notes=(*patch.report.notes, note))
    return model


def _fitting(given: Plan, fresh: Plan) -> Plan:
    """A plan that was passed in, on condition that the model still is what the plan was made for."""
    present = {site.fqn: pattern for pattern in fresh.patterns for site in pattern.sites}
    fitting = []
    for pattern in given.patterns:
        for site in pattern.sites:
            if site.fqn not in present:
                raise PlanMismatch(
                    f"The plan names {site.fqn!r}, which this {fresh.model_class} does not have or which was refused. "
                    "Make a new plan with moepatch.plan(model)."
                )
            now = present[site.fqn].site
            if (site.kind, site.spec, site.dtype) != (now.kind, now.spec, now.dtype):
                raise PlanMismatch(
                    f"{site.fqn}: the plan was made for {site.spec.describe()} {site.dtype}, the model has {now.spec.describe()} {now.dtype}. "
                    "Make a new plan."
                )
        chosen = present[pattern.site.fqn]
        # What is available is a fact of this machine, not of the one that made the plan.
        here = replace(pattern, choices=chosen.choices)
        if pattern.backend is not None:
            (named,) = replace(given, patterns=(here,)).with_backends(**{KINDS[pattern.site.kind].backends: pattern.backend}).patterns
            here = here if pattern.backend == chosen.backend or is_measured(pattern) else named
        fitting.append(here)
    return replace(given, patterns=tuple(fitting))


def _nothing(model: nn.Module, plan: Plan) -> str:
    name = type(model).__name__
    if any(isinstance(m, Patched) for m in model.modules()):
        return f"{name}: its mixture of experts is patched already, through another object that shares its modules."
    if plan.refusals:
        listed = "\n".join(f"  - {r.fqn} ({r.class_name}): {r.reason}." for r in plan.refusals[:5])
        more = f"\n  … and {len(plan.refusals) - 5} more" if len(plan.refusals) > 5 else ""
        return f"{name} has a mixture of experts that moepatch cannot serve:\n{listed}{more}\nThe model is unchanged."
    if plan.patterns:
        return f"{name}: the plan leaves every module alone. The model is unchanged."
    near = [f"  - {text}." for text, _ in words.near_misses(plan.left)]
    listed = "\n".join(["", *near[:5], *([f"  … and {len(near) - 5} more"] if len(near) > 5 else []), ""]) if near else " "
    none = f"none of its {sum(1 for _ in model.modules())} modules is anything that moepatch can serve."
    if plan.signs is not None:
        return words.plain(f"{name}: {none} Experts were looked for in vain, though {plan.signs}.{listed}The model is unchanged.")
    experts = "looks like it holds experts" if plan.mixture_left else "has no mixture of experts"
    return words.plain(f"{name} {experts}: {none}{listed}The model is unchanged.")


def _accept(plan: Plan) -> None:
    """Without ``strict`` every plan will do."""


def _demand_all(plan: Plan, alone: dict[str, str]) -> None:
    """Raises if anything is left alone for a reason that is not the caller's wish.

    Args:
        plan: what is about to be done, or was.
        alone: reasons by name of models whose attention function stays.
    """
    lines = [f"{len(fqns)} × {refusal.class_name} ({fqns[0]}): {refusal.reason}" for refusal, fqns in words.gathered(plan.refusals)]
    lines += [f"{text} ({fqns[0]})" for text, fqns in words.near_misses(plan.left)]
    lines += [f"{len(p.sites)} × {p.site.class_name} ({p.site.fqn}) keep their own forward: {words.why(p)}" for p in plan.unserved]
    lines += [f"{fqn or 'the model'}: its attention function is left alone: {why}" for fqn, why in alone.items()]
    if lines:
        listed = "\n".join(f"  - {line}." for line in lines)
        raise LeftAlone(
            words.plain(
                f"moepatch changed nothing, because strict=True and it would leave something alone:\n{listed}\n"
                f"Without strict=True the rest is patched and the report says this. A kind that you leave alone yourself (for example norm=None) is no reason."
            )
        )


def _notes(done: Done, verify: bool, moved: Dispatch | None, alone: dict[str, str]) -> tuple[str, ...]:
    plan = done.plan
    notes = [*done.notes] if verify else ["not verified: optimize(..., verify=False)"]
    notes += [f"{v.fqn}: {v.note}" for v in done.verified if v.note]
    if not plan.mixture:
        notes.append(words.no_mixture(plan))
    notes += [f"{fqn or 'the model'}: its attention function is left alone: {why}" for fqn, why in alone.items()]
    if moved is not None:
        notes.append(f"dispatch: {moved.name} ({moved.why})")
        whole = {p.site.fqn: why_whole(p.site) for p in plan.mixture if p.backend and why_whole(p.site)}
        notes += [f"{fqn}: every rank computes all its experts, because {why}" for fqn, why in whole.items()]
    fallen = {c.backend: c.why_not for p in plan.mixture for c in p.choices if p.backend == "reference" and c.why_not}
    notes += [f"the reference backend is slow; {name} cannot serve: {why}" for name, why in fallen.items()]
    return tuple(notes)
