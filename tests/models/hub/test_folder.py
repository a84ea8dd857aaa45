"""A hub folder: what of it tells what became of the model, and what runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import graphprune as gp
from graphprune.exporters import Artifact
from graphprune.exporters.artifact.results import add_results
from graphprune.models.hub.folder import _config
from graphprune.models.zoo.sentence import SentenceEncoder
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneHeads, PruneNeurons, Quantize
from graphprune.report.report import ModelSize, PassReport, Report

pytest.importorskip("transformers")


def tokenizer(words: int) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, words)}}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))


@pytest.fixture(scope="module")
def compiled() -> gp.Compiled:
    bert, inputs = tiny("tiny-bert")
    types = torch.zeros_like(inputs["input_ids"])
    types[:, 3:] = 1
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    passes = [PruneHeads(0.25, ignore=("*layer.0.*",)), PruneNeurons(0.5)]
    model = SentenceEncoder(bert).eval()
    return gp.compile(model, passes, example_inputs={**inputs, "token_type_ids": types})


@pytest.fixture(scope="module")
def made(compiled: gp.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("hub") / "out"
    return compiled.export(folder, tokenizer=tokenizer(50), metadata={"stride": "32"})


def config_of(artifact: Artifact) -> Any:
    return json.loads((artifact.path / "config.json").read_text())


def test_a_text_model_becomes_a_hub_folder(made: Artifact) -> None:
    names = {f.relative_to(made.path).as_posix() for f in made.path.rglob("*") if f.is_file()}
    root = {"config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "README.md"}
    assert root | {"onnx/model.onnx", "graphprune/manifest.json"} <= names
    assert "manifest.json" not in names
    assert made.manifest["opset"] == 20
    outputs = [o.name for o in made.session(1).get_outputs()]
    assert outputs == ["last_hidden_state", "sentence_embedding"]
    shapes = {i.name: i.shape for i in made.session(1).get_inputs()}
    sizes = ["batch_size", "sequence_length"]
    assert shapes == {"input_ids": sizes, "attention_mask": sizes}


def test_onnx_metadata_is_what_was_given_and_ours(made: Artifact) -> None:
    import onnx

    props = {p.key: p.value for p in onnx.load(made.model_path).metadata_props}
    assert props["stride"] == "32"


def test_the_files_agree_with_torch(made: Artifact, compiled: gp.Compiled) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 90, (3, 9))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    for types in (np.zeros_like(ids), (ids > 40).astype(np.int64)):
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        with torch.no_grad():
            given = {k: torch.from_numpy(v) for k, v in feeds.items()}
            expected = compiled.module(**given)
        if not types.any():
            del feeds["token_type_ids"]
        hidden, embedding = made.session(1).run(None, feeds)
        np.testing.assert_allclose(embedding, expected["sentence_embedding"], atol=1e-5)
        np.testing.assert_allclose(hidden, expected["last_hidden_state"], atol=1e-4)


def test_config_keeps_the_usual_keys_and_adds_one_of_its_own(made: Artifact) -> None:
    config = config_of(made)
    assert config["num_attention_heads"] == 4
    assert "per_layer_config" not in config
    own = config["graphprune"]
    assert own["parameters"][0] > own["parameters"][1]
    roles = {(layer["role"], layer["before"], layer["after"]) for layer in own["layers"].values()}
    assert roles == {("head", 4, 3), ("neuron", 64, 32)}
    assert "transformers.js_config" not in config  # nothing lies beside the graph


def test_weights_beside_are_named_where_web_runtimes_look(
    compiled: gp.Compiled, tmp_path: Path
) -> None:
    beside = compiled.export(tmp_path / "out", weights="beside", baseline=False)
    assert (beside.path / "onnx" / "model.onnx_data").is_file()
    settings = config_of(beside)["transformers.js_config"]
    assert settings == {"use_external_data_format": {"model.onnx": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "name"),
    [("int8-dynamic", "model_quantized.onnx"), ("int4-weights", "model_q4.onnx")],
)
def test_a_quantized_model_lies_beside_its_float_form(
    scheme: str, name: str, compiled: gp.Compiled, tmp_path: Path
) -> None:
    again = gp.compile(compiled, [Quantize(scheme, block_size=16)])
    artifact = again.export(tmp_path / "out")
    assert artifact.model_path == artifact.path / "onnx" / name
    files = {"model.onnx", name, f"{name}.data"}  # the last is empty, for transformers
    assert {f.name for f in (artifact.path / "onnx").iterdir()} == files
    assert artifact.manifest["sizes"][name] == artifact.model_path.stat().st_size
    assert config_of(artifact)["graphprune"]["quantization"] == scheme
    assert f"onnx/{name}" in (artifact.path / "README.md").read_text()
    feeds = artifact.feeds(tuple(compiled.program.forward.example))
    whole = gp.exporters.runtime.session.open_session(artifact.path / "onnx" / "model.onnx", 1)
    near, exact = artifact.session(1).run(None, feeds)[1], whole.run(None, feeds)[1]
    assert 0 < np.abs(near - exact).max() < 0.2


def test_the_card_shows_what_was_measured_later(made: Artifact, compiled: gp.Compiled) -> None:
    card = (made.path / "README.md").read_text()
    assert "| prune-heads |" in card
    assert compiled.report.verification() in card
    quality = {"pruned": {"task": "sts", "metric": "Spearman", "value": 0.8012}}
    noted = add_results(made, compiled.report, {"quality": quality}, compiled.described)
    assert "| sts: Spearman |  | 0.8012 |" in (made.path / "README.md").read_text()
    assert gp.open(made.path).manifest["results"] == noted.manifest["results"]


def test_a_tokenizer_of_another_model_is_refused_before_any_work(
    compiled: gp.Compiled, tmp_path: Path
) -> None:
    with pytest.raises(gp.GraphPruneError, match="ids up to 119, and the model's table ends at 98"):
        compiled.export(tmp_path / "out", tokenizer=tokenizer(120))
    assert not (tmp_path / "out").exists()


def test_an_artifact_goes_on_as_the_same_folder(made: Artifact, tmp_path: Path) -> None:
    again = gp.compile(gp.load(made.path), [PruneNeurons(0.5)]).export(tmp_path / "more")
    assert again.layout.name == "hub"
    assert (again.path / "tokenizer.json").read_bytes() == (
        made.path / "tokenizer.json"
    ).read_bytes()
    layers = config_of(again)["graphprune"]["layers"].values()
    assert {layer["after"] for layer in layers if layer["role"] == "neuron"} == {16}
    assert again.has_baseline


def test_any_model_may_be_laid_out_flat(compiled: gp.Compiled, tmp_path: Path) -> None:
    flat = compiled.export(tmp_path / "out", layout="flat", baseline=False)
    assert flat.model_path == flat.path / "model.onnx"
    assert (flat.path / "manifest.json").is_file()


@pytest.mark.slow
def test_a_phone_gets_one_file_that_computes_the_same(made: Artifact, tmp_path: Path) -> None:
    """The command of docs/deploy.md."""
    command = ["-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(made.model_path)]
    command += ["--output_dir", str(tmp_path), "--optimization_style", "Fixed"]
    command += ["--enable_type_reduction"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "MultiHeadAttention" in (tmp_path / "model.required_operators_and_types.config").read_text()
    )
    ids = np.arange(24).reshape(3, 8) + 5
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    near = onnxruntime.InferenceSession(tmp_path / "model.ort").run(None, feeds)
    for a, b in zip(made.session(1).run(None, feeds), near, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    words = " ".join(["-m", "onnxruntime.tools.convert_onnx_models_to_ort"])
    assert words in (Path(__file__).parents[3] / "docs" / "deploy.md").read_text()


def test_config_counts_the_layers_that_still_have_a_cache() -> None:
    size = ModelSize(10, 40, 0)
    sublayer = {"branches": ["layers.0.attention", "layers.0"]}
    done = PassReport(
        "drop-sublayers", "", True, "", None, None, 0.0, (), {"dropped": sublayer["branches"]}
    )
    pasts = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    manifest = {
        "inputs": [{"name": name} for name in ("input_ids", *pasts)],
        "precision": {"onnx": "float32"},
        "beside": [],
    }
    for key in ("num_hidden_layers", "n_layer"):
        config = {key: 3, "hidden_size": 8}
        made = _config(config, manifest, Report("model", size, size, (done,)))
        assert made[key] == 2
        assert made["graphprune"]["dropped"] == sublayer["branches"]
        # Layers that never had a cache are no dropped ones.
        assert _config(config, manifest, Report("model", size, size))[key] == 3
        encoder = {**manifest, "inputs": [{"name": "input_ids"}]}
        assert _config(config, encoder, Report("model", size, size, (done,)))[key] == 3
