"""Block-sparse int8 products for ONNX Runtime on the CPU: the operator SparseLinear.

session = graphprune_kernels.session("out/")
session.run(None, feeds)
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["KernelsError", "isa", "library_path", "needed_bits", "register", "session"]

_OLDEST = (1, 17)  # the first ONNX Runtime that lends operators its threads
# ORT's fused SkipLayerNormalization is a scalar loop, 4 times slower than Add and
# LayerNormalization.
_UNFUSED = ("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
_MANIFESTS = ("graphprune/manifest.json", "manifest.json")


class KernelsError(RuntimeError):
    """The kernels or the model cannot be used, and why."""


def session(
    path: str | os.PathLike[str], *, threads: int | None = None, options: Any = None
) -> Any:
    """Open a model that has sparse layers, or any other.

    Args:
        path: an ONNX file, or a folder that graphprune exported.
        threads: within operators; None leaves the choice to ONNX Runtime, or to `options`.
        options: onnxruntime.SessionOptions to add the operators to.

    Returns:
        An onnxruntime.InferenceSession on the CPU.

    Raises:
        KernelsError: there is no such model, ONNX Runtime is too old or the library does not load.
        Exception: ONNX Runtime refuses the model, with the reason.
    """
    import onnxruntime

    model = _model_file(Path(path))
    if options is None:
        options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    options.add_session_config_entry(*_UNFUSED)
    register(options)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def register(options: Any) -> None:
    """Add the operators to onnxruntime.SessionOptions.

    Raises:
        KernelsError: ONNX Runtime is too old, or the library does not load.
    """
    import onnxruntime

    _check_version(onnxruntime.__version__)
    _library()
    options.register_custom_ops_library(str(library_path()))


def library_path() -> Path:
    """The shared library, to register from C, Node or Rust.

    Raises:
        KernelsError: it is missing.
    """
    path = Path(__file__).parent / "libgraphprune_kernels.so"
    if not path.is_file():
        raise KernelsError(
            f"graphprune-kernels is installed without {path.name}: install it again, "
            "`pip install --force-reinstall graphprune-kernels`"
        )
    return path


def isa() -> str:
    """The instruction set in use: avx512vnni, avxvnni, avx2, neondot or scalar.

    The fastest that this CPU has, unless the environment variable GRAPHPRUNE_KERNELS_ISA named
    another when the library was loaded.

    Raises:
        KernelsError: the library does not load, or the variable names none that can be used.
    """
    name: bytes = _library().graphprune_kernels_isa()
    return name.decode()


def needed_bits() -> int:
    """The bits, 7 or 8, of the largest codes that this CPU multiplies exactly.

    Raises:
        KernelsError: as for `isa`.
    """
    bits: int = _library().graphprune_kernels_bits()
    return bits


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise KernelsError(
            f"graphprune-kernels cannot load its library on this machine ({sys.platform}): {e}"
        ) from e
    library.graphprune_kernels_isa.restype = ctypes.c_char_p
    library.graphprune_kernels_problem.restype = ctypes.c_char_p
    if problem := library.graphprune_kernels_problem():
        raise KernelsError(problem.decode())
    return library


def _check_version(found: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _OLDEST:
        raise KernelsError(
            f"graphprune-kernels needs ONNX Runtime 1.17 or newer, this is {found}: "
            "`pip install -U onnxruntime`"
        )


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise KernelsError(f"there is no {str(path)!r}")
    for name in _MANIFESTS:
        if (path / name).is_file():
            return path / _model_in(path / name)
    if (path / "model.onnx").is_file():
        return path / "model.onnx"
    raise KernelsError(
        f"{str(path)!r} is not a folder that graphprune exported: it has no manifest.json"
    )


def _model_in(manifest: Path) -> str:
    try:
        name = json.loads(manifest.read_text(encoding="utf-8"))["files"]["model"]
    except (ValueError, KeyError, TypeError) as e:
        raise KernelsError(f"{str(manifest)!r} does not name the model's file") from e
    return str(name)
