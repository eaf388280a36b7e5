"""Trials compute what defines a family, whatever libraries it finds installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

#: What families import of each library.
LIBRARIES = {
    "causal_conv1d": {"": ("causal_conv1d_fn", "causal_conv1d_update")},
    "fla": {"ops.gated_delta_rule": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")},
    "mamba_ssm": {
        "ops.selective_scan_interface": ("selective_scan_fn", "mamba_inner_fn"),
        "ops.triton.selective_state_update": ("selective_state_update",),
        "ops.triton.ssd_combined": ("mamba_split_conv1d_scan_combined", "mamba_chunk_scan_combined"),
    },
}


def install(folder: Path, names: list[str]) -> None:
    """Libraries of these names whose functions fail, as those of a GPU do on the CPU."""
    for name in names:
        for path, functions in LIBRARIES[name].items():
            place = folder / name
            for part in ("", *path.split(".")):
                place = place / part
                place.mkdir(parents=True, exist_ok=True)
                (place / "__init__.py").touch()
            lines = [f"def {function}(*args, **kwargs): raise RuntimeError('{name} needs a GPU')\n" for function in functions]
            (place / "__init__.py").write_text("".join(lines))


SCRIPT = """
import json, sys, zoo, moepatch
for name in sys.argv[1:]:
    model, failure = zoo.build(name), None
    try:
        model(**zoo.inputs(name, model))
    except RuntimeError as error:
        failure = str(error)
    print(json.dumps([failure, [[p.site.kind, *p.fqns] for p in moepatch.plan(model, measure=False).patterns]]))
"""
#: Families, the library that each is tried with, and the kind of its mixers. In a process a library is there for all of them or for none.
FAMILIES = {
    "qwen3_next": ("fla", "delta_mixer"),
    "nemotron_h": ("mamba_ssm", "ssd_mixer"),
    "jamba": ("causal_conv1d", "selective_mixer"),
}
HERE = [name for name in FAMILIES if zoo.available(name) is None]


def planned(names: list[str], folder: Path) -> dict[str, list]:
    """What families say in a process of its own when they are called on the CPU, or None, and what is served in them."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr
    return dict(zip(names, map(json.loads, run.stdout.splitlines()), strict=True))


def test_kernels_that_need_a_gpu_do_not_hide_what_a_family_computes(tmp_path):
    """And where a family finds all that its mixers need, they are left alone, and nothing else is."""
    plain = planned(HERE, tmp_path / "nothing")
    assert plain and all(failure is None and FAMILIES[name][1] in str(plan) for name, (failure, plan) in plain.items())
    # What jamba is tried with, the other two would find, too.
    for folder, names in (("some", [name for name in HERE if name != "jamba"]), ("other", ["jamba"])):
        install(tmp_path / folder, [FAMILIES[name][0] for name in names])
        for name, found in planned(names, tmp_path / folder).items():
            assert found == [f"{FAMILIES[name][0]} needs a GPU", plain[name][1]]
    install(tmp_path / "all", list(LIBRARIES))
    failure, found = planned(["jamba"], tmp_path / "all")["jamba"]
    mixers = [fqn for kind, *fqns in plain["jamba"][1] for fqn in fqns if kind.endswith("_mixer")]
    assert failure and mixers and served(found) >= {site for site in served(plain["jamba"][1]) if site[1] not in mixers}


def served(plan: list) -> set[tuple[str, str]]:
    return {(kind, fqn) for kind, *fqns in plan for fqn in fqns}
