"""Everything that changes a model: a plan is carried out pattern by pattern, each verified as soon as it is patched.

A backend that moepatch chose and that does not compute what the module does costs that pattern, not the model: the pattern gets the next
backend, or keeps its family's code. All steps are on one journal, so whatever is raised, the model is as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from .checkpoint import ModelState, PatchedModel
from .choice import PatchedPart
from .errors import NothingMatched, NumericMismatch
from .experts.module import PatchedExperts
from .kinds import KINDS
from .match.attention_function import looks
from .match.experts import implementation
from .measure import by_time
from .parallel.agree import everywhere, together
from .parallel.apply import Dispatch, shard
from .planning import Pattern, Plan, next_best, serving
from .progress import counted
from .regional import compile_layers
from .scan import outermost_pretrained
from .reads import Reads
from .surgery import InjectClass, Journal, WatchModule
from .verify import Verified, verify


@dataclass(frozen=True)
class Done:
    """What was done to a model.

    Attributes:
        journal: the steps.
        plan: as it was carried out.
        verified: one entry for each pattern that is patched.
        notes: which backends were passed over, by how much they missed, and what was taken instead.
    """

    journal: Journal
    plan: Plan
    verified: tuple[Verified, ...]
    notes: tuple[str, ...]


def carry_out(
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh | None,
    moved: Dispatch | None,
    verified: bool,
    fsdp: bool,
    compile: str | None,
    seconds: dict[str, float],
    record: Callable[[Done | None], None],
    accept: Callable[[Plan], None] = lambda plan: None,
) -> None:
    """Patches, verifies, moves weights, shards and compiles. Whatever is raised, the model is as it was.

    Args:
        verified: whether each pattern is verified.
        seconds: gets how long each part took.
        record: keeps what was done on the model; with None it keeps nothing. Called before anything is let go that the way back needs.
        accept: is shown the plan once verification has settled it, and may raise.

    Raises:
        NumericMismatch: a backend that the caller named does not compute what the module does.
        NothingMatched: no backend does, for any pattern.
    """
    journal = Journal()
    try:
        with together("optimize()", mesh):
            with counted(plan.patterns, "verifying", lambda p: f"{p.name} ({p.backend})") as turns:
                proven = [_proven(model, p, mesh, journal, seconds) if verified and p.backend else _Proven(p) for p in turns]
            notes = tuple(note for one in proven for note in one.notes)
            made = replace(plan, patterns=tuple(one.pattern for one in proven))
            if not any(pattern.backend for pattern in made.patterns):
                listed = "\n".join(f"  - {note}" for note in notes)
                raise NothingMatched(f"{plan.model_class}: no backend computes what its modules do:\n{listed}\nThe model is unchanged.")
            accept(made)
            with timed(seconds, "apply"):
                if not verified:
                    apply_patterns(model, made, journal)
                apply_models(model, journal)
            relayout(model, made, journal, mesh is not None)
            watch_patterns(model, made, journal)
            if mesh is not None:
                with timed(seconds, "shard"), counted((model,), "sharding", lambda whole: type(whole).__name__) as turns:
                    for whole in turns:
                        shard(whole, made, mesh, moved, fsdp, journal)
            for step in compile_layers(model) if compile else ():
                journal.do(step)
        record(Done(journal, made, tuple(one.verified for one in proven if one.verified is not None), notes))
    except BaseException:
        journal.undo()
        record(None)
        raise
    journal.commit()


@dataclass(frozen=True)
class _Proven:
    """A pattern whose backend has been verified, or that keeps its family's code; and what was said on the way."""

    pattern: Pattern
    verified: Verified | None = None
    notes: tuple[str, ...] = ()


def _proven(model: nn.Module, pattern: Pattern, mesh: DeviceMesh | None, journal: Journal, seconds: dict[str, float]) -> _Proven:
    """Patches the sites of a pattern with the first backend that is verified, on all ranks, and leaves them alone where there is none."""
    notes: list[str] = []
    order = by_time(pattern)
    while pattern.backend is not None:
        before = len(journal.steps)

        def tried(pattern: Pattern = pattern) -> tuple[Verified, list[str]]:
            with timed(seconds, "apply"):
                apply_pattern(model, pattern, journal)
            with timed(seconds, "verify"):
                return verify(model, pattern), serving(pattern, order)

        answers = everywhere(f"optimize(), verifying {pattern.backend!r} for {pattern.site.fqn or 'the model'}", mesh, tried)
        failed = next((rank for rank, (found, _) in enumerate(answers) if not found.ok), None)
        if failed is None:
            return _Proven(pattern, answers[0][0], tuple(notes))
        found = answers[failed][0]
        where = f" (on rank {failed})" if len(answers) > 1 else ""
        if pattern.by_caller:
            raise NumericMismatch(_advice(pattern, found.missed_whole + where, found.untried))
        missed = found.missed + where
        journal.undo(to=before)
        if found.untried:
            following = replace(pattern, backend=None, why=missed)
        else:  # clocks of ranks differ, and so may what is installed
            names = [name for name in answers[0][1] if all(name in here for _, here in answers)]
            following = next_best(pattern, f"failed its verification ({missed})", names)
        notes.append(_note(pattern, missed, found.untried, following.backend))
        pattern = following
    return _Proven(pattern, None, tuple(notes))


def _note(pattern: Pattern, missed: str, untried: bool, following: str | None) -> str:
    others = f" and {len(pattern.sites) - 1} more" if len(pattern.sites) > 1 else ""
    what = "cannot be verified" if untried else "does not compute what the module does"
    then = f"{following!r} was taken instead" if following else f"{'they keep' if others else 'it keeps'} the family's own code"
    return f"{pattern.site.fqn or 'the model'}{others} ({pattern.site.class_name}): the backend {pattern.backend!r} {what}: {missed}; {then}"


def _advice(pattern: Pattern, missed: str, untried: bool) -> str:
    """The words for a backend that the caller named: what failed, by how much, and what there is instead."""
    table, site = KINDS[pattern.site.kind].backends, pattern.site
    where = f"{site.fqn or 'the model'} ({site.class_name}): the backend {pattern.backend!r}"
    alone = f"optimize(model, {table}=None) leaves these modules alone"
    if untried:
        return f"{where} cannot be verified: {missed}. Everything was rolled back. {alone}; verify=False takes the backend unverified."
    choice = f"Without {table}= (or a plan that names it) moepatch takes another backend if one fits; " if serving(pattern) else ""
    return f"{where} does not compute what the module does: {missed}. Everything was rolled back. {choice}{alone}. Please report this."


def apply(model: nn.Module, plan: Plan, journal: Journal) -> None:
    """Patches every site of the plan in its order, and the models around them; every step goes on the journal."""
    apply_patterns(model, plan, journal)
    apply_models(model, journal)


def apply_patterns(model: nn.Module, plan: Plan, journal: Journal) -> None:
    """Patches every site of the plan."""
    for pattern in plan.patterns:
        if pattern.backend is not None:
            apply_pattern(model, pattern, journal)


def apply_pattern(model: nn.Module, pattern: Pattern, journal: Journal) -> None:
    """Patches the sites of one pattern with its backend."""
    for site in pattern.sites:
        module, kind = model.get_submodule(site.fqn), KINDS[site.kind]
        for name, (mixin, state) in kind.injections(site.spec, pattern.backend, implementation(module)).items():
            journal.do(InjectClass(module.get_submodule(name), mixin, state))
        for step in kind.steps(module, site.spec, pattern.backend):
            journal.do(step)


def apply_models(model: nn.Module, journal: Journal) -> None:
    """Patches the transformers models around what was patched."""
    count = len(journal.steps)
    for look in looks(model):
        journal.do(look)
    for pretrained in outermost_pretrained(model).values():
        journal.do(InjectClass(pretrained, PatchedModel, ModelState(count)))
        for part in pretrained.modules():
            if part is not pretrained and isinstance(part, PreTrainedModel) and any(isinstance(m, PatchedExperts) for m in part.modules()):
                journal.do(InjectClass(part, PatchedPart, "experts"))


def relayout(model: nn.Module, plan: Plan, journal: Journal, spread: bool = False) -> None:
    """Moves weights whose layout has to change. Last: until then a patched module can be compared with the module it was.

    Args:
        spread: whether the model is about to be spread over the ranks of a mesh.
    """
    for pattern in plan.patterns:
        for site in pattern.sites if pattern.backend is not None else ():
            kind = KINDS[site.kind]
            steps = kind.spread if spread and kind.spread is not None else kind.relayout
            for step in steps(model.get_submodule(site.fqn), site.spec):
                journal.do(step)


def watch_patterns(model: nn.Module, plan: Plan, journal: Journal) -> None:
    """Has every patched module notice what changes from now on of that which its family reads. Last: what a module is must not change any more."""
    memo: dict[type, Reads] = {}
    for pattern in plan.patterns:
        for site in pattern.sites if pattern.backend is not None else ():
            module, kind = model.get_submodule(site.fqn), KINDS[site.kind]
            for name in kind.injections(site.spec, pattern.backend, None):
                journal.do(WatchModule(module.get_submodule(name), kind.follows(site.spec), not kind.only_itself, memo))


class timed:
    """Adds the seconds spent in a block to a dict."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *exc):
        self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start, 4)
