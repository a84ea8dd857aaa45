"""The user's cache folder: what is converted or trained once and read ever after."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """$GRAPHPRUNE_CACHE, else $XDG_CACHE_HOME/graphprune, else ~/.cache/graphprune."""
    if own := os.environ.get("GRAPHPRUNE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "graphprune"


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
            # Another process was faster; its folder is as good as ours.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
