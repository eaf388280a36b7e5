"""How long the first `optimize` takes on a GPU, with an empty cache, and the second one in another process; seconds by step, as JSON.

    python bench/first_use.py [--model Qwen3-30B-A3B] [--model Qwen3-8B] [--layers N]

Every optimize runs in a process of its own on random weights made on the GPU (no loading is counted). ``$MOEPATCH_CACHE``, Triton's cache and QuACK's
lie in a new folder for each model, so that the first process finds none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: Seconds that the first and the second may take.
LIMITS = (20.0, 4.0)
DENSE = {
    "Qwen3-8B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    },
}  # fmt: skip
_PACKAGES = ("torch", "transformers", "triton", "quack-kernels", "flash-attn-4", "nvidia-cutlass-dsl", "transformer-engine", "liger-kernel")
#: Where libraries keep what they compile.
_CACHES = {
    "MOEPATCH_CACHE": "moepatch", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "cache",
    "QUACK_CACHE_DIR": "quack",
}  # fmt: skip


def once(name: str, layers: int | None) -> dict:
    """One optimize in this process."""
    import torch
    from models import make_config
    from transformers import AutoConfig, AutoModelForCausalLM

    import moepatch

    if name in DENSE:
        sizes = DENSE[name] | ({"num_hidden_layers": layers} if layers else {})
        config = AutoConfig.for_model(**sizes)
    else:
        config = make_config(name, layers)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    torch.cuda.synchronize()
    start = time.perf_counter()
    moepatch.optimize(model)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    made = moepatch.report(model)
    chosen = {pattern.name: [pattern.backend, pattern.why] for pattern in made.plan.patterns}
    gib = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": round(seconds, 2), "steps": made.seconds, "gpu": torch.cuda.get_device_name(), "peak_gib": round(gib, 1), "chosen": chosen}


def twice(name: str, layers: int | None) -> dict:
    """Two processes, the first of which finds no caches; what they write to standard error comes along, for it has to say what takes long."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **{variable: str(Path(folder, part)) for variable, part in _CACHES.items()}}
        for _ in LIMITS:
            command = [sys.executable, __file__, "--once", name, *(["--layers", str(layers)] if layers else [])]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            said = [line for line in done.stderr.splitlines() if line.startswith("moepatch:")]
            if done.returncode:
                runs.append({"failed": done.stderr[-2000:], "said": said})
            else:
                runs.append({**json.loads(done.stdout.splitlines()[-1]), "said": said})
    ok = all("seconds" in run and run["seconds"] <= limit for run, limit in zip(runs, LIMITS, strict=True))
    return {"model": name, "layers": layers, "ok": ok, "first": runs[0], "second": runs[1]}


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Prints the JSON; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="Qwen3-30B-A3B and Qwen3-8B if not given")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(once(given.once, given.layers)))
        return 0
    rows = [twice(name, given.layers) for name in given.model or ("Qwen3-30B-A3B", "Qwen3-8B")]
    print(json.dumps({"versions": versions(), "limits": LIMITS, "rows": rows}, indent=1))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
