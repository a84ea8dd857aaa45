"""ONNX files opened in a process of their own, whose settings affect no other process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from graphprune.errors import GraphPruneError
from graphprune.exporters.kernels.library import with_library
from graphprune.exporters.runtime import probe
from graphprune.exporters.runtime.kv_cache import Feeds, Shapes, filled
from graphprune.exporters.runtime.session import check_threads


@contextmanager
def child(
    paths: Sequence[Path], threads: int, config: Mapping[str, str], *, profile: bool = False
) -> Iterator[Child]:
    """A process that has ONNX files open while inside.

    Args:
        paths: the files.
        threads: ORT's threads within operators.
        config: entries of every session's configuration, by key.
        profile: whether operators are timed one by one, which `Child.operators` sums up.

    Raises:
        GraphPruneError: a file does not load there.
    """
    check_threads(threads)
    # -P: the files beside the script are no modules for it.
    command = [sys.executable, "-P", probe.__file__]
    with (
        tempfile.TemporaryDirectory(prefix="graphprune-") as folder,
        open(Path(folder) / "errors", "w+b") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        try:
            yield Child(process, Path(folder), paths, threads, config, profile=profile)
        finally:
            process.kill()


@final
class Child:
    """The process, asked to run its files.

    Attributes:
        inputs: that each file needs, shapes by name.
        load_ms: milliseconds that opening all of them took.
        peak_before: its highest resident memory before that, in bytes; None where unknown.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        folder: Path,
        paths: Sequence[Path],
        threads: int,
        config: Mapping[str, str],
        *,
        profile: bool = False,
    ) -> None:
        self._process, self._folder = process, folder
        self._paths = [str(path.absolute()) for path in paths]
        answer = self._ask(
            "open",
            paths=self._paths,
            threads=threads,
            config=with_library(config, paths),
            profile=str(folder) if profile else "",
        )
        self.inputs: list[Shapes] = answer["inputs"]
        self.load_ms: float = answer["load_ms"]
        self.peak_before: int | None = answer["peak"]
        self._optional: list[list[str]] = answer["optional"]

    def warm_up(self, feeds: Feeds | Sequence[Feeds]) -> dict[str, int | None]:
        """Run every file twice; bytes of memory, "peak" and "private", None where unknown.

        Args:
            feeds: inputs for all, of which each takes its own, or those of each; of a decoder's
                cache, each has its own.

        Raises:
            GraphPruneError: a file does not run.
        """
        each = feeds if isinstance(feeds, Sequence) else [feeds] * len(self.inputs)
        own = [
            filled({**needed, **{name: () for name in optional if name in fed}}, fed)
            for needed, optional, fed in zip(self.inputs, self._optional, each, strict=True)
        ]
        arrays = self._folder / "feeds.npz"
        # By position: a keyword of savez may be an input's name.
        np.savez(arrays, *(array for fed in own for array in fed.values()))
        memory: dict[str, int | None] = self._ask(
            "warm_up", arrays=str(arrays), names=[list(fed) for fed in own]
        )
        return memory

    def round(self, runs: int, clock: str) -> list[float]:
        """Milliseconds of each file's fastest run, of so many in a row."""
        times: list[float] = self._ask("round", runs=runs, clock=clock)
        return times

    def operators(self) -> list[dict[str, float]]:
        """Milliseconds of a run by operator type, of each file, over the rounds so far.

        The process must have been opened with `profile`, whose end this is.
        """
        found: list[dict[str, float]] = self._ask("operators")
        return found

    def _ask(self, do: str, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"do": do, **request}) + "\n"
        try:
            # Past the buffer, which would be flushed again on leaving.
            os.write(self._process.stdin.fileno(), line.encode())
        except BrokenPipeError:
            raise self._ended() from None
        line = self._process.stdout.readline().decode()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise GraphPruneError(
                f"{answer['at']!r} does not run in a process of its own: {answer['error']}"
            )
        return answer["value"]

    def _ended(self) -> GraphPruneError:
        code = self._process.wait()
        lines = (self._folder / "errors").read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((f" ({line.strip()})" for line in reversed(lines) if line.strip()), "")
        return GraphPruneError(
            f"the process that runs {' and '.join(map(repr, self._paths))} ended with exit code "
            f"{code}{said}; if memory is short, give a smaller batch"
        )
