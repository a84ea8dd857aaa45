"""Kept: tensors that took long to compute, in a cache folder for runs that are interrupted."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_log = logging.getLogger(__name__)

LASTS = 3 * 24 * 3600  # seconds
MOST = 4_000_000_000  # bytes of a name's parts together; what is more is not kept

Tensors = Mapping[str, Tensor]


@final
class Kept:
    """A folder of tensors by name and part. A folder that cannot be used costs a warning."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, which is made when it is first written to."""
        self._folder = folder
        self._usable = True

    def get(self, name: str, part: str, make: Callable[[], Tensors]) -> Tensors:
        """A part that was kept, or one made now, and kept."""
        path = self._folder / name / f"{part}.safetensors"
        if self._usable:
            try:
                return load_file(path)
            except FileNotFoundError:
                pass
            except (OSError, SafetensorError) as e:
                self._give_up(f"cannot read {path.name}: {e}")
        made = make()
        if self._usable:
            try:
                self._write(path, made)
            except (OSError, SafetensorError) as e:
                self._give_up(f"cannot write {path.name}: {e}")
        return made

    def _write(self, path: Path, tensors: Tensors) -> None:
        self._tidy()
        path.parent.mkdir(parents=True, exist_ok=True)
        held = sum(file.stat().st_size for file in path.parent.iterdir())
        if held + sum(t.numel() * t.element_size() for t in tensors.values()) > MOST:
            return
        handle, fresh = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        os.close(handle)
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, fresh)
            os.replace(fresh, path)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise

    def _tidy(self) -> None:
        """Remove what is old."""
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            if time.time() - folder.stat().st_mtime > LASTS:
                shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, why: str) -> None:
        self._usable = False
        _log.warning("nothing is kept in %s (%s)", self._folder, why)
