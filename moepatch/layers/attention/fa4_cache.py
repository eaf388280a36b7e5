"""Where FlashAttention 4 keeps what it compiles.

It can keep its kernels for the next process, which then loads them in milliseconds where compiling takes seconds for each form. It does so only if
it is told by environment variables, which it reads while it is imported. Transformer Engine imports it, and transformers imports that: then it is too
late for them, and the caches that it has made are exchanged for such that keep.
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

ENABLED, DIRECTORY = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@contextlib.contextmanager
def kept_compiles() -> Iterator[None]:
    """Around the first import of the library: kernels are kept beside moepatch's own measurements, unless the user has said where, or whether."""
    settings = {} if ENABLED in os.environ or DIRECTORY in os.environ else _settings()
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)


def keep_compiles(interface: ModuleType) -> None:
    """The same for a library that another one has imported before. Releases without these caches keep nothing."""
    from flash_attn.cute import cache_utils

    known = vars(cache_utils)
    if known.get("CUTE_DSL_CACHE_ENABLED", True) or ENABLED in os.environ or not {"JITCache", "JITPersistentCache", "_compute_source_fingerprint"} <= set(known):
        return
    settings = _settings()
    for name, function in vars(interface).items() if settings else ():
        cache = getattr(function, "compile_cache", None)
        if type(cache) is known["JITCache"]:
            kept = known["JITPersistentCache"](Path(settings[DIRECTORY]) / known["_compute_source_fingerprint"]() / name)
            kept.cache.update(cache.cache)
            function.compile_cache = kept


def _settings() -> dict[str, str]:
    if not torch.cuda.is_available():
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
