"""The rows of `bench/step.py` as a table, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "transformers", "moepatch", "triton", "liger-kernel", "quack-kernels", "transformer-engine", "nvidia-cudnn-cu13", "nvidia-nccl-cu13")
#: Heading, key of the row, how its value is written.
_COLUMNS = (
    ("fwd+loss ms", "forward_ms", "{:.1f}"),
    ("bwd ms", "backward_ms", "{:.1f}"),
    ("AdamW ms", "optimizer_ms", "{:.1f}"),
    ("tok/s/GPU", "tokens_per_s_per_gpu", "{:,.0f}"),
    ("TFLOP/s", "tflops_per_gpu", "{:.1f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("peak GiB", "peak_gib", "{:.1f}"),
    ("activ. GiB", "activations_gib", "{:.1f}"),
    ("with AdamW", "peak_with_optimizer_gib", "{:.1f}"),
    ("GPU busy", "gpu_busy", "{:.0%}"),
    ("launches/layer", "launches_per_layer", "{:.0f}"),
    ("syncs/layer", "syncs_per_layer", "{:.1f}"),
    ("loss", "loss", "{:.4f}"),
)


def machine(device: torch.device) -> dict:
    """Where and with what it was measured."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions |= {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    return {"device": gpu, "versions": versions}


def show(rows: list[dict]) -> None:
    """One line per stack; columns that no row has are left out, and so are numbers of stacks that did not run."""
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    table = Table(title=_title(rows[0]), title_justify="left", caption_justify="left")
    table.add_column("stack", style="bold")
    for heading, *_ in columns:
        table.add_column(heading, justify="right")
    table.add_column("speed-up", justify="right")
    base = next((row["tokens_per_s_per_gpu"] for row in rows if row["status"] == "ok"), None)
    for row in rows:
        if row["status"] != "ok":
            continue
        cells = [pattern.format(row[key]) if row.get(key) is not None else "–" for _, key, pattern in columns]
        table.add_row(row["stack"], *cells, f"{row['tokens_per_s_per_gpu'] / base:.2f}×")
    console = Console(width=max(160, Console().width))
    if base is not None:
        console.print(table)
    for row in rows:
        if row["status"] != "ok":
            console.print(f"{row['stack']}: {row['status']}, {row['why']}", markup=False, highlight=False)
    _show_waterfall(rows, console)


def _show_waterfall(rows: list[dict], console: Console) -> None:
    """Milliseconds of a step by category, stacks side by side."""
    shown = [row for row in rows if "waterfall_ms" in row]
    if not shown:
        return
    table = Table(title="ms of a step by category (overlaps counted once)", title_justify="left")
    table.add_column("category", style="bold")
    for row in shown:
        table.add_column(row["stack"], justify="right")
    times = [{**row["waterfall_ms"], **({"idle": row["idle_ms"]} if "idle_ms" in row else {})} for row in shown]
    for category in dict.fromkeys(kind for time in times for kind in time):
        table.add_row(category, *(f"{time[category]:.2f}" if category in time else "–" for time in times))
    console.print(table)


def _title(row: dict) -> str:
    if "layers" not in row:
        return row["model"]
    model = f"{'tiny ' if row['tiny'] else ''}{row['model']}, {row['layers']} layers"
    size = f"{model}, batch {row['batch']} × {row['seq']}, {row['dtype']}, {row['routing']} routing"
    recompute = ", activation checkpointing" if row["checkpointing"] else ""
    versions = row["versions"]
    return f"{size}{recompute}; {row['ranks']} × {row['device']}, ep={row['ep']}; torch {versions['torch']}, transformers {versions['transformers']}"
