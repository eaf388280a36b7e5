"""What was measured once on a machine, kept in small JSON files for the next process."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """``$MOEPATCH_CACHE``, else ``moepatch`` in the user's cache directory."""
    base = os.environ.get("MOEPATCH_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moepatch")


def read(name: str) -> dict[str, Any]:
    """The entries of a file in the directory; none if it cannot be read."""
    try:
        entries = json.loads((cache_directory() / name).read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def add(name: str, entries: dict[str, Any]) -> None:
    """Adds to a file, beside what other processes have put there. A directory that cannot be written only costs time.

    The file is replaced in one step, so that processes that start together do not read half of it; they write one after the other, so that
    none writes over what another has added.
    """
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        with open(cache_directory() / f"{name}.lock", "w") as lock:  # given up when it is closed
            fcntl.flock(lock, fcntl.LOCK_EX)
            part = cache_directory() / f"{name}.part"
            part.write_text(json.dumps({**read(name), **entries}, indent=1))
            part.replace(cache_directory() / name)
    except OSError:
        return
