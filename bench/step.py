"""Times training steps of whole models: stacks side by side, on the same shape, weights, tokens and routing, in one run.

    python bench/step.py --model Qwen3-30B-A3B --layers 8
    python bench/step.py --model gpt-oss-20b --layers 12 --stacks transformers moepatch --profile --out results.jsonl --plot results.png
    torchrun --nproc-per-node 2 bench/step.py --model Qwen3-30B-A3B --optimizer --out results.jsonl
    python bench/step.py --tiny --repeats 3                          a try without a GPU

Forward with loss and backward are timed apart on the device, medians of the slowest rank; tok/s, TFLOP/s and MFU are of both together, memory
is of the fullest rank. Gradients are set to None between steps and no optimizer runs, unless `--optimizer` times it apart. FLOPs are counted by a formula
(`models.flops_per_token`), the same for every stack. A stack that is not installed is skipped, one that fails or takes too long (`--timeout`) is reported,
and the others go on; with `--isolate` each has processes of its own, which also survives a stack that hangs below Python. Rows are printed and written as
soon as they are known, and stderr says what is being done. ``seconds`` of a row are those of building, filling, patching (for moepatch with its measuring
of backends, whose parts are ``patch_seconds``), warming up, timing and profiling; none of them is part of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import step_measure
import torch
import torch.distributed as dist
from models import CONFIGS, flops_per_token, make_config
from stack_base import NotServed, OwnModel, Setting, forced
from stacks import STACKS, available, undone
from step_progress import Progress, limited
from step_table import machine, show
from step_weights import materialise, meta_model

import moepatch
from moepatch.estimate import estimate
from moepatch.planning import make_plan
from moepatch.routing import balanced_deal, balanced_routing, hot_deal, hot_routing

#: For transformers' models, patched or not, and for models of a stack's own.
ROUTINGS = {"balanced": (balanced_routing, balanced_deal), "hot": (hot_routing, hot_deal)}


_OPTIONS = "for moepatch.optimize in the stack moepatch, such as loss=none; with a name in front for another stack, such as automodel.attn=sdpa"


def main(argv: list[str] | None = None) -> list[dict]:
    """Parses the command line, measures, prints, writes. Returns the rows."""
    arguments = _parse(argv)
    # NVLink multicast is not to be had on every host, and NCCL fails where it tries.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rows = _isolated(arguments) if arguments.isolate else _together(arguments)
    if rows and int(os.environ.get("RANK", 0)) == 0:
        if not arguments.quiet:
            show(rows)
        if arguments.plot:
            _plot(rows, arguments.plot)
    return rows


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-30B-A3B", choices=sorted(CONFIGS))
    parser.add_argument("--layers", type=int, help="a slice of the model: its first so many layers")
    parser.add_argument("--batch", type=int, default=1, help="sequences of each rank")
    parser.add_argument("--seq", type=int, help="tokens of a sequence; 4096 by default, 64 if tiny")
    parser.add_argument("--routing", default="balanced", choices=["native", *ROUTINGS])
    parser.add_argument("--stacks", nargs="*", default=list(STACKS), choices=sorted(STACKS), metavar="STACK", help=f"of {', '.join(STACKS)}")
    parser.add_argument("--ep", type=int, help="over how many ranks the experts of a layer are spread; all by default")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help=_OPTIONS)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--optimizer", action="store_true", help="time an AdamW step too")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--profile", action="store_true", help="sort the time of a step by category")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="narrow layers, few of them")
    parser.add_argument("--isolate", action="store_true", help="each stack in processes of its own")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a stack may take before it is given up")
    parser.add_argument("--out", help="append one JSON line per stack to this file")
    parser.add_argument("--plot", help="write a PNG; with --profile a second one, NAME-waterfall.png")
    parser.add_argument("--quiet", action="store_true", help="no table")
    arguments = parser.parse_args(argv)
    arguments.seq = arguments.seq or (64 if arguments.tiny else 4096)
    arguments.given = sys.argv[1:] if argv is None else argv
    return arguments


def _together(arguments: argparse.Namespace) -> list[dict]:
    """All stacks one after another in this process."""
    setting = _start(arguments)
    with Progress(arguments.model, _rank() == 0)("counting parameters and FLOPs"):
        shape = _shape(arguments)
    rows = []
    try:
        for name in arguments.stacks:
            progress = Progress(name, _rank() == 0)
            row = {"stack": name, **_row(name, arguments, setting, shape, progress), "seconds": progress.seconds, **_facts(arguments, setting)}
            rows.append(row)
            if _rank() == 0:
                _write(arguments.out, row)
            progress.say(_in_words(row))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return rows


def _isolated(arguments: argparse.Namespace) -> list[dict]:
    """Each stack in a process of its own, on every rank; the next one begins when all of this rank's have ended."""
    given = [word for word in arguments.given if word != "--isolate"]
    rows = []
    for index, name in enumerate(arguments.stacks):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "row")
            environment = dict(os.environ)
            if "MASTER_PORT" in environment:
                # Children meet by themselves: the store that torchrun holds still belongs to their parents.
                environment |= {"MASTER_PORT": str(int(environment["MASTER_PORT"]) + 1 + index), "TORCHELASTIC_USE_AGENT_STORE": "False"}
            command = [sys.executable, __file__, *given, "--stacks", name, "--out", str(out), "--plot", "", "--quiet"]
            began = time.monotonic()
            code = subprocess.run(command, env=environment, check=False).returncode
            seconds = time.monotonic() - began
            found = [{**json.loads(line), "command": _command(arguments)} for line in out.read_text().splitlines()] if out.exists() else []
        if int(os.environ.get("RANK", 0)) == 0:
            for row in found or [_lost(name, code, seconds, arguments)]:
                rows.append(row)
                _write(arguments.out, row)
    return rows


def _lost(name: str, code: int, seconds: float, arguments: argparse.Namespace) -> dict:
    """The row of a stack whose process has written none: it died, or it was ended because it was too slow or waited for ever."""
    why = f"its process ended with {code}"
    if seconds > arguments.timeout:
        why = f"took longer than {arguments.timeout:g} s (--timeout), or waited for ever; its traceback says where it was"
    layers = make_config(arguments.model, arguments.layers, arguments.tiny).num_hidden_layers
    return {"stack": name, "status": "failed", "why": why, "layers": layers, **_facts(arguments, _setting(arguments))}


def _setting(arguments: argparse.Namespace) -> Setting:
    """Of the run, as torchrun and the command line say."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    return Setting(world, arguments.ep or world, device, _options(arguments.options))


def _start(arguments: argparse.Namespace) -> Setting:
    """Joins the ranks that torchrun has started, if it has."""
    setting = _setting(arguments)
    gpu = setting.device.type == "cuda"
    if gpu:
        torch.cuda.set_device(setting.device)
    if setting.world > 1:
        patience = datetime.timedelta(seconds=arguments.timeout)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=patience, device_id=setting.device if gpu else None)
    return setting


def _options(words: list[str]) -> dict:
    """``NAME=VALUE`` words as keyword arguments."""
    known = {"none": None, "true": True, "false": False}
    pairs = (word.partition("=") for word in words)
    return {name: known.get(value.lower(), value) for name, _, value in pairs}


def _shape(arguments: argparse.Namespace) -> dict:
    """Facts of the model that all stacks share."""
    config = make_config(arguments.model, arguments.layers, arguments.tiny)
    model = meta_model(config, getattr(torch, arguments.dtype))
    plan = make_plan(model)
    sizes = estimate(model, replace(plan, patterns=plan.mixture))
    flops = flops_per_token(model, config, sizes.active_params, arguments.seq)
    return {"layers": config.num_hidden_layers, "params": sizes.total_params, "active_params": sizes.active_params, "gflops_per_token": round(flops / 1e9, 4)}


def _row(name: str, arguments: argparse.Namespace, setting: Setting, shape: dict, progress: Progress) -> dict:
    """Measures one stack, whatever becomes of it, and cleans up after it."""
    why_not = available(name, setting)
    if why_not is not None:
        return {"status": "skipped", "why": why_not, **shape}
    try:
        # What stops on one rank alone would leave the others waiting.
        with limited(arguments.timeout, gently=setting.world == 1):
            return {"status": "ok", **_measured(name, arguments, setting, shape, progress), **shape}
    except NotServed as reason:
        return {"status": "skipped", "why": str(reason), **shape}
    except Exception as error:  # whatever a stack does wrong is its result, and the others go on
        traceback.print_exc()
        return {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", **shape}
    finally:
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(name: str, arguments: argparse.Namespace, setting: Setting, shape: dict, progress: Progress) -> dict:
    with progress("build"):
        model = meta_model(make_config(arguments.model, arguments.layers, arguments.tiny), getattr(torch, arguments.dtype))
    # What earlier stacks have not given back would count as this one's; --isolate avoids it.
    left_over = {"left_over_gib": step_measure.held(setting.device)}
    with undone(model):
        model = _prepared(name, model, arguments, setting, progress)
        if arguments.checkpointing:
            _enable_checkpointing(model)
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + _rank())
        ids = torch.randint(model.config.vocab_size, (arguments.batch, arguments.seq), generator=generator).to(setting.device)
        flops = shape["gflops_per_token"] * 1e9
        plan = step_measure.Plan(arguments.warmup, arguments.repeats, arguments.optimizer, arguments.profile, flops, shape["layers"])
        with contextlib.ExitStack() as routing:
            if isinstance(model, OwnModel):
                routing.callback(model.close)
            with progress("routing"):
                routing.enter_context(_routing(arguments.routing, model, arguments.seed))
            return {**left_over, **_used(model), **step_measure.measure(model, ids, plan, progress)}


def _prepared(name: str, model, arguments: argparse.Namespace, setting: Setting, progress: Progress):
    """The model as the stack trains it, with its weights: on one rank most stacks get them, on several only what is left to this rank is filled."""

    def fill() -> None:
        with progress("fill"):
            if isinstance(model, OwnModel):
                model.fill(setting.device, arguments.seed)
            else:
                materialise(model, setting.device, arguments.seed)
            step_measure.wait(setting.device)

    first = STACKS[name].weights_first
    first = setting.world == 1 if first is None else first
    if first:
        fill()
    with progress("patch"):
        model = STACKS[name].prepare(model, setting)
        step_measure.wait(setting.device)
    if not first:
        fill()
    return model


def _routing(name: str, model, seed: int) -> contextlib.AbstractContextManager:
    if name == "native":
        return contextlib.nullcontext()
    of_hf, deal = ROUTINGS[name]
    return forced(model, deal(seed)) if isinstance(model, OwnModel) else of_hf(model, seed)


def _enable_checkpointing(model) -> None:
    """Newer versions of transformers call it by another name."""
    if isinstance(model, OwnModel):
        raise NotServed("this stack is measured without activation checkpointing")
    name = "activation_checkpointing_enable" if "activation_checkpointing_enable" in dir(model) else "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": False})


def _used(model) -> dict:
    """What computes: moepatch's backends and notes, and what choosing them took, or transformers' own functions."""
    if isinstance(model, OwnModel):
        return {"uses": model.uses}
    try:
        report = moepatch.report(model)
    except moepatch.MoePatchError:
        return {"uses": [f"attention: {model.config._attn_implementation}", f"experts: {model.config._experts_implementation or 'own forward'}"]}
    backends = [f"{len(p.sites)} × {p.name} ({p.site.spec.describe()}): {p.backend}" for p in report.plan.patterns if p.backend]
    return {"uses": [*backends, *report.notes], "patch_seconds": {part: round(seconds, 2) for part, seconds in report.seconds.items()}}


def _facts(arguments: argparse.Namespace, setting: Setting) -> dict:
    """What somebody needs to run it again."""
    shared = ("model", "batch", "seq", "routing", "options", "dtype", "seed", "warmup", "repeats", "checkpointing", "tiny")
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    where = {"ranks": setting.world, "ep": setting.ep, **machine(setting.device)}
    return {**{key: vars(arguments)[key] for key in shared}, **where, "date": when, "command": _command(arguments)}


def _command(arguments: argparse.Namespace) -> str:
    """What was typed."""
    world = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if world == "1" else ["torchrun", "--nproc-per-node", world]
    return shlex.join([*launcher, "bench/step.py", *arguments.given])


def _in_words(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}, {row['why']}"
    extra = [f"{key} {row[key]}" for key in ("gpu_busy", "launches_per_layer", "syncs_per_layer", "profile_error", "waterfall_ms") if key in row]
    return ", ".join([f"{row['step_ms']} ms, {row['tokens_per_s_per_gpu']:,.0f} tok/s/GPU", *extra])


def _write(path: str | None, row: dict) -> None:
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _plot(rows: list[dict], path: str) -> None:
    try:
        from plot import comparison, waterfalls
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return
    comparison(rows, path)
    if any("waterfall_ms" in row for row in rows):
        waterfalls(rows, str(Path(path).with_suffix("")) + "-waterfall.png")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    main()
