"""transformers.js in Node: the feature-extraction pipeline.

`npm install @huggingface/transformers`, with NODE_PATH naming the node_modules folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest

from graphprune.exporters import Artifact
from tests.consumers.conftest import TEXTS, Vectors

SCRIPT = """
const { env, pipeline } = require('@huggingface/transformers');
(async () => {
  const [root, name, texts] = JSON.parse(process.argv[1]);
  env.allowRemoteModels = false;
  env.localModelPath = root;
  const extract = await pipeline('feature-extraction', name, { dtype: 'fp32' });
  const found = await extract(texts, { pooling: 'mean', normalize: true });
  console.log(JSON.stringify(found.tolist()));
})();
"""


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node is not installed")
    asked = "require.resolve('@huggingface/transformers')"
    if subprocess.run([found, "-e", asked], capture_output=True, check=False).returncode:
        pytest.skip("@huggingface/transformers is not in NODE_PATH")
    return found


def test_feature_extraction(node: str, artifact: Artifact, expected: dict[str, Vectors]) -> None:
    job = [f"{artifact.path.parent}/", artifact.path.name, TEXTS]
    run = subprocess.run(
        [node, "-e", SCRIPT, json.dumps(job)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = np.array(json.loads(run.stdout))
    assert np.abs(found - expected["sentence_embedding"]).max() < 1e-5
