"""Where FlashAttention 4 keeps what it compiles.

It can keep its kernels for the next process, which then loads them in milliseconds where compiling takes seconds for each form. It does so only if
it is told by environment variables, which it reads while it is imported. Whoever imports it first decides for the process, and that may be peft:
it imports Transformer Engine where that is installed, which imports FlashAttention 4. So its caches are also replaced by its own that keep, later.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from ...store import cache_directory

#: Where the library would keep what these functions of its module `interface` compile: names of folders.
_FOLDERS = {
    "_flash_attn_fwd": "fwd", "_flash_attn_fwd_combine": "fwd_combine", "_bwd_preprocess": "bwd_pre", "_bwd_postprocess_convert": "bwd_post",
    "_flash_attn_bwd": "bwd", "_bwd_dsink_reduce": "bwd_dsink",
}  # fmt: skip

ENABLED, DIRECTORY = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@contextlib.contextmanager
def kept_compiles() -> Iterator[None]:
    """Around the first import of the library: kernels are kept beside moepatch's own measurements, unless the user has said where, or whether."""
    settings = _settings()
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)


def keep(interface: ModuleType, cache_utils: ModuleType) -> None:
    """Lets a library that was imported without `kept_compiles` keep what it compiles from now on, in the same files.

    Args:
        interface: its module with the functions that compile.
        cache_utils: its module with the caches. A release that has other names there keeps nothing.
    """
    known = vars(cache_utils)
    settings = _settings()
    if not settings or not {"JITCache", "JITPersistentCache", "_compute_source_fingerprint"} <= known.keys():
        return
    folder = Path(settings[DIRECTORY]) / known["_compute_source_fingerprint"]()
    for name, part in _FOLDERS.items():
        function = vars(interface).get(name)
        cache = None if function is None else vars(function).get("compile_cache")
        if type(cache) is known["JITCache"]:
            kept = known["JITPersistentCache"](folder / part)
            kept.cache.update(cache.cache)
            function.compile_cache = kept


def _settings() -> dict[str, str]:
    """What the library has to be told; nothing where the user has told it, or where it cannot keep anything."""
    if ENABLED in os.environ or DIRECTORY in os.environ or not torch.cuda.is_available():
        return {}
    # Its own names tell versions of itself and of the compiler apart. They do not tell everything about the GPU, nor the helpers that it takes from QuACK.
    try:
        quack = importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return {}
    major, minor = torch.cuda.get_device_capability()
    folder = cache_directory() / "fa4" / f"sm{major}{minor}-quack-{quack}"
    return {ENABLED: "1", DIRECTORY: str(folder)} if _can_lock_in(folder) else {}


def _can_lock_in(folder: Path) -> bool:
    """Whether files can be written and locked there: it raises where they cannot, and some network filesystems know no locks."""
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
