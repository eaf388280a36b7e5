"""Draws what `bench/step.py` has measured.

    python bench/plot.py results.jsonl results.png                   speed and memory of every stack, grouped by shape
    python bench/plot.py results.jsonl waterfall.png --waterfall     where the time of a step goes, for rows with a profile
"""

from __future__ import annotations

import argparse
import json

from matplotlib.figure import Figure
from step_profile import CATEGORIES

_GREY, _INK = "#8a8f98", "#22252b"
#: A bar's width, and the least width of a group, which has to hold its label, in places of a bar.
_BAR, _NARROWEST = 0.92, 2.4
#: moepatch in one colour, the others in greys and muted tones.
_COLOURS = {
    "transformers": "#b9bec7",
    "transformers-liger": "#8f97a6",
    "transformers-ep": "#6b7383",
    "transformers-v4": "#454b57",
    "moepatch-experts": "#7cc4b5",
    "moepatch": "#0b8a74",
    "automodel": "#d9a441",
    "deepspeed": "#b5739d",
}
_KINDS = {
    "FSDP gathers": "#c9cdd4",
    "dispatch": "#9aa3b2",
    "router": "#f2c14e",
    "permute": "#f08a4b",
    "expert GEMM": "#0b8a74",
    "activation": "#8bd17c",
    "combine": "#d1495b",
    "attention": "#3d6fb6",
    "mixer": "#6c8fd1",
    "norms, rope": "#9ecae9",
    "dense GEMM": "#5b4b8a",
    "loss": "#b07aa1",
    "elementwise, copies": "#d8b08c",
    "idle": "#ffffff",
}


def main() -> None:
    """Reads JSON lines and writes a PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("png")
    parser.add_argument("--waterfall", action="store_true")
    arguments = parser.parse_args()
    with open(arguments.rows) as file:
        rows = [json.loads(line) for line in file]
    (waterfalls if arguments.waterfall else comparison)(rows, arguments.png)


def comparison(rows: list[dict], path: str) -> None:
    """Grouped bars: tok/s/GPU above, peak memory below (what the forward keeps is hatched); one group per shape, the last run of a stack counts.

    A stack that had too little memory for a shape has an empty place there that says so.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    if not measured:
        return
    groups = list(dict.fromkeys(_shape(row) for row in measured))
    stacks = [name for name in dict.fromkeys([*_COLOURS, *(row["stack"] for row in measured)]) if any(row["stack"] == name for row in measured)]
    found = {(_shape(row), row["stack"]): row for row in measured}
    without = {(_shape(row), row["stack"]) for row in rows if "OutOfMemory" in row.get("why", "")} - set(found)
    memory = any(row["peak_gib"] for row in measured)
    places, ticks, end = _places(groups, stacks, {*found, *without})
    figure = Figure(figsize=(max(7.0, 1.2 + 0.62 * end), 7.2 if memory else 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(2 if memory else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if memory else [1])[:, 0]
    for stack in stacks:
        present = [group for group in groups if (group, stack) in found]
        at, shown = [places[group, stack] for group in present], [found[group, stack] for group in present]
        values = [row["tokens_per_s_per_gpu"] for row in shown]
        bars = axes[0].bar(at, values, _BAR, label=stack, color=_COLOURS.get(stack, "#777777"))
        labels = [f"{value:,.0f}{_times(found, group, value)}" for group, value in zip(present, values, strict=True)]
        axes[0].bar_label(bars, labels, padding=2, fontsize=8, color=_INK)
        if memory:
            _memory(axes[1], at, shown, _BAR, _COLOURS.get(stack, "#777777"))
    for key in without & set(places):
        axes[0].text(places[key], 0, f" {key[1]}: out of memory", rotation=90, ha="center", va="bottom", fontsize=8, color=_GREY)
    _dress(axes[0], "tokens per second and GPU")
    if memory:
        _dress(axes[1], "peak memory, GiB\n(hatched: kept by the forward)")
    axes[-1].set_xticks(ticks, [_label(group, break_="\n") for group in groups], fontsize=8.5)
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_title(_title(measured), loc="left", fontsize=10, color=_INK)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=min(4, len(stacks)), frameon=False, fontsize=9)
    figure.savefig(path)


def _places(groups: list[tuple], stacks: list[str], shown: set[tuple]) -> tuple[dict[tuple, float], list[float], float]:
    """Where the bars of a group and a stack stand, side by side without a gap for stacks that have none; each group's middle; the right end."""
    places, ticks, end = {}, [], 0.0
    for group in groups:
        present = [stack for stack in stacks if (group, stack) in shown]
        room = max(len(present), _NARROWEST)
        for i, stack in enumerate(present):
            places[group, stack] = end + (room - len(present)) / 2 + i + 0.5
        ticks.append(end + room / 2)
        end += room + 0.8
    return places, ticks, end


def waterfalls(rows: list[dict], path: str) -> None:
    """One horizontal bar per row with a profile: milliseconds of a step by category, idle time last."""
    shown = [row for row in rows if row.get("waterfall_ms")]
    if not shown:
        return
    times = [{**row["waterfall_ms"], "idle": row.get("idle_ms", 0.0)} for row in shown]
    several = len({_shape(row) for row in shown}) > 1
    names = [row["stack"] + (f"\n{_label(_shape(row))}" if several else "") for row in shown]
    figure = Figure(figsize=(11, 2.2 + (0.95 if several else 0.7) * len(shown)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    longest = max(sum(time.values()) for time in times)
    left = [0.0] * len(shown)
    for kind in (*_order(), "idle"):
        widths = [time.get(kind, 0.0) for time in times]
        if not any(widths):
            continue
        look = {"color": _KINDS.get(kind, "#777777"), "edgecolor": "white", "linewidth": 0.6}
        if kind == "idle":
            look = {"color": "white", "edgecolor": _GREY, "hatch": "////", "linewidth": 0.6}
        bars = axes.barh(names, widths, left=left, height=0.62, label=kind, **look)
        ink = "white" if kind in ("expert GEMM", "dense GEMM", "attention", "combine") else _INK
        labels = [f"{width:.1f}" if width > 0.03 * longest else "" for width in widths]
        axes.bar_label(bars, labels, label_type="center", fontsize=7.5, color=ink, **_plate(kind))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for y, total in enumerate(left):
        axes.text(total + 0.008 * longest, y, f"{total:.1f} ms", va="center", fontsize=8.5, fontweight="bold", color=_INK)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.09 * longest)
    axes.set_xlabel("ms of a step: forward, loss and backward")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    heading = _title(shown) if several else f"{', '.join(_label(_shape(shown[0])).splitlines())}\n{_title(shown)}"
    axes.set_title(heading, loc="left", fontsize=10, color=_INK)
    figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    figure.savefig(path)


def _plate(kind: str) -> dict:
    """Numbers on hatching need a ground of their own."""
    return {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.2}} if kind == "idle" else {}


def _order() -> tuple[str, ...]:
    """The categories as a layer runs through them."""
    return tuple(kind for kind in _KINDS if kind in CATEGORIES)


def _shape(row: dict) -> tuple:
    return tuple(row[key] for key in ("model", "layers", "batch", "seq", "ranks", "ep", "routing", "checkpointing", "tiny"))


def _label(shape: tuple, break_: str = " ") -> str:
    model, layers, batch, seq, ranks, ep, routing, recompute, tiny = shape
    where = "1 rank" if ranks == 1 else f"{ranks} ranks, ep={ep}"
    checkpointing = f",{break_}checkpointing" if recompute else ""
    return f"{'tiny ' if tiny else ''}{model}\n{layers} layers, {batch} × {seq},{break_}{where}\n{routing} routing{checkpointing}"


def _title(rows: list[dict]) -> str:
    first = rows[0]
    return f"{first['device']}, {first['dtype']}, torch {first['versions']['torch']}, transformers {first['versions']['transformers']}, {first['date'][:10]}"


def _times(found: dict, group: tuple, value: float) -> str:
    """How much faster than transformers."""
    base = found.get((group, "transformers"))
    return f"\n{value / base['tokens_per_s_per_gpu']:.2f}×" if base and base["tokens_per_s_per_gpu"] != value else ""


def _memory(axes, at: list[float], rows: list[dict], width: float, colour: str) -> None:
    kept = [row["activations_gib"] for row in rows]
    rest = [row["peak_gib"] - row["activations_gib"] for row in rows]
    axes.bar(at, rest, width, color=colour)
    bars = axes.bar(at, kept, width, bottom=rest, color=colour, hatch="////", edgecolor="white", linewidth=0)
    axes.bar_label(bars, [f"{row['peak_gib']:.1f}" for row in rows], padding=2, fontsize=8, color=_INK)


def _dress(axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(y=0.18)


if __name__ == "__main__":
    main()
