"""Words and numbers that the terminal and the HTML views share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from itertools import takewhile
from typing import TYPE_CHECKING

from ..kinds import KINDS

if TYPE_CHECKING:
    from ..estimate import Estimate, ExpertGroup
    from ..inspection import BackendRow, Inspection
    from ..planning import Choice, Pattern, Plan
    from ..reporting import Report
    from ..site import Left, Refusal
    from ..work import Share

#: Of a step that memory is said for.
_TOKENS = 4096
#: Runs of layer numbers beyond this many are cut in the middle.
_MOST_RUNS = 8
#: Groups of near misses, names of one of them, and of a pattern, that a text has room for.
MOST_LEFT, MOST_NAMES_LEFT, MOST_NAMES = 10, 2, 4
#: What a terminal would obey: control characters of both sets, but for the line feed.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
#: Reasons that differ from backend to backend in how they are put. What exactly is missing is said in the table of backends and in JSON.
_SAME = ((re.compile("not installed"), "not installed"), (re.compile(r"(CUDA|NVIDIA)( GPUs?)?(, this is \w+)?$"), "needs a GPU"))
#: The number of an element in a name.
_PLACE = re.compile(r"\b\d+(?=\.[A-Za-z_])")


def collapse(fqns: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one name with a range.

    >>> collapse(["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "head"])
    ['layers.{0…2}.mlp', 'head']
    >>> collapse(["layers.0.experts.0", "layers.0.experts.1", "layers.4.experts.0", "layers.4.experts.1"])
    ['layers.{0,4}.experts.{0,1}']
    """
    shapes: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for fqn in fqns:
        parts = tuple(fqn.split("."))
        shapes.setdefault(tuple("#" if part.isdecimal() else part for part in parts), []).append(parts)
    return [name for rows in shapes.values() for name in _collapse_rows(rows)]


def few(fqns: Iterable[str], most: int) -> list[str]:
    """Collapsed names, of many the first, and how many more there are.

    >>> few(["a", "b", "c", "d"], 3)
    ['a', 'b', '… and 2 more names']
    """
    names = collapse(fqns)
    return names if len(names) <= most else [*names[: most - 1], f"… and {len(names) - most + 1} more names"]


def _collapse_rows(rows: list[tuple[str, ...]]) -> list[str]:
    """Names of one shape. Numbers that do not form a full grid are taken apart at the last position that varies."""
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    varying = [i for i, column in enumerate(columns) if len(column) > 1]
    grid = 1
    for i in varying:
        grid *= len(columns[i])
    if grid == len(set(rows)):
        return [".".join(_range(column) if len(column) > 1 else column[0] for column in columns)]
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        groups.setdefault(row[varying[-1]], []).append(row)
    return [name for group in groups.values() for name in _collapse_rows(group)]


def _range(numbers: list[str]) -> str:
    ordered, runs = sorted(map(int, numbers)), []
    for n in ordered:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}…{b}" for a, b in runs]
    if len(words) > _MOST_RUNS:
        words = [*words[: _MOST_RUNS - 2], "…", words[-1]]
    return "{" + ",".join(words) + "}"


def amount(count: int) -> str:
    """A count of parameters.

    >>> amount(30_532_122_624), amount(7_300_000), amount(512)
    ('30.53 B', '7.30 M', '512')
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def size(count: int) -> str:
    """A count of bytes.

    >>> size(61_064_245_248), size(2048), size(3)
    ('56.9 GiB', '2.0 KiB', '3 bytes')
    """
    for step, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << step:
            return f"{count / (1 << step):.1f} {unit}"
    return f"{count} bytes"


def sizes(bytes_by_dtype: dict[str, int]) -> str:
    """Bytes by dtype on one line."""
    return " + ".join(f"{dtype} {size(count)}" for dtype, count in bytes_by_dtype.items())


def model_parts(inspection: Inspection) -> list[str]:
    """The line about the whole model, in pieces that should not be broken."""
    estimate = inspection.estimate
    return [inspection.model_class, params(estimate), *layers(estimate), sizes(estimate.bytes_by_dtype)]


def params(estimate: Estimate) -> str:
    """Total and active parameters."""
    total = f"{amount(estimate.total_params)} params"
    if estimate.active_params is None:
        return f"{total}, active unknown"
    return f"{total}, {amount(estimate.active_params)} active" if estimate.groups else f"{total}, all active"


def layers(estimate: Estimate) -> list[str]:
    """How many layers, if that is known."""
    return [] if estimate.layers is None else [f"{estimate.layers} layer{'s' if estimate.layers != 1 else ''}"]


def group_parts(group: ExpertGroup, estimate: Estimate) -> list[str]:
    """The line about one group of experts, in pieces that should not be broken."""
    share = f"{amount(group.params)} ({100 * group.params / max(1, estimate.total_params):.0f} %)"
    return [f"{group.count} × {group.class_name}", group.layout, expert_sizes(group), share]


def kept(group: ExpertGroup) -> str:
    """What the backward pass of one layer of experts needs beside its tokens; empty if that is not known."""
    return "" if group.kept_per_token is None else f"{group.kept_per_token * _TOKENS / 2**20:,.0f} MiB a layer of {_TOKENS:,} tokens"


def expert_sizes(group: ExpertGroup) -> str:
    """``E=128 K=8 H=2048 I=768 swiglu``."""
    experts, _, rest = group.sizes.partition(" ") if group.sizes else (f"E={group.num_experts}", "", "")
    chosen = f"{group.top_k[0]}…{group.top_k[-1]}" if len(group.top_k) > 1 else str(group.top_k[0]) if group.top_k else "?"
    return f"{experts} K={chosen} {rest}".strip()


def plain(text: str) -> str:
    """A text without control characters: names of modules and classes come from anywhere.

    >>> plain("a\\x1b[31mb")
    'a[31mb'
    """
    return _CONTROL.sub("", text)


def html(text: str) -> str:
    """A text for HTML."""
    return escape(plain(text))


def percent(share: float) -> str:
    """A share, rounded so that only all of it is 100 % and only nothing is 0 %.

    >>> percent(0.9712), percent(0.9999), percent(1.0), percent(0.0003), percent(0.004)
    ('97 %', '99.9 %', '100 %', '0.1 %', '0.4 %')
    """
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if 0.01 <= share < 0.995:
        return f"{100 * share:.0f} %"
    return f"{min(99.9, max(0.1, 100 * share)):.1f} %"


def shared(share: Share, verb: str) -> str:
    """How much of a step is patched, as the end of the first line.

    Args:
        share: of the plan.
        verb: ``are patched`` or ``would be patched``.
    """
    flops = f"{'' if share.exact else 'at least '}{percent(share.share)} of a step's FLOPs"
    modules = f"{share.patched_modules} of {share.modules} module{'' if share.modules == 1 else 's'} with weights"
    return f"{flops} and {modules} {verb}"


def sentence(near: Left, count: int) -> str:
    """A near miss: ``48 × Attention keep their own forward: the argument `cache` is not known``."""
    return f"{near.class_name} keeps its own forward: {near.reason}" if count == 1 else f"{count} × {near.class_name} keep their own forward: {near.reason}"


def near_misses(left: Iterable[Left]) -> list[tuple[str, tuple[str, ...]]]:
    """Near misses of one class and one reason as one sentence, with the names of all modules; the largest groups first."""
    groups: dict[tuple[str, str, str], list[Left]] = {}
    for near in left:
        groups.setdefault((near.kind, near.class_name, near.reason), []).append(near)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [(sentence(group[0], len(group)), tuple(near.fqn for near in group)) for group in ordered]


def gathered(refusals: Iterable[Refusal]) -> list[tuple[Refusal, tuple[str, ...]]]:
    """Refusals that say the same, once, with the names of all modules."""
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault((refusal.class_name, refusal.reason, refusal.hint), []).append(refusal)
    return [(group[0], tuple(r.fqn for r in group)) for group in groups.values()]


def changed(found: Mapping[str, Iterable[tuple[str, str]]]) -> list[str]:
    """What is, or was for a time, not as it was at the patch, and what came of it, by module: once for all modules of which the same is to say,
    and once for all elements of a list."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for fqn, changes in found.items():
        for text, what in changes:
            groups.setdefault((_PLACE.sub("…", text, count=1), what), {}).setdefault(text, []).append(fqn)
    lines = []
    for (_, what), of_text in groups.items():
        fqns = list(dict.fromkeys(fqn for some in of_text.values() for fqn in some))
        others = f" (and the same of {len(of_text) - 1} more)" if len(of_text) > 1 else ""
        lines.append(f"{', '.join(few(fqns, 3))}: {next(iter(of_text))}{others}, so {what}")
    return lines


def apart(fqns: list[str]) -> list[str]:
    """What to know of lists of experts whose weights do not lie beside each other (any more)."""
    if not fqns:
        return []
    why = "the weights of the experts lie apart (somebody has moved or replaced some), so each call copies them together, and is slower"
    return [f"{', '.join(few(fqns, 3))}: {why}; model.to(model.device) puts those that are nobody else's side by side again"]


def outcome(still: bool, followed: bool) -> str:
    """What came of a change: who computes now, and who computed as long as it was there."""
    if not followed:
        return "a call there is refused" if still else "calls there were refused for a time"
    return "the family's own code computes there" if still else "the family's own code computed there for a time; the patch does again"


def planned(pattern: Pattern) -> str:
    """The backend, or that there is none."""
    return pattern.backend or "left alone"


def parts(plan: Plan) -> list[tuple[str, tuple[Pattern, ...]]]:
    """The halves of a model that the plan has patterns of, with their titles."""
    dense = tuple(p for p in plan.patterns if KINDS[p.site.kind].dense)
    return [(title, patterns) for title, patterns in (("mixture of experts", plan.mixture), ("dense half", dense)) if patterns]


def why(pattern: Pattern) -> str:
    """The reason for the choice, with the backends that were passed over for the same reason named together."""
    passed = list(takewhile(lambda choice: choice.why_not is not None, pattern.choices))
    listed = "; ".join(f"{choice.backend}: {choice.why_not}" for choice in passed)
    return pattern.why.replace(listed, _together(passed)) if passed else pattern.why


def missing(rows: Iterable[BackendRow]) -> str:
    """The backends that cannot serve, with what they lack: ``needs a GPU: cudnn; not installed: te, fa4``."""
    lacking = [row for row in rows if row.why_not is not None]
    return _by_reason([(row.name, row.why_not) for row in lacking])


def _together(passed: list[Choice]) -> str:
    return _by_reason([(choice.backend, choice.why_not) for choice in passed])


def _by_reason(passed: list[tuple[str, str]]) -> str:
    """``needs a GPU: cudnn; not installed: te, fa4``."""
    names: dict[str, list[str]] = {}
    for name, why_not in passed:
        reason = next((short for wording, short in _SAME if wording.search(why_not)), why_not)
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{reason}: {', '.join(backends)}" for reason, backends in names.items())


def backends_for(inspection: Inspection) -> tuple[BackendRow, ...]:
    """The rows of the tables that this model has something for; all of them if it has nothing."""
    tables = {KINDS[p.site.kind].backends for p in inspection.plan.patterns} | ({"dispatch"} if inspection.plan.mixture else set())
    return tuple(row for row in inspection.backends if row.table in tables or not inspection.plan.patterns)


def first_line(plan: Plan, verb: str) -> str:
    """The model and how much of its step is patched."""
    return f"{plan.model_class}: {shared(plan.share, verb)}"


def colour_of(pattern: Pattern) -> str:
    """How well a pattern is served: ``good``, ``slow`` (by plain torch, for want of something faster) or ``none``."""
    if pattern.backend is None:
        return "none"
    return "slow" if pattern.backend == "reference" else "good"


def no_mixture(plan: Plan) -> str:
    """What to say of a model of whose mixture of experts nothing is served."""
    if plan.refusals or plan.mixture_left:
        return "its mixture of experts is left alone: see the reasons"
    if plan.mixture:
        return "its mixture of experts is left alone, as was asked"
    if plan.signs is not None:
        return f"none of its modules was recognised as experts, though {plan.signs}"
    return "there is no mixture of experts in this model"


def verdict(inspection: Inspection) -> str:
    """What an inspection comes to."""
    plan, verb = inspection.plan, "is patched" if inspection.patched else "can be patched"
    dense = any(p.backend for p in plan.patterns if KINDS[p.site.kind].dense)
    if not any(p.backend for p in plan.patterns):
        return "nothing here that moepatch can patch"
    if inspection.exit_code == 3:
        return f"the dense half {verb}, the mixture of experts is left alone"
    if inspection.exit_code == 2:
        return f"some of it {verb}, some is left alone"
    if not plan.mixture:
        return f"the dense half {verb}; " + (no_mixture(plan) if plan.signs else "there is no mixture of experts in it")
    return f"every mixture of experts {verb}" + (", and so is the dense half" if dense and inspection.patched else ", and the dense half" if dense else "")


def error(value: float | None) -> str:
    """A relative error."""
    return "" if value is None else f"{value:.1e}"
