"""Times moving tokens to the ranks of their experts and back, forward and backward: moepatch's dispatchers side by side.

    torchrun --nproc-per-node 2 bench/dispatch.py                             every dispatcher that serves here
    torchrun --nproc-per-node 8 bench/dispatch.py symm_mem all_to_all --tokens 4096 --hidden 7168 --json results.jsonl

There are no experts: what arrives is sent back as it is. Times are medians over repeats, of the slowest rank, in µs on the device, whose
queue is filled first as it is in training; `host_us` is what the forward calls take on the host, waiting for the device included. GB/s are
the bytes that one rank sends to the others (a token once per rank, there and back) over the time. Without a GPU the ranks use gloo and
tiny shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import moepatch
import moepatch.builtin  # noqa: F401  (registers the dispatchers)
from moepatch import registry


def main() -> None:
    """Parses the command line, measures, prints on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dispatchers", nargs="*", help="by name; all that serve here if none is given")
    parser.add_argument("--tokens", type=int, nargs="*", help="of each rank")
    parser.add_argument("--hidden", type=int, nargs="*")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", help="append one JSON line per measurement to this file")
    arguments = parser.parse_args()
    device = start()
    gpu = device.type == "cuda"
    rows = []
    for tokens in arguments.tokens or ([4096, 16384] if gpu else [64]):
        for hidden in arguments.hidden or ([2048, 7168] if gpu else [32]):
            for name in arguments.dispatchers or available(device):
                dispatcher = registry.compute("dispatch", name)(dist.group.WORLD, arguments.experts)
                row = measure(dispatcher, tokens, hidden, arguments.top_k, arguments.repeats if gpu else 5, device)
                rows.append({"dispatcher": name, **row, **machine(device)})
    if dist.get_rank() == 0:
        show(rows)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    dist.destroy_process_group()


def start() -> torch.device:
    """Joins the ranks that torchrun has started; the device of this one."""
    patience = datetime.timedelta(seconds=120)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=patience)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=patience, device_id=device)
    return device


def available(device: torch.device) -> list[str]:
    """Names of the dispatchers that serve here."""
    return [b.name for b in registry.backends("dispatch") if b.why_not(None, torch.bfloat16, device) is None]


def measure(dispatcher, tokens: int, hidden: int, top_k: int, repeats: int, device: torch.device) -> dict:
    """Median times in µs of random routing in bf16, and GB/s over the wire."""
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(tokens, dispatcher.num_experts, generator=generator).topk(top_k).indices.to(device)
    weights = torch.rand(tokens, top_k, generator=generator).to(device).requires_grad_()
    x = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16).requires_grad_()
    grad = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16)
    times = {"dispatch_us": [], "combine_us": [], "backward_us": [], "host_us": []}
    for _ in range(repeats + 5):
        x.grad = weights.grad = None
        queue(device)
        begin = time.perf_counter()
        marks = [mark(device)]
        received = dispatcher.dispatch(x, ids, weights)
        marks.append(mark(device))
        y = dispatcher.combine(received.x_NH, received.handle)
        marks.append(mark(device))
        times["host_us"].append((time.perf_counter() - begin) * 1e6)
        y.backward(grad)
        marks.append(mark(device))
        for kind, before, after in zip(("dispatch_us", "combine_us", "backward_us"), marks, marks[1:], strict=False):
            times[kind].append(between(before, after))
    owners = torch.div(ids, dispatcher.num_experts // world, rounding_mode="floor")
    goes = torch.stack([(owners == other).any(1) for other in range(world) if other != rank]).sum().item() if world > 1 else 0
    medians = torch.tensor([statistics.median(t[5:]) for t in times.values()] + [goes * hidden * 2.0], dtype=torch.float64, device=device)
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    *medians, sent = medians.tolist()
    forward = medians[0] + medians[1]
    return {
        "tokens": tokens,
        "hidden": hidden,
        **{kind: round(value, 1) for kind, value in zip(times, medians, strict=True)},
        "forward_us": round(forward, 1),
        "mb_each_way": round(sent / 1e6, 2),
        "forward_gb_s": round(2 * sent / forward / 1e3, 1),
        "backward_gb_s": round(2 * sent / medians[2] / 1e3, 1),
        "top_k": top_k,
        "experts": dispatcher.num_experts,
        "ranks": world,
        "repeats": repeats,
        "routing": "random distinct experts",
    }


def queue(device: torch.device) -> None:
    """A millisecond of work for the device, so that launches do not count, and then a point where all ranks meet, so that delays do not."""
    if device.type == "cuda":
        torch.cuda._sleep(2_000_000)
    dist.all_reduce(torch.zeros(1, device=device))


def mark(device: torch.device):
    """A point in time, on the device where there is one."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before, after) -> float:
    """µs."""
    if isinstance(before, float):
        return (after - before) * 1e6
    after.synchronize()
    return before.elapsed_time(after) * 1e3


def machine(device: torch.device) -> dict:
    """Where and with what it was measured."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": gpu, "torch": torch.__version__, "moepatch": moepatch.__version__}


def show(rows: list[dict]) -> None:
    """The rows as a table."""
    columns = ("tokens", "hidden", "dispatcher", "dispatch_us", "combine_us", "forward_us", "forward_gb_s", "backward_us", "backward_gb_s")
    columns += ("host_us",)
    first = rows[0]
    machine = f"{first['ranks']} × {first['device']}, torch {first['torch']}"
    heads = [column.replace("_gb_s", " GB/s").replace("_us", " µs") for column in columns]
    table = Table(*heads, title=f"dispatch and combine, bf16, top-{first['top_k']} of {first['experts']}, {machine}")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    main()
