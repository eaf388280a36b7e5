"""Several GPUs: numerics and endurance of every dispatcher, on real hardware.

    torchrun --nproc-per-node 2 tests/multi_gpu.py --dispatch all_to_all symm_mem deep_ep --json results.jsonl
    torchrun --nproc-per-node 2 tests/multi_gpu.py --dispatch symm_mem --families qwen3_moe --steps 60        the short form, about a minute

For each dispatcher: an expert layer in bf16 against the same layer on one GPU and against fp32 (three-way), repeated runs bit for bit, a whole
model's gradients, and a soak of many steps with random routing, one hot expert and ranks that nobody sends to, whose memory must not grow. On a
machine without GPUs it runs over gloo with tiny sizes, which proves the script. One JSON line per check; exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import compare
import torch
import torch.distributed as dist
import transformers
import zoo
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moepatch
from moepatch import registry

ROUTINGS = ("random", "hot", "empty rank", "sentinels")


class Holder(nn.Module):
    """A model that is one experts module."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)


def experts(hidden: int, width: int, count: int, dtype: torch.dtype, device: torch.device) -> Holder:
    """One expert layer with the same random weights on every rank."""
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=count)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(torch.bfloat16).to(dtype)
    return Holder(module).to(device)


def routing(kind: str, tokens: int, top_k: int, count: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of one rank's tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    scores = torch.rand(tokens, count, generator=generator)
    if kind == "hot":
        scores[:, 0] += 1
    if kind == "empty rank":
        scores[:, : count // dist.get_world_size()] -= 2  # the first rank's experts
    ids = scores.topk(top_k).indices
    if kind == "sentinels":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, count, ids)
    return ids, torch.rand(ids.shape, generator=generator) + 0.1


def step(model: nn.Module, kind: str, shape: argparse.Namespace, dtype, device, ranks: list[int], seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Forward and backward of the tokens of some ranks; results by name."""
    generator = torch.Generator().manual_seed(7 + seed)
    all_x = torch.randn(dist.get_world_size(), shape.tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    all_g = torch.randn(dist.get_world_size(), shape.tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    parts = [routing(kind, shape.tokens, shape.top_k, shape.experts, rank, seed) for rank in ranks]
    x = all_x[ranks].flatten(0, 1).to(device, dtype).requires_grad_()
    ids, weights = (torch.cat(t).to(device) for t in zip(*parts, strict=True))
    weights = weights.requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x, ids, weights)
    y.backward(all_g[ranks].flatten(0, 1).to(device, dtype) * scale)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}


def numerics(name: str, mesh, shape, device) -> dict:
    """Three-way: this rank's tokens through sharded experts, through all experts on one GPU in bf16, and in fp32."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = moepatch.optimize(experts(shape.hidden, shape.width, shape.experts, torch.bfloat16, device), mesh, dispatch=name, fsdp=False)
    single = moepatch.optimize(experts(shape.hidden, shape.width, shape.experts, torch.bfloat16, device))
    exact = moepatch.optimize(experts(shape.hidden, shape.width, shape.experts, torch.float32, device), experts="reference")
    worst, repeats = 0.0, True
    for kind in ROUTINGS:
        ours, again = (step(sharded, kind, shape, torch.bfloat16, device, [rank]) for _ in range(2))
        repeats &= all(torch.equal(local(ours[k]), local(again[k])) for k in ours)
        # Weight gradients: the mean over ranks of each rank's loss, as data parallelism has it.
        theirs = step(single, kind, shape, torch.bfloat16, device, list(range(world)), scale=1 / world)
        truth = step(exact, kind, shape, torch.float32, device, list(range(world)), scale=1 / world)
        for key, value in ours.items():
            mine, other, true = whole(value), theirs[key], truth[key]
            if key in ("y", "x", "weights"):
                part = slice(rank * shape.tokens, (rank + 1) * shape.tokens)
                other, true = other[part], true[part]
                if key != "y":
                    other, true = other * world, true * world
            worst = max(worst, compare.error(mine, true) / max(compare.error(other, true), 1e-5))
    return {"check": "numerics", "worst_error_over_single_gpu": round(worst, 3), "bit_equal_repeats": repeats, "ok": worst <= 1.5 and repeats}


def families(name: str, mesh, device, names: list[str]) -> dict:
    """Gradients of whole models in fp32, sharded by experts and FSDP2, against one process."""
    reason = registry.backend("dispatch", name).why_not(None, torch.float32, device)
    if reason is not None:
        return {"check": "families", "not_run": reason, "ok": True}
    worst = {}
    for family in names:
        reference = zoo.build(family).to(device)
        for rank in range(dist.get_world_size()):
            (zoo.loss(reference(**zoo.inputs(family, reference, seed=100 + rank))) / dist.get_world_size()).backward()
        model = moepatch.optimize(zoo.build(family).to(device), mesh, dispatch=name)
        zoo.loss(model(**zoo.inputs(family, model, seed=100 + dist.get_rank()))).backward()
        truth = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
        worst[family] = max(compare.error(whole(p.grad), truth[key]) for key, p in model.named_parameters() if key in truth)
    return {"check": "families", "worst_gradient_error_fp32": worst, "ok": max(worst.values()) <= 1e-4}


def soak(name: str, mesh, shape, device) -> dict:
    """Many steps of changing routing: no hang, and no memory that grows after the first 20."""
    model = moepatch.optimize(experts(shape.hidden, shape.width, shape.experts, torch.bfloat16, device), mesh, dispatch=name, fsdp=False)
    memory, start = {}, time.perf_counter()
    settled = min(20, shape.steps // 2)
    for i in range(shape.steps):
        step(model, ROUTINGS[i % len(ROUTINGS)], shape, torch.bfloat16, device, [dist.get_rank()], seed=i)
        if i in (settled, shape.steps - 1):
            model.zero_grad(set_to_none=True)
            memory[i] = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    first, last = memory[settled], memory[shape.steps - 1]
    return {"check": "soak", "steps": shape.steps, "seconds": round(time.perf_counter() - start, 1), "memory": [first, last], "ok": last <= first}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main() -> int:
    """Runs every check for every dispatcher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dispatch", nargs="+", default=["all_to_all"])
    parser.add_argument("--json")
    parser.add_argument("--families", nargs="*", default=["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--timeout", type=int, default=240, help="seconds until all stacks are printed and the process ends")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.timeout, exit=True)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    tiny = dict(tokens=64, hidden=64, width=32, experts=8, top_k=2)
    shape = argparse.Namespace(**(dict(tokens=512, hidden=1024, width=256, experts=32, top_k=4) if cuda else tiny), steps=arguments.steps)
    mesh = moepatch.make_mesh(ep=dist.get_world_size())
    failed = False
    for name in arguments.dispatch:
        checks = (
            functools.partial(numerics, name, mesh, shape, device),
            functools.partial(families, name, mesh, device, arguments.families),
            functools.partial(soak, name, mesh, shape, device),
        )
        for check in checks:
            result = {"dispatch": name, "ranks": dist.get_world_size(), "rank": dist.get_rank(), **check()}
            result |= {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "transformers": transformers.__version__}
            failed |= not result["ok"]
            print(json.dumps(result), flush=True)
            if arguments.json and dist.get_rank() == 0:
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(result) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
