"""Plans, reports and inspections as text for a terminal: as wide as it is, in colours where it has them."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from . import words

if TYPE_CHECKING:
    from ..bench import BenchRow
    from ..inspection import BackendRow, Inspection
    from ..planning import Pattern, Plan
    from ..reporting import Report
    from ..site import Left, Refusal
    from ..verify import Verified

#: Colours of `words.colour_of`.
_STYLES = {"good": "green", "slow": "", "none": "yellow"}
#: Columns where the output is not a terminal and COLUMNS is not set.
_WIDTH = 120


def text_of_plan(plan: Plan) -> str:
    """The plan as plain text, as wide as the terminal. `print_view` adds colours where they belong."""
    return _text(view_of_plan(plan), io.StringIO())


def text_of_report(report: Report) -> str:
    """The report as text; see `text_of_plan`."""
    return _text(view_of_report(report), io.StringIO())


def text_of_inspection(inspection: Inspection) -> str:
    """The inspection as text; see `text_of_plan`."""
    return _text(view_of_inspection(inspection), io.StringIO())


def console(stream: TextIO | None = None) -> Console:
    """A console that writes to `stream` (standard output if None): coloured only if that is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    coloured = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    return Console(file=stream, width=width, force_terminal=coloured, force_jupyter=False, no_color=not coloured, highlight=False, markup=False, emoji=False)


def print_view(view: RenderableType, stream: TextIO | None = None) -> None:
    """Writes a view, without blanks at the ends of lines."""
    stream = stream or sys.stdout
    stream.write(_text(view, stream) + "\n")


def view_of_plan(plan: Plan) -> Group:
    """What `text_of_plan` prints."""
    head = Text(words.first_line(plan, "would be patched"), "bold")
    return Group(head, *_blocks(_patterns(plan, "now", "planned"), _left_alone(plan)))


def view_of_report(report: Report) -> Group:
    """What `text_of_report` prints."""
    head = Text(words.first_line(report.plan, "are patched"), "bold")
    seconds = [_Line([("seconds", "dim"), *((f"{step} {value:.2f}", "") for step, value in report.seconds.items())])]
    return Group(
        head,
        *_blocks(
            _patterns(report.plan, "before", "now"),
            _left_alone(report.plan),
            _verified(report.verified),
            _bullets("notes", report.notes),
            _bullets("compiled", tuple(map(str, report.compiled))),
            seconds if report.seconds else [],
        ),
    )


def view_of_inspection(inspection: Inspection) -> Group:
    """What `text_of_inspection` prints."""
    name, *rest = words.model_parts(inspection)
    lines = [_Line([(name, "bold"), *((part, "") for part in rest)])]
    for group in inspection.estimate.groups:
        kept = [f"keeps {words.kept(group)}"] if words.kept(group) else []
        lines.append(_Line([("experts", "bold"), *((p, "") for p in (*words.group_parts(group, inspection.estimate), *kept))]))
    titles, verb = (("before", "now"), "are patched") if inspection.patched else (("now", "planned"), "would be patched")
    lines.append(_fact("share", words.shared(inspection.plan.share, verb)))
    style = {0: "green", 2: "yellow", 3: "red"}[inspection.exit_code]
    end = [_fact("files", words.sizes(inspection.weights.bytes_by_dtype))] if inspection.weights is not None else []
    end += [_fact("source", inspection.source), _fact("result", words.verdict(inspection), style)]
    return Group(
        *lines,
        *_blocks(
            _patterns(inspection.plan, *titles),
            _left_alone(inspection.plan),
            _tables(words.backends_for(inspection)),
            _bullets("warnings", inspection.warnings, "yellow"),
            end,
        ),
    )


def view_of_environment(versions: dict[str, str], backends: tuple[BackendRow, ...]) -> Group:
    """What `moepatch doctor` prints: versions by name, and every backend."""
    table = Table.grid(padding=(0, 2))
    for name, version in versions.items():
        table.add_row(Text(name, "bold"), version)
    return Group(table, *_blocks(_backends(backends)))


def view_of_bench(title: str, rows: list[BenchRow]) -> Group:
    """What `moepatch bench` prints: how much faster than transformers' code each backend is, and which of them the plan has (●)."""
    table = _table(
        Column("module", overflow="fold"),
        Column("count", justify="right", no_wrap=True),
        Column("stack", no_wrap=True),
        Column("ms", justify="right", no_wrap=True),
        Column("×", justify="right", no_wrap=True),
        Column("", overflow="fold"),
    )
    before = base = None
    for row in rows:
        if (row.pattern, row.spec) != before:
            before, base = (row.pattern, row.spec), row.ms if row.stack == "transformers" else None
            first = _Line([(row.pattern, "bold"), (row.spec, "dim")]), str(row.modules)
        else:
            first = "", ""
        times = f"{base / row.ms:.2f}" if base and row.ms and row.stack != "transformers" else ""
        took = "" if row.ms is None else f"{row.ms:.2f}"
        table.add_row(*first, Text(row.stack + (" ●" if row.planned else ""), "green" if row.planned else ""), took, times, Text(row.problem or "", "yellow"))
    return Group(title, "", table)


def _text(view: RenderableType, stream: TextIO | None = None) -> str:
    """Renders as `console(stream)` would, into a string whose lines have no blanks at the end."""
    target, buffer = console(stream), io.StringIO()
    target.file = buffer
    target.print(_Plain(view))
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))


def _blocks(*blocks: list[RenderableType]) -> Iterator[RenderableType]:
    """The blocks that have something to say, each after an empty line."""
    for block in blocks:
        if block:
            yield ""
            yield from block


def _table(*columns: Column) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold underline")


def _patterns(plan: Plan, before: str, after: str) -> list[RenderableType]:
    """One table, so that the columns of both halves are in line, and where the modules are."""
    halves = words.parts(plan)
    if not halves:
        return []
    table = _table(
        Column(halves[0][0], overflow="fold"),
        Column("count", justify="right", no_wrap=True),
        Column(before, overflow="fold", min_width=11, max_width=18),
        Column(after, overflow="fold", min_width=10),
        Column("why, or why not", overflow="fold", min_width=15),
    )
    for title, patterns in halves:
        if table.row_count:
            table.add_row()
            table.add_row(Text(title, "bold underline"))
        for pattern in patterns:
            after_text = Text(words.planned(pattern), _STYLES[words.colour_of(pattern)])
            table.add_row(pattern.name, str(len(pattern.sites)), pattern.site.now, after_text, words.why(pattern))
    return [table, "", *_modules(plan.patterns)]


def _modules(patterns: tuple[Pattern, ...]) -> list[RenderableType]:
    """Where the modules of each pattern are; with their sizes where there are several patterns, which may share a name."""
    lines: list[RenderableType] = [Text("modules", "bold")]
    for pattern in patterns:
        label = [(pattern.name, "dim"), (pattern.site.spec.describe(), "dim")] if len(patterns) > 1 else []
        lines.append(Padding(_Line([*label, *((name, "") for name in words.few(pattern.fqns, words.MOST_NAMES))]), (0, 0, 0, 2)))
    return lines


def _left_alone(plan: Plan) -> list[RenderableType]:
    """What was refused, then what was nearly taken."""
    lines = [*_refusals(plan.refusals), *_near_misses(plan.left)]
    return [Text("left alone", "bold yellow"), *lines] if lines else []


def _near_misses(left: tuple[Left, ...]) -> list[RenderableType]:
    groups, lines = words.near_misses(left), []
    for text, fqns in groups[: words.MOST_LEFT]:
        lines.append(Padding(Text(f"{text}.", "yellow"), (0, 0, 0, 2)))
        lines.append(Padding(_Line([(name, "dim") for name in words.few(fqns, words.MOST_NAMES_LEFT)]), (0, 0, 0, 4)))
    more = sum(len(fqns) for _, fqns in groups[words.MOST_LEFT :])
    return [*lines, Padding(Text(f"… and {more} more modules: the plan's left has them all.", "yellow"), (0, 0, 0, 2))] if more else lines


def _refusals(refusals: tuple[Refusal, ...]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for refusal, fqns in words.gathered(refusals):
        count = f"{len(fqns)} × " if len(fqns) > 1 else ""
        lines.append(Padding(Text("\n".join(words.collapse(fqns))), (0, 0, 0, 2)))
        lines.append(Padding(Text(f"{count}{refusal.class_name}: {refusal.reason}.", "yellow"), (0, 0, 0, 4)))
        lines += [Padding(Text(refusal.hint, "dim"), (0, 0, 0, 4))] if refusal.hint else []
    return lines


def _verified(verified: tuple[Verified, ...]) -> list[RenderableType]:
    if not verified:
        return []
    columns = [
        Column("verified", overflow="fold"),
        Column("backend", overflow="fold"),
        Column("worst", overflow="fold"),
        Column("error", justify="right", no_wrap=True),
        Column("limit", justify="right", no_wrap=True),
        Column("", no_wrap=True),
    ]
    # In fp32 the family's own code is the truth, which leaves nothing to say of its error.
    theirs = any(v.worst is not None and v.worst.theirs is not None for v in verified)
    columns[4:4] = [Column("family's", justify="right", no_wrap=True)] if theirs else []
    table = _table(*columns)
    for v in verified:
        if v.worst is None:
            table.add_row(v.pattern, v.backend, Text("not run", "yellow"))
            continue
        numbers = (v.worst.ours, v.worst.theirs, v.worst.limit) if theirs else (v.worst.ours, v.worst.limit)
        mark = Text("ok", "green") if v.ok else Text("✗", "bold red")
        table.add_row(v.pattern, v.backend, f"{v.worst.what} (of {len(v.differences)})", *map(words.error, numbers), mark)
    return [table]


def _backends(rows: tuple[BackendRow, ...]) -> list[RenderableType]:
    table = _table(Column("backends", no_wrap=True), Column("for", overflow="fold"), Column("", overflow="fold"))
    for row in rows:
        there = Text.assemble(("ok", "green"), (f"  {row.serves}", "dim"))
        table.add_row(row.name, row.table, there if row.why_not is None else Text(row.why_not, "yellow"))
    return [table]


def _tables(rows: tuple[BackendRow, ...]) -> list[RenderableType]:
    """The backends of each table on one line: those that can serve here, and the others with what they lack."""
    table = _table(Column("backends", no_wrap=True), Column("here", overflow="fold"), Column("not here", overflow="fold"))
    by_table: dict[str, list[BackendRow]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    for name, group in by_table.items():
        there = ", ".join(row.name for row in group if row.why_not is None)
        table.add_row(name, Text(there, "green"), Text(words.missing(group), "yellow"))
    return [table]


def _bullets(title: str, texts: tuple[str, ...], style: str = "") -> list[RenderableType]:
    if not texts:
        return []
    table = Table.grid(padding=(0, 1))
    for text in texts:
        table.add_row(Text("-", style), Text(text, style))
    return [Text(title, f"bold {style}".strip()), Padding(table, (0, 0, 0, 2))]


def _fact(name: str, value: str, style: str = "") -> RenderableType:
    table = Table.grid(Column(width=6), Column(overflow="fold"), padding=(0, 2))
    table.add_row(Text(name, "bold"), Text(value, style))
    return table


class _Plain:
    """A view without the control characters that names in it may hold: the one place where text goes to a terminal."""

    def __init__(self, view: RenderableType):
        self.view = view

    def __rich_console__(self, target: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in target.render(self.view, options):
            yield Segment(words.plain(text), style, control)


class _Line:
    """Pieces of text two blanks apart; a line ends between pieces, not inside one that fits on the next line."""

    def __init__(self, pieces: list[tuple[str, str]]):
        self.pieces = pieces

    def __rich_console__(self, target: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for text, style in self.pieces:
            if line and line.cell_len + 2 + len(text) > options.max_width:
                yield line
                line = Text("  ")
            elif line:
                line.append("  ")
            line.append(text, style)
        yield line
