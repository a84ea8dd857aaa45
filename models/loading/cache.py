"""The user's cache folder: what is converted or trained once, and read from then on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from graphprune.storage.folders import cache_dir as cache_dir


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The cached folder `name`; `make` fills it the first time, whole or not at all."""
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            # Another process was faster; its folder is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
