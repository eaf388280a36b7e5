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
model = zoo.build(sys.argv[1])
try:
    model(**zoo.inputs(sys.argv[1], model))
except RuntimeError as error:
    print(error)
print(json.dumps([[p.site.kind, *p.fqns] for p in moepatch.plan(model, measure=False).patterns]))
"""


def planned(name: str, folder: Path) -> list[str]:
    """What a family says in a process of its own when it is called on the CPU, and what is served in it."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", SCRIPT, name], env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize(("name", "installed", "kind"), [
    ("qwen3_next", ["fla"], "delta_mixer"),
    ("nemotron_h", ["mamba_ssm"], "ssd_mixer"),
    ("jamba", ["causal_conv1d"], "selective_mixer"),
])  # fmt: skip
def test_kernels_that_need_a_gpu_do_not_hide_what_a_family_computes(name, installed, kind, tmp_path):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    (plain,) = planned(name, tmp_path / "nothing")
    assert kind in plain
    install(tmp_path, installed)
    assert planned(name, tmp_path) == [f"{installed[0]} needs a GPU", plain]


def test_the_rest_of_a_family_with_its_own_fast_path_is_served(tmp_path):
    """Where a family finds all that its mixers need, they are left alone, and nothing else is."""
    (plain,) = planned("jamba", tmp_path / "nothing")
    install(tmp_path, list(LIBRARIES))
    _, found = planned("jamba", tmp_path)
    mixers = [fqn for kind, *fqns in json.loads(plain) for fqn in fqns if kind.endswith("_mixer")]
    assert mixers and served(found) >= {site for site in served(plain) if site[1] not in mixers}


def served(plan: str) -> set[tuple[str, str]]:
    return {(kind, fqn) for kind, *fqns in json.loads(plan) for fqn in fqns}
