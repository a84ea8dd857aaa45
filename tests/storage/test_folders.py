"""Folders appear whole or not at all, also when the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from graphprune.errors import ExportError
from graphprune.storage.folders import _exchange, check_target, restore, whole_folder


def files(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def write(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "a").write_text(text)


def killed(path: Path, where: str) -> None:
    """Run a writer in a process that kills itself.

    While it writes; between the two renames, where the system cannot exchange folders; or right
    after the exchange.
    """
    script = f"""
        import os, signal
        from pathlib import Path
        from graphprune.storage import folders as files
        from graphprune.storage.folders import whole_folder
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        path, renames, rename = Path({str(path)!r}), [], Path.rename
        def second(self, target):
            if renames: die()
            renames.append(1)
            return rename(self, target)
        if {where!r} == "renaming":
            files._exchange = lambda a, b: False
            Path.rename = second
        if {where!r} == "exchanged": files.shutil.rmtree = die
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
    assert path.exists() is (where == "writing")
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


def test_reading_puts_back_what_a_killed_writer_took_away(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, "old")
    killed(path, "renaming")
    restore(tmp_path / "another")
    assert not path.exists()
    restore(path)
    assert files(path) == {"a": "old"}
    restore(path)  # and once more, with nothing to do
    assert files(path) == {"a": "old"}


def test_a_writer_killed_after_the_exchange_has_written(tmp_path: Path) -> None:
    if not _exchanges(tmp_path):
        pytest.skip("this system cannot exchange folders in one step")
    write(tmp_path / "out", "old")
    killed(tmp_path / "out", "exchanged")
    assert files(tmp_path / "out") == {"a": "new"}
    write(tmp_path / "out", "newer")
    assert [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []


def _exchanges(folder: Path) -> bool:
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / name).touch()
    done = _exchange(folder / "a", folder / "b")
    assert (folder / "a" / "b").exists() is done
    for name in "ab":
        shutil.rmtree(folder / name)
    return done


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from graphprune.storage.folders import whole_folder
        with whole_folder(Path({str(tmp_path / "out")!r})):
            print("writing", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        write(tmp_path / "out", "new")
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".graphprune-out-new-")]
        other.communicate()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_number_of_a_living_stranger_keeps_nothing(tmp_path: Path) -> None:
    for kind in ("new", "old"):
        (tmp_path / f".graphprune-out-{kind}-{os.getppid()}-x").mkdir()
    write(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert files(tmp_path / "out") == {"a": "new"}


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


@pytest.mark.parametrize("path", ["/proc/graphprune/out", "/proc/out", "/dev/null/out", "a" * 300])
def test_places_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        check_target(tmp_path / path, lambda p: False)
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "new")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "file").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "own").touch(0o600)
    written = tmp_path / "out" / "inner" / "own"
    assert written.stat().st_mode == (tmp_path / "file").stat().st_mode
