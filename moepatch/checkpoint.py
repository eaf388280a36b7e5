"""Saving so that a crash at any moment leaves the checkpoint that was there before.

``save_pretrained`` of a patched model writes the standard files into a directory beside the target and puts it in the target's place at
the end, in one step where the file system can. What else lies in the target (a tokenizer, a trainer's state, sub-directories) stays.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from .choice import Choosing
from .layers.loss.labelled import Labelled
from .parallel.save import save_sharded, sharding_mesh
from .surgery import Patched

#: Weights and their index, with the variant that may stand in their names (``model.fp16-00001-of-00002.safetensors``).
_WEIGHTS = re.compile(
    r"(?P<base>model|pytorch_model|adapter_model)(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.(?P<of>[\w-]+))?\.json)?"
)


@dataclass(frozen=True)
class ModelState:
    """What a patched model keeps of its patch: how many modules were changed."""

    modules: int

    def __str__(self) -> str:
        return f"{self.modules} modules patched"


class PatchedModel(Labelled, Choosing, Patched):
    """A whole ``PreTrainedModel``, whose saving becomes safe."""

    _moepatch: ModelState

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers' own; on all ranks if the model is sharded. The old checkpoint stays whole until the new one is."""
        asked = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs)
        asked.apply_defaults()
        options = asked.arguments
        mesh = sharding_mesh(self)
        if mesh is not None:
            return save_sharded(self, mesh, options, super().save_pretrained, staged)
        # Only the process that writes may stage (transformers lets none but rank 0), and a hub's repository is named after the directory.
        writes = options["is_main_process"] and not (dist.is_initialized() and dist.get_rank())
        if not writes or options["push_to_hub"] or os.path.isfile(save_directory):
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
    _sweep(stage, target)
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


def _sweep(stage: Path, target: Path) -> None:
    """Removes what earlier saves of processes that were killed on this host have left beside the same target.

    One that was killed just after the exchange has left the old directory, whose sub-directories are still to be moved.
    """
    prefix = stage.name.rsplit("-", 1)[0] + "-"
    for left in stage.parent.glob(f"{prefix}*") if stage.parent.is_dir() else ():
        pid = left.name.removeprefix(prefix)
        if pid == str(os.getpid()) or (pid.isdigit() and not _alive(int(pid))):
            _move_directories(left, target)
            shutil.rmtree(left, ignore_errors=True)


def _move_directories(source: Path, target: Path) -> None:
    """Sub-directories (a trainer's checkpoints) that the target does not have."""
    for entry in source.iterdir() if target.is_dir() else ():
        if entry.is_dir() and not (target / entry.name).exists():
            os.rename(entry, target / entry.name)


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
    written = [path.name for path in stage.iterdir()]
    for entry in target.iterdir():
        if entry.is_file() and not (stage / entry.name).exists() and not _replaced(entry.name, written):
            _link(entry, stage / entry.name)
    _exchange(stage, target)
    # `stage` is now the old directory. Directories cannot be linked, only moved.
    _move_directories(stage, target)


def _replace_files(stage: Path, target: Path) -> None:
    written = sorted(stage.iterdir(), key=lambda path: path.name.endswith(".json"))  # an index after the shards it names
    for path in written:
        os.replace(path, target / path.name)
    names = [path.name for path in written]
    for path in target.iterdir():
        if path.name not in names and _replaced(path.name, names):
            path.unlink()


def _replaced(name: str, written: list[str]) -> bool:
    """Whether a file belongs to the weights that were written anew: the same base and variant, perhaps another number of shards."""
    return _weights_of(name) is not None and _weights_of(name) in {_weights_of(other) for other in written}


def _weights_of(name: str) -> tuple[str, str | None] | None:
    match = _WEIGHTS.fullmatch(name)
    return match and (match["base"], match["variant"] or match["of"])


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
