"""What every test here needs of its process: `make test-frameworks` runs them, in an environment of its own.

A file begins with ``pytest.importorskip("deepspeed")`` or the like, which says in words what is not installed. Helpers of tests/ (`zoo`,
`ranks`, `compare`) are importable: tests/conftest.py, which pytest reads before this file, puts that folder on the path. Ranks inherit the
variables: their server is started by the first of them.
"""

from __future__ import annotations

import os

# DeepSpeed compiles its operators when it first wants one, for a minute or more each. On the CPU, ZeRO itself needs none; its communication
# takes a compiled one where it can be built, and torch's gloo where it says that it cannot.
for name, value in {
    "DS_ACCELERATOR": "cpu",  # not asked for a device, and without its warning
    "DS_SKIP_CUDA_CHECK": "1",  # an nvcc of another version than torch's is no reason to stop: nothing is compiled
    "DS_BUILD_OPS": "0",
    "DS_IGNORE_CUDA_DETECTION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "HF_DATASETS_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)
