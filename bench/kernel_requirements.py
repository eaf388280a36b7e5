"""Compiles every form of the own Triton kernels for every known GPU, and writes what they need: moepatch/kernels/requirements.json and docs/gpus.md.

No GPU is needed, only Triton: ``make kernels``, or ``python bench/kernel_requirements.py [--dtypes bfloat16,float32]``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import models
import torch
import transformers
import triton
from kernel_compile import all_needs
from kernel_forms import Form, record_model, record_others, record_ssd, recording
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moepatch.gpus import GPUS
from moepatch.kernels import requirements
from moepatch.layers.mixers.backends import ssd_size
from moepatch.planning import Plan, make_plan

ROOT = Path(__file__).parents[1]
#: A GPU for every capability that is compiled for.
TARGETS = {80: "a100", 86: "rtx3090", 89: "rtx4090", 90: "h200", 100: "b200", 120: "rtx5090"}
DTYPES = ("bfloat16", "float16", "float32")
#: Layers of each model that have every kind of its modules.
LAYERS = {"Nemotron-3-Nano-30B-A3B": 8}
#: Forms that the models of `models.CONFIGS` have not: dense heads, gated attention and the delta rule, Mamba-1.
MORE = {
    "Qwen3-8B": dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=151936,
    ),
    "Qwen3-Next-80B-A3B": dict(
        model_type="qwen3_next", hidden_size=2048, intermediate_size=5120, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512, vocab_size=151936,
    ),
    "Jamba": dict(
        model_type="jamba", hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, num_experts=16,
        num_experts_per_tok=2, attn_layer_offset=2, attn_layer_period=4, vocab_size=65536,
    ),
}  # fmt: skip
SSD_SIZES = [(state, head_dim) for state in (64, 128, 256) for head_dim in (64, 128)]


def made(dtype: torch.dtype, names: list[str] | None = None) -> dict[str, tuple[nn.Module, Plan]]:
    """The models on the meta device, and what in them is matched."""
    configs = {name: models.make_config(name, LAYERS.get(name, 2)) for name in models.CONFIGS}
    configs |= {name: AutoConfig.for_model(**sizes) for name, sizes in MORE.items()}
    found = {}
    for name in configs if names is None else names:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configs[name], dtype=dtype)
        found[name] = model, make_plan(model)
    return found


def forms_for(target: str, dtype: torch.dtype, found: dict[str, tuple[nn.Module, Plan]], sizes: Sequence[tuple[int, int]] = SSD_SIZES) -> list[Form]:
    """What the models launch on a GPU; what could not be made to launch goes to standard error."""
    with recording(GPUS[target]) as recorder:
        for name, (model, plan) in found.items():
            for what, why in record_model(recorder, model, plan, (4096,)).items():
                print(f"{name}: {what}: {why}", file=sys.stderr)
        record_others(recorder, dtype, 2048, 151936, 8, 128)
        for state, head_dim in sizes if dtype != torch.float32 else ():
            record_ssd(recorder, dtype, state, head_dim)
    return list(recorder.forms.values())


def size_of(form: Form) -> str:
    """The part of the file that a form counts for."""
    if not form.kernel.startswith("kernels.ssd_jit"):
        return ""
    names = {form.function.params[at[0]].name: value for at, value in form.constants}
    return ssd_size(names["N"], names["P"])


def measured(dtypes: list[str], names: list[str] | None, targets: dict[int, str], workers: int) -> list[dict]:
    """A row for every form, dtype and target."""
    rows = []
    for dtype in dtypes:
        found = made(getattr(torch, dtype), names)
        for capability, target in targets.items():
            forms = forms_for(target, getattr(torch, dtype), found)
            for form, need in zip(forms, all_needs([(form, capability) for form in forms], workers), strict=True):
                where = {"table": form.table, "size": size_of(form), "dtype": dtype, "capability": capability, "kernel": form.kernel}
                rows.append({**where, **need, "form": form.describe(), "models": names or [*found]})
            print(f"{dtype} sm_{capability}: {len(forms)} forms", file=sys.stderr, flush=True)
    return rows


def data(rows: list[dict]) -> dict:
    """The file that the package reads: the largest needs, or words where a kernel is not compiled."""
    tables: dict = {}
    for row in rows:
        entry = tables.setdefault(row["table"], {}).setdefault(row["size"], {}).setdefault(row["dtype"], {})
        before, key = entry.get(str(row["capability"]), (0, 0)), str(row["capability"])
        if not isinstance(before, str):
            entry[key] = row["error"] if "error" in row else [max(before[0], row["shared"]), max(before[1], row["spills"])]
    return {"triton": triton.__version__, "tables": tables}


def table(rows: list[dict]) -> str:
    """docs/gpus.md."""
    capabilities = sorted({row["capability"] for row in rows})
    head = [f"sm_{c}: {', '.join(g.name for g in GPUS.values() if g.capability == divmod(c, 10))}" for c in capabilities]
    limits = " | ".join(f"{GPUS[TARGETS[c]].shared // 1024} KiB" for c in capabilities)
    lines = [
        "# Own kernels × GPUs", "",
        f"Written by `make kernels` (bench/kernel_requirements.py): every form of every Triton kernel that {', '.join(rows[0]['models'])} "
        f"launch, in {', '.join(sorted({row['dtype'] for row in rows}))}, forward and backward, compiled by Triton {triton.__version__} for each GPU; torch "
        f"{torch.__version__.split('+')[0]}, transformers {transformers.__version__}. Compiled, not run: only the H200 was tried.", "",
        "A cell has the most shared memory of a block (KiB), registers of a thread, and bytes of a thread's stack (spilled registers) of all forms. "
        f"What needs more shared memory than a GPU has, spills more than {requirements._STACK} bytes, or is not compiled, does not serve there: `why_not` "
        "says so, and another backend is taken.", "",
        "| kernel | forms | " + " | ".join(head) + " |", "|---|---|" + "---|" * len(capabilities), f"| a block may have | | {limits} |",
    ]  # fmt: skip
    for kernel, size in sorted({(row["kernel"], row["size"]) for row in rows}):
        mine = [row for row in rows if (row["kernel"], row["size"]) == (kernel, size)]
        forms = len({(row["form"], row["dtype"]) for row in mine if row["capability"] == capabilities[0]})
        cells = [_cell([row for row in mine if row["capability"] == c], c) for c in capabilities]
        lines.append(f"| `{kernel.split('.')[-2]}.{kernel.split('.')[-1]}`{' ' + size if size else ''} | {forms} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict], capability: int) -> str:
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        return f"**not compiled**: {errors[0]}"
    shared, registers, spills = (max(row[what] for row in rows) for what in ("shared", "registers", "spills"))
    words = f"{shared / 1024:.0f}, {registers}, {spills}"
    return words if shared <= GPUS[TARGETS[capability]].shared and spills <= requirements._STACK else f"**{words}: too much**"


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--models", help="only these, separated by commas")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    names = given.models.split(",") if given.models else None
    rows = measured(given.dtypes.split(","), names, TARGETS, given.workers)
    requirements._FILE.write_text(json.dumps(data(rows), indent=1, sort_keys=True) + "\n")
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "gpus.md").write_text(table(rows))


if __name__ == "__main__":
    main()
