"""The package finds models and its library, and says in a sentence what it cannot do."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.models import expected, layer_of, random_packed

ROOT = Path(__file__).parent.parent.parent
ISAS = ("avx512vnni", "avxvnni", "avx2", "neondot", "scalar")
PACKED = random_packed(np.random.default_rng(0), 90, 50, 32, 7, 0.4)
X = np.random.default_rng(1).normal(size=(50, 50)).astype(np.float32)


@pytest.fixture
def model(kernels: Any, tmp_path: Path) -> Path:
    """A file with one layer."""
    path = tmp_path / "model.onnx"
    path.write_bytes(layer_of(PACKED, activation="gelu").model())
    return path


def child(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


ISA = "import graphprune_kernels as k; print(k.isa(), k.needed_bits())"
RUN = """
import sys
import numpy as np
import graphprune_kernels
x = np.load(sys.argv[2])
y = graphprune_kernels.session(sys.argv[1], threads=1).run(None, {"x": x})[0]
np.save(sys.argv[3], y)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses_the_instruction_set(model: Path, tmp_path: Path, isa: str) -> None:
    found = child(ISA, GRAPHPRUNE_KERNELS_ISA=isa)
    if found.returncode:
        assert re.search(rf"KernelsError: GRAPHPRUNE_KERNELS_ISA is '{isa}', which", found.stderr)
        pytest.skip(f"this CPU lacks {isa}")
    assert found.stdout.split() == [isa, "7" if isa == "avx2" else "8"]
    np.save(tmp_path / "x.npy", X)
    files = [str(model), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    ran = child(RUN, *files, GRAPHPRUNE_KERNELS_ISA=isa)
    assert ran.returncode == 0, ran.stderr
    wanted = expected(X, PACKED, None, "gelu")
    assert np.abs(np.load(tmp_path / "y.npy") - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_an_unknown_instruction_set(kernels: Any) -> None:
    message = "GRAPHPRUNE_KERNELS_ISA is 'sse9', which graphprune-kernels does not have: it has "
    assert message in child(ISA, GRAPHPRUNE_KERNELS_ISA="sse9").stderr
    direct = (
        "import sys, onnxruntime\n"
        "onnxruntime.SessionOptions().register_custom_ops_library(sys.argv[1])"
    )
    path = str(kernels.library_path())
    assert message in child(direct, path, GRAPHPRUNE_KERNELS_ISA="sse9").stderr


def test_it_says_what_it_runs_on(kernels: Any) -> None:
    assert kernels.isa() in ISAS
    assert kernels.needed_bits() == (7 if kernels.isa() == "avx2" else 8)


@pytest.mark.parametrize("manifest", ["manifest.json", "graphprune/manifest.json", None])
def test_a_folder_is_opened_by_its_manifest(
    kernels: Any, model: Path, tmp_path: Path, manifest: str | None
) -> None:
    folder = tmp_path / "out"
    name = "onnx/other.onnx" if manifest else "model.onnx"
    (folder / "graphprune").mkdir(parents=True)
    (folder / name).parent.mkdir(exist_ok=True)
    model.rename(folder / name)
    if manifest:
        (folder / manifest).write_text(json.dumps({"files": {"model": name}}))
    session = kernels.session(folder, threads=1)
    assert session.run(None, {"x": X})[0].shape == (50, 90)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a folder that graphprune exported: it has no manifest.json"),
        ("{", "does not name the model's file"),
        ("{}", "does not name the model's file"),
        ("[]", "does not name the model's file"),
    ],
)
def test_a_folder_without_a_model(
    kernels: Any, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(kernels.KernelsError, match=message):
        kernels.session(tmp_path)


def test_a_path_that_is_not_there(kernels: Any, tmp_path: Path) -> None:
    with pytest.raises(kernels.KernelsError, match=r"there is no '.*nothing'"):
        kernels.session(tmp_path / "nothing")


def test_own_options_are_kept(kernels: Any, model: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = kernels.session(model, options=options)
    assert session.get_session_options().intra_op_num_threads == 1


def test_sessions_do_without_slow_fusions(kernels: Any, model: Path) -> None:
    key = "optimization.disable_specified_optimizers"
    options = kernels.session(model).get_session_options()
    assert options.get_session_config_entry(key) == "SkipLayerNormFusion"


@pytest.mark.parametrize("version", ["1.16.3", "0.9.0", "unknown"])
def test_an_old_onnxruntime(kernels: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    message = f"needs ONNX Runtime 1.17 or newer, this is {version}: `pip install -U"
    with pytest.raises(kernels.KernelsError, match=re.escape(message)):
        kernels.register(onnxruntime.SessionOptions())


def test_a_missing_library(kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(kernels.KernelsError, match="is installed without libgraphprune_kernels"):
        kernels.library_path()


def test_a_library_that_does_not_load(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "libgraphprune_kernels.so").write_bytes(b"not a library")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    kernels._library.cache_clear()
    try:
        with pytest.raises(kernels.KernelsError, match="cannot load its library on this machine"):
            kernels.isa()
    finally:
        kernels._library.cache_clear()


Status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
GetApi = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
GetVersion = ctypes.CFUNCTYPE(ctypes.c_void_p)


class Base(ctypes.Structure):
    """The functions of an ONNX Runtime that has versions up to 16 of its interface."""

    _fields_ = (("get_api", GetApi), ("get_version", GetVersion))


def test_the_library_says_so_itself_where_onnxruntime_is_old(kernels: Any) -> None:
    """As it must where it is registered from C."""
    said: list[tuple[int, str]] = []
    version = ctypes.c_char_p(b"1.16.3")

    def status(code: int, text: bytes) -> int:
        said.append((code, text.decode()))
        return 1234

    make_status = Status(status)
    api = (ctypes.c_void_p * 1)(ctypes.cast(make_status, ctypes.c_void_p))
    base = Base(
        GetApi(lambda wanted: ctypes.addressof(api) if wanted <= 16 else None),
        GetVersion(lambda: ctypes.cast(version, ctypes.c_void_p).value),
    )
    register = ctypes.CDLL(str(kernels.library_path())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1234
    assert said == [(1, "graphprune-kernels needs ONNX Runtime 1.17 or newer, this is 1.16.3")]


def test_other_releases_of_onnxruntime(kernels: Any, model: Path, tmp_path: Path) -> None:
    """Those named by GRAPHPRUNE_ONNXRUNTIMES, folders as in tests/consumers."""
    named = os.environ.get("GRAPHPRUNE_ONNXRUNTIMES")
    if not named:
        pytest.skip("GRAPHPRUNE_ONNXRUNTIMES names no folders of older releases")
    np.save(tmp_path / "x.npy", X)
    files = [str(model), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    for folder in named.split(":"):
        code = f"import sys\nsys.path.insert(0, {folder!r})\n{RUN}"
        ran = child(code, *files)
        assert ran.returncode == 0, ran.stderr
        wanted = expected(X, PACKED, None, "gelu")
        assert np.abs(np.load(files[2]) - wanted).max() <= 1e-5 * np.abs(wanted).max(), folder
