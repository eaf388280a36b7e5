"""Saving so that a crash at any moment leaves the checkpoint that was there before.

``save_pretrained`` of a patched model writes the standard files into a directory beside the target and puts it in the target's place at
the end, in one step where the file system can. What else lies in the target (a tokenizer, a trainer's state, sub-directories) stays.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .surgery import Patched

#: What a new checkpoint replaces even if it has no file of the same name: weights and their index.
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class ModelState:
    """What a patched model keeps of its patch: how many modules were changed."""

    modules: int

    def __str__(self) -> str:
        return f"{self.modules} modules patched"


class PatchedModel(Patched):
    """A whole ``PreTrainedModel``: the class keeps its name (transformers writes it into ``architectures``), saving becomes safe."""

    keeps_name = True
    _moepatch: ModelState

    def save_pretrained(self, save_directory, *args, **kwargs):
        writes = args[0] if args else kwargs.get("is_main_process", True)
        # Only the process that writes may stage; pushing to a hub names its repository after the directory.
        if not writes or kwargs.get("push_to_hub", False) or os.path.isfile(save_directory):
            return super().save_pretrained(save_directory, *args, **kwargs)
        with staged(Path(save_directory)) as directory:
            return super().save_pretrained(directory, *args, **kwargs)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `target` when the block ends well and is removed when it does not.

    Files of `target` that the block did not write and that are not weights are carried over. Where the directory itself cannot be
    replaced (a mount point, a parent that is read-only), files are replaced one by one instead.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = not os.path.ismount(target) and os.access(target.parent, os.W_OK)
    stage = _stage_path(target.parent if whole else target, target.name)
    _sweep(stage)
    stage.mkdir(parents=True)
    try:
        yield stage
        if not target.exists():
            os.rename(stage, target)
        elif whole:
            _replace_directory(stage, target)
        else:
            _replace_files(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stage_path(parent: Path, name: str) -> Path:
    return parent / f".{name}.moepatch-{socket.gethostname()}-{os.getpid()}"


def _sweep(stage: Path) -> None:
    """Removes what earlier saves of processes that were killed on this host have left beside the same target."""
    prefix = stage.name.rsplit("-", 1)[0] + "-"
    for left in stage.parent.glob(f"{prefix}*") if stage.parent.is_dir() else ():
        pid = left.name.removeprefix(prefix)
        if pid == str(os.getpid()) or (pid.isdigit() and not _alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace_directory(stage: Path, target: Path) -> None:
    shutil.copymode(target, stage)
    for entry in target.iterdir():
        if entry.is_file() and not (stage / entry.name).exists() and not _WEIGHTS.fullmatch(entry.name):
            _link(entry, stage / entry.name)
    _exchange(stage, target)
    # `stage` is now the old directory. Sub-directories (a trainer's checkpoints) cannot be linked, only moved.
    for entry in stage.iterdir():
        if entry.is_dir() and not (target / entry.name).exists():
            os.rename(entry, target / entry.name)


def _replace_files(stage: Path, target: Path) -> None:
    written = sorted(stage.iterdir(), key=lambda path: path.name.endswith(".json"))  # an index after the shards it names
    for path in written:
        os.replace(path, target / path.name)
    names = {path.name for path in written}
    for path in target.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


def _exchange(a: Path, b: Path) -> None:
    """Swaps two directories: in one step on Linux, else in three renames that leave both under some name whenever they stop."""
    if sys.platform == "linux" and _renameat2_exchange(a, b):
        return
    aside = a.with_name(a.name + ".aside")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except OSError:
        os.rename(aside, b)
        raise
    os.rename(aside, a)


def _renameat2_exchange(a: Path, b: Path) -> bool:
    at_cwd, exchange = -100, 2
    with suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        return call(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    return False
