"""Other runtimes generate our tokens from a decoder whose layers keep 3, 3 and 2 heads.

They are no part of a plain install: `pip install onnxruntime-genai`; and for Node
`npm install @huggingface/transformers`, with NODE_PATH naming the node_modules folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphprune.exporters import Artifact
from graphprune.exporters.runtime.generate import Decoder, generate
from graphprune.models.hub.genai import FILE, genai_config

NEW = 12
PAD = 0
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
TARGETS = ("onnxruntime", "genai")

Artifacts = Callable[[str], Artifact]
Tokens = list[list[int]]


@pytest.fixture(params=TARGETS)
def laid_out(
    request: pytest.FixtureRequest, ragged_artifact: Artifacts, tmp_path: Path
) -> tuple[Artifact, Path]:
    """The decoder for a target, and a folder of it laid out as hubs have models."""
    artifact, folder = ragged_artifact(request.param), tmp_path / "decoder"
    (folder / "onnx").mkdir(parents=True)
    shutil.copyfile(artifact.model_path, folder / "onnx" / "model.onnx")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    described = artifact.manifest["inputs"], artifact.manifest["outputs"]
    content = genai_config(CONFIG, *described, shared=request.param == "genai")
    (folder / FILE).write_bytes(content)
    return artifact, folder


def write_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of single characters, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(33 + i) for i in range(94)), "Ġ"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


PROMPTS = [17, 45, 9, 80, 23, 61, 33], [50, 12, 71, 28]


def padded(side: str, *prompts: list[int]) -> Any:
    """Prompts as one array, the shorter filled up on one side."""
    length = max(map(len, prompts))
    filled = [(p, [PAD] * (length - len(p))) for p in prompts]
    return np.array([p + pads if side == "right" else pads + p for p, pads in filled])


def ours(artifact: Artifact, *prompts: list[int]) -> Tokens:
    ids = padded("left", *prompts)
    decoder = Decoder(artifact.session(1))
    tokens = generate(decoder, ids, (ids != PAD).astype(np.int64), max_new_tokens=NEW)
    found: Tokens = np.stack(list(tokens), 1).tolist()
    assert len({tuple(row) for row in found}) == len(prompts)
    assert len(set(found[0])) >= 3
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_onnxruntime_genai(laid_out: tuple[Artifact, Path], count: int) -> None:
    """It pads on the right; a pad on the left is a token to it."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    artifact, folder = laid_out
    prompts = PROMPTS[:count]
    ids = padded("right", *prompts)
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=ids.shape[1] + NEW, batch_size=count)
    generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [generator.get_sequence(i)[ids.shape[1] :] for i in range(count)]
    assert [[int(t) for t in row] for row in rows] == ours(artifact, *prompts)


def test_onnxruntime_genai_pads_so(laid_out: tuple[Artifact, Path]) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizer = og.Tokenizer(og.Model(str(laid_out[1])))
    assert tokenizer.encode("abc").tolist() == [68, 69, 70]
    found = np.array(tokenizer.encode_batch(["abcd", "b"]).as_numpy()).tolist()
    assert found == [[68, 69, 70, 71], [69, PAD, PAD, PAD]]


SCRIPT = """
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = require('@huggingface/transformers');
(async () => {
  const [root, name, ids, mask, count] = JSON.parse(process.argv[1]);
  env.allowRemoteModels = false;
  env.localModelPath = root;
  const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: 'fp32' });
  const dims = [ids.length, ids[0].length];
  const tensor = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat().map(BigInt)), dims);
  const out = await model.generate({
    input_ids: tensor(ids), attention_mask: tensor(mask), max_new_tokens: count, do_sample: false,
  });
  const rows = out.tolist().map((row) => row.map(Number).slice(dims[1]));
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  console.log(JSON.stringify([rows, tokenizer.encode('abc')]));
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


@pytest.mark.parametrize("count", [1, 2])
def test_transformers_js(node: str, laid_out: tuple[Artifact, Path], count: int) -> None:
    artifact, folder = laid_out
    prompts = PROMPTS[:count]
    ids = padded("left", *prompts)
    job = [f"{folder.parent}/", folder.name, ids.tolist(), (ids != PAD).astype(int).tolist(), NEW]
    run = subprocess.run(
        [node, "-e", SCRIPT, json.dumps(job)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [ours(artifact, *prompts), [68, 69, 70]]
