"""The library of kernels, a package of its own that graphprune runs without."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

from graphprune.errors import GraphPruneError, first_line

DOMAIN = "graphprune"
OPERATOR = "SparseLinear"
PACKAGE = "graphprune-kernels"
LIBRARY = "custom_ops_library"  # in a session's configuration, as onnxruntime-genai calls it


@final
@dataclass(frozen=True, slots=True)
class Library:
    """The library as it is installed.

    Attributes:
        path: the shared library.
        version: of the package.
        isa: the instruction set that it takes on this machine.
        bits: of the codes that it multiplies exactly here, 7 or 8.
    """

    path: str
    version: str
    isa: str
    bits: int

    def to_json(self) -> dict[str, Any]:
        """Plain data without the path, which is this machine's."""
        found = asdict(self)
        del found["path"]
        return found


def find_library() -> Library:
    """The library.

    Raises:
        GraphPruneError: it is not installed, or does not load.
    """
    try:
        import graphprune_kernels as kernels
    except ImportError as e:
        raise GraphPruneError(
            f"blocks of zeros need the package {PACKAGE!r}, which is not installed: "
            "pip install ./kernels in a checkout of graphprune builds it with a C++ compiler"
        ) from e
    try:
        return Library(
            str(kernels.library_path()), version(PACKAGE), kernels.isa(), kernels.needed_bits()
        )
    except (OSError, RuntimeError, PackageNotFoundError) as e:
        raise GraphPruneError(
            f"the library of {PACKAGE!r} does not load ({first_line(e)}): install it again"
        ) from e


def installed_library() -> Library | None:
    """The library, or None where it is not installed or does not load."""
    with contextlib.suppress(GraphPruneError):
        return find_library()
    return None


def with_library(config: Mapping[str, str], paths: Iterable[Path]) -> dict[str, str]:
    """A session's configuration, with the library where one of the files needs it.

    Raises:
        GraphPruneError: a file needs it, and it is not installed.
    """
    if any(needs_library(path) for path in paths):
        return {**config, LIBRARY: find_library().path}
    return dict(config)


def needs_library(path: Path) -> bool:
    """Whether an ONNX file has operators of the library; reads the file, and parses nothing."""
    name = OPERATOR.encode()
    if not path.is_file() or not path.stat().st_size:
        return False
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(name) >= 0
