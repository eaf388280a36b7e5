"""Compiling forms of Triton kernels for GPUs that are not here, and reading what they need of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton
from kernel_forms import Form
from triton.backends.compiler import GPUTarget

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def needs(form: Form, capability: int) -> dict:
    """What a form needs on GPUs of a capability (90 for 9.0): bytes of shared memory a block, registers a thread, bytes spilled, threads.

    Raises:
        Exception: whatever Triton's compiler says. It may also end the process, see `all_needs`.
    """
    compiled = triton.compile(form.source(), target=GPUTarget("cuda", capability, 32), options=dict(form.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, _USAGE.search(usage).groups())
    return {"shared": compiled.metadata.shared, "registers": registers, "spills": stack, "threads": compiled.metadata.num_warps * 32}


def all_needs(tasks: Sequence[tuple[Form, int]], workers: int = 2) -> list[dict]:
    """`needs` of every (form, capability), or ``{"error": words}``. In other processes: a compiler that fails an assertion ends its own."""
    shares = [_Worker(tasks, range(at, len(tasks), workers)) for at in range(workers)]
    found: dict[int, dict] = {}
    while shares:
        for share in list(shares):
            line = share.next()
            if line is None:
                shares.remove(share)
            else:
                found[line[0]] = line[1]
    return [found[at] for at in range(len(tasks))]


class _Worker:
    """A forked process that works through a share of the tasks, and the next one where it dies."""

    def __init__(self, tasks, share):
        self.tasks, self.todo, self.lines = tasks, list(share), None
        self.pid, self.errors = None, None

    def next(self) -> tuple[int, dict] | None:
        """The next result, or None after the last."""
        if not self.todo:
            self._reap()
            return None
        if self.lines is None:
            self._fork()
        line = self.lines.readline()
        at = self.todo.pop(0)
        if line:
            return at, json.loads(line)
        self._reap()
        self.errors.seek(0)
        words = [text for text in self.errors.read().splitlines() if "error:" in text or "Assertion" in text]
        return at, {"error": "Triton's compiler ends the process: " + (words[0].split("error:")[-1].strip() if words else "no words")}

    def _fork(self) -> None:
        read, write = os.pipe()
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            self.lines = os.fdopen(read)
            return
        os.close(read)
        os.dup2(self.errors.fileno(), 2)
        with os.fdopen(write, "w") as out:
            for at in self.todo:
                try:
                    result = needs(*self.tasks[at])
                except Exception as error:
                    result = {"error": f"{type(error).__name__}: {(str(error).splitlines() or ['no words'])[0][:200]}"}
                out.write(json.dumps(result) + "\n")
                out.flush()
        os._exit(0)

    def _reap(self) -> None:
        if self.lines is not None:
            self.lines.close()
            os.waitpid(self.pid, 0)
            self.lines = None
