"""Times one expert layer, from routing to combined output, forward and backward: transformers' functions and moepatch's backends.

    python bench/experts.py                        every shape that fits the machine
    python bench/experts.py qwen3-30b-a3b --tokens 4096 --repeats 20

Prints a table and, with --json FILE, one JSON line per measurement with machine and versions. All stacks run in one process on the same
weights, tokens and balanced random routing; times are medians.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch
import transformers
from layer_timing import gradients, saved_mib, timed
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moepatch

SHAPES = {
    "tiny": (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=128, moe_intermediate_size=64, num_experts=16), 4),
    "qwen3-30b-a3b": (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128), 8),
    "qwen3-30b-a3b, 64 local": (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=64), 8),
    "gpt-oss-20b": (GptOssExperts, GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32), 4),
    "nemotron-3-nano": (NemotronHExperts, NemotronHConfig(hidden_size=2688, moe_intermediate_size=1856, n_routed_experts=128), 6),
}
def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=None, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, nargs="*", default=None)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="append one JSON line per measurement to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = arguments.shapes or (list(SHAPES)[1:] if device.type == "cuda" else ["tiny"])
    rows = []
    for name in names:
        for tokens in arguments.tokens or ([4096, 16384] if device.type == "cuda" else [512]):
            rows += measure(name, tokens, arguments.repeats, device)
    show(rows)
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(name: str, tokens: int, repeats: int, device: torch.device) -> list[dict]:
    """One row per stack. Times in ms, memory in MiB, speed in TFLOP/s of the layer's six GEMMs."""
    cls, config, top_k = SHAPES[name]
    config._experts_implementation = "grouped_mm"
    experts = cls(config).to(device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    count, hidden = experts.down_proj.shape[0], config.hidden_size
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = balanced(tokens, top_k, count).to(device)
    weights = torch.rand(tokens, top_k, device=device, dtype=torch.bfloat16).add_(0.1).requires_grad_()
    grad = torch.randn_like(x)
    flops = 3 * 2 * tokens * top_k * (experts.down_proj.numel() + (experts.up_proj if hasattr(experts, "up_proj") else experts.gate_up_proj).numel()) / count
    rows = []
    for stack in stacks(experts, tokens):
        source, backend = stack.split()
        if source == "moepatch":
            moepatch.optimize(experts, experts=backend, measure=False)
        else:
            config._experts_implementation = backend
        row = {"shape": name, "tokens": tokens, "stack": stack}
        try:
            row |= timings(experts, x, ids, weights, grad, repeats, flops, device)
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0][:120]
        rows.append({**row, **machine(device)})
        if source == "moepatch":
            moepatch.restore(experts)
        config._experts_implementation = "grouped_mm"
    return rows


def stacks(experts: nn.Module, tokens: int) -> list[str]:
    """transformers' own functions, then every backend that serves this layer here. The loop over experts only where it is bearable."""
    (pattern,) = moepatch.plan(experts, measure=False).patterns
    served = [f"moepatch {backend}" for backend in reversed(pattern.available)]
    return [*(["transformers eager"] if tokens <= 4096 else []), "transformers grouped_mm", *served]


def timings(experts, x, ids, weights, grad, repeats, flops, device) -> dict:
    """From routing to combined output, forward and backward: on the wall when calls follow each other, and on the device alone."""
    leaves = [x, weights, *experts.parameters()]
    both = timed(lambda i: gradients([experts(x, ids, weights)], leaves, [grad]), repeats, device)
    forward = timed(lambda i: experts(x, ids, weights), repeats, device)
    kept = saved_mib(lambda: experts(x, ids, weights), device)
    return {
        "forward_ms": round(forward.ms, 3),
        "ms": round(both.ms, 3),
        "device_ms": round(both.busy_ms, 3),
        "kernels": both.launches,
        "kept_mib": None if kept is None else round(kept, 1),
        "tflops": round(flops / both.ms / 1e9, 1),
        "repeats": repeats,
        "routing": "balanced, random distinct experts",
    }


def balanced(tokens: int, top_k: int, experts: int, seed: int = 0) -> torch.Tensor:
    """``ids [T, K]``: distinct experts for each token, random, with loads that differ by at most one round of dealing."""
    generator = torch.Generator().manual_seed(seed)
    per_deal = experts // top_k
    deals = [torch.randperm(experts, generator=generator)[: per_deal * top_k].view(per_deal, top_k) for _ in range(-(-tokens // per_deal))]
    return torch.cat(deals)[:tokens]


def machine(device: torch.device) -> dict:
    """Where and with what it was measured."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": gpu, "torch": torch.__version__, "transformers": transformers.__version__, "moepatch": moepatch.__version__}


def show(rows: list[dict]) -> None:
    """The rows as a table."""
    columns = ("shape", "tokens", "stack", "forward_ms", "ms", "device_ms", "kernels", "tflops", "kept_mib", "error")
    table = Table(*columns, title=f"expert layer, bf16, {rows[0]['device']}, torch {rows[0]['torch']}, transformers {rows[0]['transformers']}")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
