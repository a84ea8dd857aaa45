"""Older releases of ONNX Runtime, each installed into a folder of its own, read the encoder.

GRAPHPRUNE_ONNXRUNTIMES names the folders, with ":" between: `pip install --target FOLDER --no-deps
onnxruntime==1.21.1`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from graphprune.exporters import Artifact
from tests.consumers.conftest import Vectors

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import onnxruntime
assert onnxruntime.__file__.startswith(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
feeds = dict(np.load(sys.argv[3]))
fed = session.run(None, feeds)
del feeds["token_type_ids"]
np.savez(sys.argv[4], *session.run(None, feeds), *fed)
"""


def test_the_encoder(
    artifact: Artifact,
    batch: dict[str, NDArray[np.int64]],
    expected: dict[str, Vectors],
    tmp_path: Path,
) -> None:
    """With padding, three samples, uneven heads; token_type_ids not fed, and fed."""
    named = os.environ.get("GRAPHPRUNE_ONNXRUNTIMES")
    if not named:
        pytest.skip("GRAPHPRUNE_ONNXRUNTIMES names no folders of older releases")
    np.savez(tmp_path / "feeds.npz", **batch)  # type: ignore[arg-type]
    for folder in named.split(":"):
        files = [str(tmp_path / "feeds.npz"), str(tmp_path / "found.npz")]
        job = [sys.executable, "-c", SCRIPT, folder, str(artifact.model_path), *files]
        subprocess.run(job, check=True)
        found = np.load(files[1])
        for i, name in enumerate(found.files):
            mine = list(expected.values())[i % len(expected)]
            assert np.abs(found[name] - mine).max() < 1e-5, folder
