"""Folders that appear whole or not at all, and hashes of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from graphprune.errors import ExportError

_PREFIX = ".graphprune-"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_target(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse, before any work, a folder that cannot be written or that is not ours to replace.

    Raises:
        ExportError: the path is a file, a folder of somebody else, or not writable.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ExportError(f"{str(path)!r} is a file or a link, not a folder; choose another path")
    if path.is_dir() and any(path.iterdir()) and not is_ours(path):
        raise ExportError(
            f"{str(path)!r} exists and graphprune did not write it; choose another folder, or "
            "remove it first"
        )
    above = path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ExportError(f"{str(path)!r} cannot be written: {str(above)!r} is not writable")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, which takes the place of `path` when all went well.

    Left by an exception, `path` is as it was and the sibling is gone. Killed, `path` is as it was;
    the sibling that stays behind is removed by the next run that writes here.

    Raises:
        ExportError: the disk is full, or the folder cannot be made or replaced.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        fresh = Path(tempfile.mkdtemp(prefix=_prefix(path, "new"), dir=path.parent))
    except OSError as e:
        raise _failed(path, e) from e
    try:
        yield fresh
        _replace(path, fresh)
    except OSError as e:
        raise _failed(path, e) from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _prefix(path: Path, kind: str) -> str:
    return f"{_PREFIX}{path.name}-{kind}-{os.getpid()}-"


def _replace(path: Path, fresh: Path) -> None:
    """Exchange the folders; between the two renames lies the only moment without `path`.

    A run killed in that moment leaves the old folder under a name that `_sweep` puts back.
    """
    fresh.chmod(0o777 & ~_umask())
    _sync(fresh)
    if not path.exists():
        fresh.rename(path)
        return
    old = path.parent / (_prefix(path, "old") + "x")
    path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`; put an old folder back where it is missing."""
    for left in sorted(path.parent.glob(f"{_PREFIX}{_escaped(path.name)}-*-*-*")):
        kind, pid = left.name[len(_PREFIX) + len(path.name) + 1 :].split("-")[:2]
        if _alive(pid) and pid != str(os.getpid()):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif kind in {"old", "new"} and pid != str(os.getpid()):
            shutil.rmtree(left, ignore_errors=True)


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    # A rename that reaches the disk before the data would leave empty files after a crash.
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _failed(path: Path, error: OSError) -> ExportError:
    return ExportError(
        f"cannot write {str(path)!r}: {error.strerror or error}; nothing was changed there, free "
        "some space or choose another folder"
    )
