"""Reports and inspections as HTML for notebooks: one self-contained fragment, no scripts, legible on dark and on light."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import words
from .words import html as escape

if TYPE_CHECKING:
    from ..inspection import BackendRow, Inspection
    from ..planning import Pattern, Plan
    from ..reporting import Report
    from ..site import Left, Refusal
    from ..verify import Verified

# Only greys that are half transparent, and colours of medium lightness: both show on white and on black.
_GOOD, _FAIR, _BAD = "#2e9e4f", "#c27c0e", "#d9484a"
_LINE = "rgba(128,128,128,.35)"
_CELL = f"text-align:left;vertical-align:top;padding:4px 14px 4px 0;border:0;border-bottom:1px solid {_LINE};background:transparent;"
_HEAD = f"{_CELL}font-weight:600;opacity:.75;white-space:nowrap;"
_CARD = f"display:inline-block;vertical-align:top;margin:0 8px 8px 0;padding:6px 12px;border:1px solid {_LINE};border-radius:6px;"
_BODY = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;color:inherit;max-width:1100px;"
_CODE = "font-family:ui-monospace,monospace;font-size:12px;background:transparent;color:inherit;padding:0;white-space:nowrap;"


def html_of_plan(plan: Plan) -> str:
    """The plan as an HTML fragment with inline styles; lists of names unfold."""
    return _fragment(words.first_line(plan, "would be patched"), [], _patterns(plan, "now", "planned"), _refusals(plan.refusals), _near_misses(plan.left))


def html_of_report(report: Report) -> str:
    """The report as an HTML fragment with inline styles; lists of names and of single differences unfold."""
    plan = report.plan
    checked = sum(1 for v in report.verified if v.differences)
    cards = [_card("patched", f"{report.patched} module{'' if report.patched == 1 else 's'}")]
    cards += [_card("verified", f"{checked} of {len(report.verified)} patterns")] if report.verified else []
    cards += [_card(step, f"{seconds:.2f} s") for step, seconds in report.seconds.items()]
    return _fragment(
        words.first_line(plan, "are patched"),
        cards,
        _patterns(plan, "before", "now"),
        _refusals(plan.refusals),
        _near_misses(plan.left),
        _verified(report.verified),
        _bullets("Notes", report.notes),
        _bullets("Compiled", tuple(map(str, report.compiled))),
    )


def html_of_inspection(inspection: Inspection) -> str:
    """The inspection as an HTML fragment with inline styles; lists of names unfold."""
    estimate = inspection.estimate
    share = 100 * estimate.expert_params / max(1, estimate.total_params)
    active = "unknown" if estimate.active_params is None else words.amount(estimate.active_params)
    cards = [_card("parameters", words.amount(estimate.total_params)), _card("active per token", active)]
    cards += [_card("in experts", f"{words.amount(estimate.expert_params)} ({share:.0f} %)")] if estimate.groups else []
    cards += [_card("layers", str(estimate.layers))] if estimate.layers is not None else []
    cards += [_card("weights", words.sizes(estimate.bytes_by_dtype))]
    cards += [_card("files", words.sizes(inspection.weights.bytes_by_dtype))] if inspection.weights is not None else []
    colour = {0: _GOOD, 2: _FAIR, 3: _BAD}[inspection.exit_code]
    cards.append(_card("result", words.verdict(inspection), colour))
    titles, verb = (("before", "now"), "are patched") if inspection.patched else (("now", "planned"), "would be patched")
    return _fragment(
        words.first_line(inspection.plan, verb),
        cards,
        _experts(inspection),
        _patterns(inspection.plan, *titles),
        _refusals(inspection.plan.refusals),
        _near_misses(inspection.plan.left),
        _bullets("Warnings", inspection.warnings, _FAIR),
        _backends(words.backends_for(inspection)),
        f'<div style="opacity:.75;margin-top:8px">source: {escape(inspection.source)}</div>',
    )


def _fragment(title: str, cards: list[str], *blocks: str) -> str:
    head = f'<div style="font-size:16px;font-weight:600;margin-bottom:8px">{escape(title)}</div>'
    return f'<div style="{_BODY}">{head}<div>{"".join(cards)}</div>{"".join(blocks)}</div>'


def _card(name: str, value: str, colour: str = "inherit") -> str:
    label = f'<div style="font-size:11px;opacity:.75">{escape(name)}</div>'
    return f'<div style="{_CARD}">{label}<div style="font-weight:600;color:{colour}">{escape(value)}</div></div>'


def _block(title: str, inner: str) -> str:
    return f'<div style="font-weight:600;margin:12px 0 4px">{escape(title)}</div>{inner}'


def _table(heads: tuple[str, ...], rows: Iterable[Iterable[str] | str]) -> str:
    """A table; `rows` are HTML, `heads` are text. A row that is a single text spans all columns: the title of the rows after it."""
    top = "".join(f'<th style="{_HEAD}">{escape(head)}</th>' for head in heads)
    title = f'<td colspan="{len(heads)}" style="{_CELL}padding-top:14px;font-weight:600">'
    body = "".join(f"<tr>{title}{row}</td></tr>" if isinstance(row, str) else f"<tr>{_cells(row)}</tr>" for row in rows)
    style = "border-collapse:collapse;border:0;margin:0;color:inherit"
    return f'<div style="overflow-x:auto"><table style="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: Iterable[str]) -> str:
    return "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row)


def _text(text: str, colour: str) -> str:
    return f'<span style="color:{colour}">{escape(text)}</span>'


def _names(fqns: tuple[str, ...]) -> str:
    """The names of modules: short, and one by one when unfolded."""
    short = "<br>".join(f'<code style="{_CODE}">{escape(name)}</code>' for name in words.collapse(fqns))
    if len(fqns) == 1:
        return short
    every = "<br>".join(escape(fqn) for fqn in fqns)
    return _folded(short, every)


def _folded(summary: str, inner: str) -> str:
    """HTML that unfolds, without a script."""
    head = f'<summary style="cursor:pointer">{summary}</summary>'
    return f'<details>{head}<div style="{_CODE}opacity:.8;padding-left:14px">{inner}</div></details>'


def _experts(inspection: Inspection) -> str:
    groups = inspection.estimate.groups
    if not groups:
        return ""
    rows = ([escape(part) for part in (*words.group_parts(group, inspection.estimate), words.kept(group))] for group in groups)
    return _block("Experts", _table(("modules", "layout", "sizes", "parameters", "kept for the backward pass"), rows))


def _patterns(plan: Plan, before: str, after: str) -> str:
    """One table, so that the columns of both halves are in line."""
    halves = words.parts(plan)
    if not halves:
        return ""
    rows = [row for title, patterns in halves for row in (escape(title.capitalize()), *map(_pattern, patterns))]
    return _block("Patterns", _table(("pattern", "count", before, after, "why, or why not"), rows))


def _pattern(pattern: Pattern) -> tuple[str, ...]:
    return (
        f"{escape(pattern.name)}<br>{_names(pattern.fqns)}",
        str(len(pattern.sites)),
        escape(pattern.site.now),
        _text(words.planned(pattern), {"good": _GOOD, "slow": "inherit", "none": _FAIR}[words.colour_of(pattern)]),
        escape(words.why(pattern)),
    )


def _refusals(refusals: tuple[Refusal, ...]) -> str:
    if not refusals:
        return ""
    rows = [
        (_names(fqns), escape(refusal.class_name), _text(refusal.reason, _FAIR), escape(refusal.hint))
        for refusal, fqns in words.gathered(refusals)
    ]
    return _block("Left alone", _table(("modules", "class", "reason", "what would help"), rows))


def _near_misses(left: tuple[Left, ...]) -> str:
    rows = [(_names(fqns), _text(text, _FAIR)) for text, fqns in words.near_misses(left)]
    return _block("Nearly of a kind, and left alone", _table(("modules", "reason"), rows)) if rows else ""


def _verified(verified: tuple[Verified, ...]) -> str:
    if not verified:
        return ""
    rows = []
    for v in verified:
        if v.worst is None:
            rows.append((escape(v.pattern), escape(v.backend), escape(v.note), "", "", "", _text("not run", _FAIR)))
            continue
        errors = (v.worst.ours, v.worst.theirs, v.worst.limit)
        numbers = tuple(f'<span style="white-space:nowrap">{escape(words.error(n))}</span>' for n in errors)
        rows.append((escape(v.pattern), escape(v.backend), _differences(v), *numbers, _text("ok", _GOOD) if v.ok else _text("✗", _BAD)))
    heads = ("pattern", "backend", "worst", "error", "family's own", "limit", "")
    return _block("Verified against the untouched module", _table(heads, rows))


def _differences(verified: Verified) -> str:
    lines = []
    for d in verified.differences:
        own = "" if d.theirs is None else f", family {words.error(d.theirs)}"
        lines.append(escape(f"{d.what}: {words.error(d.ours)}{own}, limit {words.error(d.limit)}"))
    return _folded(escape(f"{verified.worst.what} (of {len(verified.differences)})"), "<br>".join(lines))


def _backends(rows: tuple[BackendRow, ...]) -> str:
    table = _table(
        ("name", "for", "", "serves"),
        (
            (
                escape(row.name),
                escape(row.table),
                _text("ok", _GOOD) if row.why_not is None else _text(row.why_not, _FAIR),
                escape(row.serves),
            )
            for row in rows
        ),
    )
    there = sum(row.why_not is None for row in rows)
    summary = f'<summary style="cursor:pointer;font-weight:600">Backends: {there} of {len(rows)} available</summary>'
    return f'<details style="margin-top:12px">{summary}{table}</details>'


def _bullets(title: str, texts: tuple[str, ...], colour: str = "inherit") -> str:
    if not texts:
        return ""
    return _block(title, f'<ul style="margin:0;padding-left:20px">{"".join(f"<li>{_text(text, colour)}</li>" for text in texts)}</ul>')
