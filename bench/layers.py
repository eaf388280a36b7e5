"""Times the dense half of models layer by layer, forward and backward: the family's own code, every backend of moepatch, the floor.

    python bench/layers.py                                   every kind of every model, and the kernels
    python bench/layers.py Qwen3-30B-A3B --kinds norm mlp --json layers.jsonl
    python bench/layers.py --only kernels

A layer is a copy of the model's own module with random weights; all stacks of a layer run in one process on the same input. Times are
medians. *ms* is the time from call to call, *device* what the kernels take, *floor* the time in which the machine could do the FLOPs or move
the bytes at the rate of a large GEMM or a large copy, both measured at the start.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator

import layer_kernels
import torch
import transformers
from layer_floors import floor_ms
from layer_timing import Ceilings, ceilings, gradients, on_device, saved_mib, timed, wall_ms
from models import CONFIGS, make_config
from rich.console import Console
from rich.table import Table
from step_weights import meta_model
from torch import Tensor, nn

import moepatch
from moepatch import trial
from moepatch.bench import attention_function, random_weights
from moepatch.kinds import KINDS
from moepatch.piece import piece
from moepatch.planning import Pattern

#: So many layers show every kind of module that a model has.
LAYERS = {"Nemotron-3-Nano-30B-A3B": 6, "gpt-oss-20b": 2}
MODELS = ("Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V3", "GLM-4.5-Air", "Nemotron-3-Nano-30B-A3B")


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--kinds", nargs="*", default=None, help=f"of {', '.join(k for k, kind in KINDS.items() if kind.dense)}")
    parser.add_argument("--only", choices=("layers", "kernels", "remainder"), default=None)
    parser.add_argument("--tokens", type=int, default=None, help="of the sequence; 4096 on a GPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="append one JSON line per measurement to this file")
    parser.add_argument("--tiny", action="store_true", help="narrow models, for a try on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = arguments.tokens or (4096 if device.type == "cuda" else 64)
    machine = ceilings(device, torch.bfloat16)
    print(f"copy {machine.copy / 1e9:.2f} TB/s, GEMM {machine.flops / 1e9:.0f} TFLOP/s")
    for part, measured in _parts(arguments, tokens, device, machine):
        show(part, measured)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps({**row, **_facts(device)}) + "\n" for row in measured)


def _parts(arguments, tokens: int, device: torch.device, machine: Ceilings) -> Iterator[tuple[str, list[dict]]]:
    only = arguments.only
    if only in (None, "kernels"):
        yield "kernels", list(layer_kernels.measure(tokens, arguments.repeats, device, machine))
    if only in (None, "remainder"):
        yield "everything of a decoder layer but its experts", list(remainder(tokens, arguments.repeats, device, arguments.tiny))
    for name in arguments.models if only in (None, "layers") else ():
        yield name, list(layers(name, arguments.kinds, tokens, arguments.repeats, device, machine, arguments.tiny))


def layers(name: str, kinds: list[str] | None, tokens: int, repeats: int, device: torch.device, machine: Ceilings, tiny: bool) -> Iterator[dict]:
    """One row for each stack of each pattern of a model's dense half."""
    model = meta_model(make_config(name, LAYERS.get(name, 1), tiny), torch.bfloat16)
    plan = moepatch.plan(model, measure=False)
    for pattern in plan.patterns:
        kind = KINDS[pattern.site.kind]
        if not kind.dense or kind.bench is None or kinds and kind.name not in kinds:
            continue
        matrices = sum(p.numel() for p in model.get_submodule(pattern.site.fqn).parameters() if p.ndim > 1) if kind.stand_in is None else 0
        least = floor_ms(kind.name, pattern.site.spec, matrices, tokens, 2, machine)
        attention = attention_function(plan) if kind.name in ("attention_block", "latent") else None
        for backend in [None, *pattern.available]:
            yield {"part": "layer", "model": name, "layer": pattern.name, "spec": pattern.site.spec.describe(), "tokens": tokens} | _stack(
                model, pattern, backend, attention, tokens, repeats, device, least
            )


def _stack(
    model: nn.Module, pattern: Pattern, backend: str | None, attention: str | None, tokens: int, repeats: int, device: torch.device, least: float
) -> dict:
    """A row. An attention module that is patched calls the backend `attention`, the family's own what the model is configured for."""
    kind = KINDS[pattern.site.kind]
    stack = "transformers" if backend is None else f"moepatch {backend}" + (f", {attention}" if attention else "")
    try:
        eager = trial.eager_forward if backend is None and kind.stand_in is None else None
        timed_piece = piece(model, pattern, backend, tokens, device, random_weights(device), attention=attention, forward=eager)
        outputs, leaves = timed_piece.forward, timed_piece.leaves
        cotangents = [torch.randn_like(o) for o in outputs()]
        time_both = timed(lambda i: gradients(outputs(), leaves, cotangents), repeats, device)
        time_forward = timed(lambda i: outputs(), repeats, device)
        kept = saved_mib(outputs, device)
    except Exception as error:  # one that cannot run is a row of the table, not the end of it
        return {"stack": stack, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    return {
        "stack": stack,
        "forward_ms": round(time_forward.ms, 4),
        "ms": round(time_both.ms, 4),
        "device_ms": round(time_both.busy_ms, 4),
        "launches": time_both.launches,
        "kept_mib": None if kept is None else round(kept, 1),
        "floor_ms": round(least, 4),
    }


class _NoExperts(nn.Module):
    """Stands where the mixture of experts was, so that what remains of a decoder layer can be timed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def remainder(tokens: int, repeats: int, device: torch.device, tiny: bool) -> Iterator[dict]:
    """A decoder layer of Qwen3-30B-A3B without its mixture of experts: norms, attention with its projections, residual additions."""
    spec = f"H={make_config('Qwen3-30B-A3B', 1, tiny).hidden_size}"
    runs = {stack: _decoder_layer(stack, tokens, device, tiny) for stack in ("transformers", "moepatch")}
    walls = {stack: [wall_ms(lambda i, run=run: run(), repeats, device) for run in (forward, both)] for stack, (forward, both) in runs.items()}
    for stack, (forward, both) in runs.items():
        row = {"part": "remainder", "model": "Qwen3-30B-A3B", "layer": "decoder layer without experts", "spec": spec, "tokens": tokens, "stack": stack}
        busy_ms, launches = on_device(lambda i, run=both: run(), repeats, device)
        row |= {"forward_ms": walls[stack][0], "ms": walls[stack][1], "device_ms": busy_ms or walls[stack][1], "launches": launches}
        yield row | {"kept_mib": saved_mib(forward, device)}


def _decoder_layer(stack: str, tokens: int, device: torch.device, tiny: bool) -> tuple[Callable[[], list[Tensor]], Callable[[], object]]:
    """Its forward, and its forward and backward."""
    model = meta_model(make_config("Qwen3-30B-A3B", 1, tiny), torch.bfloat16)
    model.model.layers[0].mlp = _NoExperts()
    model = replica_on(model, device)
    if stack == "moepatch":
        moepatch.optimize(model)
    layer = model.model.layers[0]
    x = torch.randn(1, tokens, model.config.hidden_size, device=device).to(torch.bfloat16).requires_grad_()
    positions = torch.arange(tokens, device=device)[None]
    rotary = model.model.rotary_emb(x, positions)
    leaves, cotangent = [x, *layer.parameters()], torch.randn_like(x)

    def outputs() -> list[Tensor]:
        made = layer(x, position_embeddings=rotary, position_ids=positions, attention_mask=None)
        return [made[0] if isinstance(made, tuple) else made]

    return outputs, lambda: gradients(outputs(), leaves, [cotangent])


def replica_on(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of the meta device with memory and random weights."""
    model.to_empty(device=device)
    fill = random_weights(device)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(fill(p, tuple(p.shape)))
    # Tables that are no parameters were lost with the memory that the meta device does not have.
    for module in model.modules():
        if "inv_freq" in module._buffers:
            fresh = type(module)(model.config)
            module._buffers.update({name: buffer.to(device) for name, buffer in fresh._buffers.items()})
    return model


def show(title: str, rows: list[dict]) -> None:
    """Prints a table."""
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), title_justify="left", title_style="bold")
    for column in ("layer", "stack", "fwd ms", "ms", "device", "floor", "of floor", "kernels", "kept MiB", ""):
        justify = "left" if column in ("layer", "stack", "") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    before = None
    for row in rows:
        label = f"{row['layer']}  {row['spec']}" if (row["layer"], row["spec"]) != before else ""
        before = (row["layer"], row["spec"])
        if "error" in row:
            table.add_row(label, row["stack"], *[""] * 7, row["error"])
            continue
        least = row.get("floor_ms")
        share = "" if not least else f"{100 * least / row['device_ms']:.0f} %"
        numbers = [_number(row.get(key)) for key in ("forward_ms", "ms", "device_ms", "floor_ms")]
        kept = row.get("kept_mib")
        table.add_row(label, row["stack"], *numbers, share, str(row["launches"]), "" if kept is None else f"{kept:.0f}", row.get("note", ""))
    Console(width=190).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _facts(device: torch.device) -> dict:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, moepatch)}
    return {"machine": gpu, **versions, "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    main()
