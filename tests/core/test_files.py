"""Folders appear whole or not at all, also when the process is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from graphprune.errors import ExportError
from graphprune.files import check_target, whole_folder


def files(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def write(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "a").write_text(text)


def killed(path: Path, where: str) -> None:
    """Run a writer in a process that kills itself: while it writes, or between the two renames."""
    script = f"""
        import os, signal
        from pathlib import Path
        from graphprune.files import whole_folder
        die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        path, renames, rename = Path({str(path)!r}), [], Path.rename
        def second(self, target):
            if renames: die()
            renames.append(1)
            return rename(self, target)
        if {where!r} == "renaming": Path.rename = second
        with whole_folder(path) as folder:
            (folder / "a").write_text("new")
            if {where!r} == "writing": die()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_killed_writer_loses_nothing(where: str, tmp_path: Path) -> None:
    path = tmp_path / "o[u]t"
    write(path, "old")
    killed(path, where)
    left = [p for p in tmp_path.iterdir() if p != path]
    assert left
    assert all(p.name.startswith(".graphprune-") for p in left)
    if where == "writing":
        assert files(path) == {"a": "old"}
    seen = []
    with contextlib.suppress(RuntimeError), whole_folder(path):
        seen.append(files(path))  # put back before anything else
        raise RuntimeError
    assert seen == [{"a": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["o[u]t"]
    assert files(path) == {"a": "old"}


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".graphprune-out-new-{os.getppid()}-x"
    other.mkdir()
    write(tmp_path / "out", "new")
    assert other.exists()


def test_nested_writers_of_one_process(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as outer:
        (outer / "a").write_text("outer")
        write(tmp_path / "out", "inner")
        assert files(outer) == {"a": "outer"}
    assert files(tmp_path / "out") == {"a": "outer"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"), whole_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("path", ["/proc/graphprune/out", "/dev/null/out"])
def test_places_that_cannot_be_written(path: str) -> None:
    if os.access("/proc", os.W_OK) and path.startswith("/proc"):
        pytest.skip("root may write everywhere as far as the system says")
    with pytest.raises(ExportError, match="cannot be written"):
        check_target(Path(path), lambda p: False)


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "new")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
