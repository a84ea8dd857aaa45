"""Folders that appear whole or not at all, and hashes of what is in them."""

from __future__ import annotations

import contextlib
import glob
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


def cache_dir() -> Path:
    """$GRAPHPRUNE_CACHE, else $XDG_CACHE_HOME/graphprune, else ~/.cache/graphprune."""
    if own := os.environ.get("GRAPHPRUNE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "graphprune"


def check_target(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse, before any work, a folder that cannot be written or that graphprune did not write.

    Raises:
        ExportError: the path is a file, a folder that graphprune did not write, or not writable.
    """
    path = path.absolute()
    check_writable(path)
    restore(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ExportError(f"{str(path)!r} is a file or a link, not a folder; choose another path")
    if path.is_dir() and any(path.iterdir()) and not is_ours(path):
        raise ExportError(
            f"{str(path)!r} exists and graphprune did not write it; choose another folder, or "
            "remove it first"
        )


def check_writable(path: Path) -> None:
    """Refuse, before any work, a place where no file or folder of this name can be made.

    It is tried, because permissions are not all: disks are mounted read-only, and names too long.

    Raises:
        ExportError: nothing can be made there; the system's reason is quoted.
    """
    path = path.absolute()
    above = path.parent
    while not os.path.exists(above):  # Path.exists raises where it may not look
        above = above.parent
    try:
        Path(tempfile.mkdtemp(prefix=_prefix(path, "new"), dir=above)).rmdir()
    except OSError as e:
        raise ExportError(
            f"{str(path)!r} cannot be written: {str(above)!r} takes no new file "
            f"({e.strerror or e}); choose another place"
        ) from e


def restore(path: Path) -> None:
    """Put a folder back where a writer was killed between taking it away and giving its successor.

    Call this before reading. Where the system exchanges folders in one step there is no such
    moment, and nothing to do.
    """
    path = path.absolute()
    if not path.exists() and path.parent.is_dir():
        for left in _leftovers(path, "old"):
            with _locked(left) as free:
                if free and not path.exists():
                    left.rename(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, which takes the place of `path` when all went well.

    Left by an exception, `path` is as it was and the sibling is gone. Killed, `path` is as it was,
    at the latest after `restore`; the sibling is removed by the next run that writes here.

    Raises:
        ExportError: the disk is full, or the folder cannot be made or replaced.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        restore(path)
        _sweep(path)
        fresh = Path(tempfile.mkdtemp(prefix=_prefix(path, "new"), dir=path.parent))
    except OSError as e:
        raise _failed(path, e) from e
    try:
        with _locked(fresh):
            yield fresh
            _replace(path, fresh)
    except OSError as e:
        raise _failed(path, e) from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _prefix(path: Path, kind: str) -> str:
    return f"{_PREFIX}{path.name}-{kind}-"


def _replace(path: Path, fresh: Path) -> None:
    """Let the folders change places; what was there before is at `fresh` then, or gone."""
    _open_up(fresh)
    _sync(fresh)
    if not path.exists():
        fresh.rename(path)
    elif not _exchange(path, fresh):
        _replace_in_two_steps(path, fresh)


def _replace_in_two_steps(path: Path, fresh: Path) -> None:
    """Between the two renames lies a moment without `path`; killed in it, `restore` helps."""
    old = fresh.with_name(fresh.name.replace(_prefix(path, "new"), _prefix(path, "old"), 1))
    with _locked(path):  # else a reader would take the old folder for a dead writer's
        path.rename(old)
        try:
            fresh.rename(path)
        except OSError:
            old.rename(path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the disk cannot."""
    import ctypes

    if os.name == "nt":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    here, flag = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, RENAME_SWAP
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), flag) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(a), os.fsencode(b), flag) == 0)
    return False


def _sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`."""
    for left in (*_leftovers(path, "new"), *_leftovers(path, "old")):
        with _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


def _leftovers(path: Path, kind: str) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(_prefix(path, kind))}*"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder while inside, and say whether nobody else does.

    The system releases it when the process ends, however it ends; a process id could belong to
    another process later.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone already, or a system that opens no folders
        yield not folder.exists()
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _open_up(folder: Path) -> None:
    """Permissions as of any new files: some writers make theirs for the owner alone."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


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
