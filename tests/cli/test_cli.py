"""The command line: output, exit codes, and one sentence for every kind of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from graphprune.cli.app import app
from graphprune.cli.sensitivity import parse_ratios
from graphprune.cli.tables import timing_table
from graphprune.errors import GraphPruneError

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return invoke


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled tiny model, made by the command line."""
    out = tmp_path_factory.mktemp("made") / "out"
    result = CliRunner().invoke(
        app, ["compile", "tiny-bert", "--heads", "0.5", "--neurons", "0.5", "-o", str(out)]
    )
    assert result.exit_code == 0, result.stderr
    assert "4 of 8 heads" in result.stdout
    assert "x faster" in result.stdout
    assert str(out) in result.stdout.replace("\n", "")
    return out


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to break."""
    import shutil

    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def sentence(result: Result) -> str:
    """The error: one sentence, no traceback."""
    errors = result.stderr[result.stderr.index("error:") :].strip()
    assert "Traceback" not in result.stderr
    assert "\n" not in errors
    return errors


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder compiled with a cache, and a tokenizer put beside it as a user's model has one."""
    import graphprune as gp
    from graphprune.models.zoo.tiny import tiny
    from graphprune.passes import PruneNeurons

    model, inputs = tiny("tiny-gpt2")
    compiled = gp.compile(model, [PruneNeurons(0.5)], example_inputs=inputs, cache=True)
    compiled.files = {
        "tokenizer/tokenizer.json": tokenizer_json(99),
        "tokenizer/generation_config.json": b'{"eos_token_id": [98]}',
    }
    return compiled.export(tmp_path_factory.mktemp("cached") / "out").path


def tokenizer_json(count: int) -> bytes:
    """A tokenizer of so many words, w0, w1 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(count)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return bytes(tokenizer.to_str(), "utf-8")


# --- what works --------------------------------------------------------------------------------


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['graphprune', '--help']\n"
        "from graphprune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "compile" in done.stdout


def test_compile_prints_json_alone_on_stdout(run: Run, tmp_path: Path) -> None:
    result = run("compile", "tiny-mlp", "--neurons", "0.5", "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["report"]["after"]["parameters"] < summary["report"]["before"]["parameters"]
    assert summary["timing"]["batch"] == "1"
    assert set(summary["megabytes"]) == {"pruned", "dense"}
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_compile_without_the_dense_twin_writes_and_times_none(run: Run, tmp_path: Path) -> None:
    result = run("compile", "tiny-mlp", "--neurons", "0.5", "-o", "out", "--no-baseline")
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "out" / "baseline.onnx").exists()
    assert "faster" not in result.stdout
    again = run("bench", "out")
    assert again.exit_code == 2
    assert "dense twin" in sentence(again)


def test_compile_takes_a_recipe_file_and_replaces_its_own_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("passes:\n  - prune-neurons: {ratio: 0.5}\n")
    arguments = ("compile", "tiny-mlp", "--recipe", "my.yaml", "-o", "out", "--no-measure")
    for _ in range(2):
        assert run(*arguments).exit_code == 0


def test_compile_goes_on_from_an_artifact(run: Run, artifact: Path) -> None:
    result = run("compile", str(artifact), "--neurons", "0.5", "-o", "more", "--json")
    assert result.exit_code == 0, result.stderr
    passes = [p["name"] for p in json.loads(result.stdout)["report"]["passes"]]
    assert passes == ["prune-neurons", "prune-heads", "prune-neurons"]
    compared = run("bench", "more", "--against", str(artifact), "--json")
    assert json.loads(compared.stdout)["speedup"] > 0


def test_inspect_shows_roles_and_reasons(run: Run, artifact: Path) -> None:
    shown = run("inspect", "tiny-bert")
    assert shown.exit_code == 0, shown.stderr
    assert "head" in shown.stdout
    assert "frozen:" in shown.stdout
    assert "encoder.layer.*" in shown.stdout
    assert "encoder.layer.1" in run("inspect", "tiny-bert", "--all").stdout
    found = json.loads(run("inspect", str(artifact), "--json").stdout)
    assert [g["size"] for g in found["groups"] if g["role"] == "head"] == [2, 2]


def test_sizes_of_images_can_be_dynamic(run: Run) -> None:
    kept = json.loads(run("inspect", "tiny-cnn", "--json").stdout)["limits"]
    assert any("--dynamic height,width" in line for line in kept)
    assert "cannot change" in run("inspect", "tiny-cnn").stdout
    asked = ("tiny-cnn", "--dynamic", "height, width")
    assert not json.loads(run("inspect", *asked, "--json").stdout)["limits"]
    made = run("compile", *asked, "--recipe", "clean", "--no-measure", "-o", "out")
    assert made.exit_code == 0, made.stderr
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["inputs"][0]["shape"] == ["batch", 3, "height", "width"]


@pytest.mark.parametrize(("given", "ratio"), [("50%", 0.5), ("12.5%", 0.125), ("0.25", 0.25)])
def test_ratios_may_be_per_cent(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str, ratio: float
) -> None:
    found: list[Any] = []

    def stops(model: str, steps: list[Any], *rest: Any) -> Any:
        found.extend(steps)
        raise GraphPruneError("enough")

    monkeypatch.setattr("graphprune.cli.compile.run", stops)
    run("compile", "tiny-bert", "--heads", given, "--neurons", given, "-o", "out")
    assert [step.ratio for step in found] == [ratio, ratio]
    assert parse_ratios(f"{given}, 0.75") == [ratio, 0.75]
    refused = run("compile", "tiny-bert", "--heads", "half", "-o", "out")
    assert refused.exit_code == 2
    assert "write 0.5, or 50%" in refused.stderr


def test_times_have_three_digits_and_no_exponent_and_name_the_clock() -> None:
    timing: dict[str, Any] = {"batch": "8x128", "threads": 1, "clock": "cpu"}
    for name, values in (("dense", (1013.4, 999.9, 1e4)), ("pruned", (99.96, 0.01234, 12.34))):
        for key, value in zip(("_ms", "_low_ms", "_high_ms"), values, strict=True):
            timing[f"{name}{key}"] = value
    console = Console(width=120)
    with console.capture() as shown:
        console.print(timing_table(timing))
    for text in ("1,010 ms", "1,000 to 10,000", "100 ms", "0.0123 to 12.3", "CPU time"):
        assert text in shown.get()


def test_bench_measures_an_artifact_and_a_model(run: Run, artifact: Path) -> None:
    row = json.loads(run("bench", str(artifact), "--batch", "2x16", "--json").stdout)
    assert row["batch"] == "2x16"
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert "faster than dense" in run("bench", str(artifact)).stdout
    assert "dense_ms" in json.loads(run("bench", "tiny-mlp", "--json").stdout)


def test_passes_recipes_and_models_are_listed(run: Run) -> None:
    passes = {p["name"]: p for p in json.loads(run("passes", "--json").stdout)}
    options = {o["option"]: o for o in passes["prune-heads"]["options"]}
    assert options["ratio"]["default"] == "required"
    assert options["score"]["default"] == "magnitude"
    assert all(o["meaning"] for o in options.values())
    assert "prune-heads" in run("passes").stdout
    for name, text in json.loads(run("recipes", "--json").stdout).items():
        assert name in run("recipes").stdout
        assert text
    assert "minilm" in run("models").stdout


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    """A calibration file for tiny-mlp."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", x=x)
    return "calibration.npz"


def test_compile_with_calibration_scores_by_it(run: Run, tmp_path: Path, arrays: str) -> None:
    arguments = ("compile", "tiny-mlp", "--neurons", "0.5", "--calibration", arrays, "--json")
    result = run(*arguments, "--quantize", "int8-dynamic", "-o", "out")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    prune, quantize = summary["report"]["passes"]
    assert prune["step"]["prune-neurons"]["score"] == "obs"
    assert quantize["name"] == "quantize"
    assert prune["details"]["output_error"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["results"]["timing"] == summary["timing"]
    assert "faster" in (tmp_path / "out" / "report.html").read_text()
    assert run("bench", "out").exit_code == 0  # whose hashes were brought up to date


def test_bench_takes_several_opponents(run: Run, artifact: Path) -> None:
    arguments = ("bench", str(artifact), "--batch", "2x16", "--against", "dense,int8")
    row = json.loads(run(*arguments, "--json").stdout)
    assert row["against"] == "dense"
    assert row["others"]["int8"]["dense_ms"] > 0
    shown = run(*arguments).stdout
    assert "faster than dense" in shown
    assert "faster than int8" in shown


@pytest.mark.slow
def test_generate_streams_text_and_says_how_fast(run: Run, cached: Path) -> None:
    options = ("--prompt", "w7 w8 w9", "--max-new-tokens", "6")
    plain = run("generate", str(cached), *options)
    assert plain.exit_code == 0, plain.stderr
    words = plain.stdout.split()
    assert len(words) == 6
    assert all(0 <= int(word[1:]) < 99 for word in words)
    assert "prompt 3 tokens" in plain.stderr
    assert "6 new" in plain.stderr
    found = json.loads(run("generate", str(cached), *options, "--json").stdout)
    assert found["text"].split() == words
    assert (found["prompt_tokens"], found["new_tokens"]) == (3, 6)
    assert found["decode_tokens_per_second"] > 0
    drawn = [
        run("generate", str(cached), *options, "--temperature", "5", "--seed", seed).stdout
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_compile_with_cache_alone_and_bench_a_step(run: Run, tmp_path: Path) -> None:
    result = run("compile", "tiny-gpt2", "--cache", "-o", "out", "--batch", "2x20")
    assert result.exit_code == 0, result.stderr
    assert "2x1 after 20" in result.stdout
    timing = json.loads(run("bench", "out", "--batch", "3x30", "--json").stdout)
    assert timing["batch"] == "3x1 after 30"
    assert json.loads(run("bench", "out", "--json").stdout)["batch"] == "1x1 after 32"
    refused = run("bench", "out", "--batch", "1x64")
    assert refused.exit_code == 2
    assert "one more token after 64" in sentence(refused)


@pytest.mark.slow
def test_what_generate_refuses(run: Run, cached: Path, artifact: Path, tmp_path: Path) -> None:
    import graphprune as gp

    assert "prompt is empty" in sentence(run("generate", str(cached), "--prompt", " "))
    assert "chat template" in sentence(run("generate", str(cached), "--prompt", "w1", "--chat"))
    assert "positions" in sentence(run("generate", str(cached), "--prompt", "w1 " * 70))
    loaded = gp.load(cached)
    cases: list[tuple[dict[str, Path | bytes], str]] = [
        ({}, "without a tokenizer"),
        ({"tokenizer/tokenizer.json": tokenizer_json(200)}, "tokenizer is not the model's"),
        ({"tokenizer/tokenizer.json": b"{}"}, "no usable tokenizer"),
    ]
    for files, reason in cases:
        loaded.files = files
        other = loaded.export(tmp_path / "other", baseline=False)
        refused = run("generate", str(other.path), "--prompt", "w150")
        assert refused.exit_code == 2
        assert reason in sentence(refused)
    bare = gp.load(artifact)
    bare.files = {"tokenizer/tokenizer.json": tokenizer_json(99)}
    bare.export(tmp_path / "bare", baseline=False)
    assert "--cache" in sentence(run("generate", str(tmp_path / "bare"), "--prompt", "w1"))
    assert "no key/value cache" in sentence(run("compile", "tiny-bert", "--cache", "-o", "out"))


def test_sensitivity_as_table_json_and_page(run: Run, tmp_path: Path, arrays: str) -> None:
    common = ("sensitivity", "tiny-mlp", "--ratios", "0.5", "--calibration", arrays)
    shown = run(*common, "--plot", "page.html")
    assert shown.exit_code == 0, shown.stderr
    assert "50 % removed" in shown.stdout
    assert "faster" in shown.stdout
    assert "Sensitivity of tiny-mlp" in (tmp_path / "page.html").read_text()
    found = json.loads(run(*common, "--no-measure", "--json").stdout)
    assert found["samples"] == 40
    assert found["times"] == []
    assert all(cost["error"] > 0 for cost in found["costs"])
    few = json.loads(run(*common, "--no-measure", "--json", "--calibration-lines", "7").stdout)
    assert few["samples"] == 7
    none = run("sensitivity", "tiny-mlp", "--ratios", "0.5", "--no-measure")
    assert "example inputs only" in none.stdout


def test_recipes_say_what_they_need(run: Run) -> None:
    found = json.loads(run("recipes", "--json").stdout)
    needing = {name for name, row in found.items() if row["needs"]}
    assert needing == {"edge", "edge-int8", "gentle", "neuroprune", "recover", "sparse"}


def test_demo_on_a_tiny_model(run: Run, tmp_path: Path) -> None:
    result = run("demo", "tiny-bert")
    assert result.exit_code == 0, result.stderr
    assert "what next" in result.stdout
    assert (tmp_path / "demo-out" / "model.onnx").is_file()


# --- what is refused ---------------------------------------------------------------------------

COMPILE = ("compile", "tiny-mlp", "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (COMPILE, "nothing to do"),
        ((*COMPILE, "--neurons", "1.0"), "below 1"),
        ((*COMPILE, "--neurons", "-0.1"), "at least 0"),
        ((*COMPILE, "--neurons", "nan"), "nan"),
        ((*COMPILE, "--neurons", "0.5", "--score", "magnitud"), "'magnitude'"),
        ((*COMPILE, "--neurons", "0.5", "--recipe", "half"), "not both"),
        ((*COMPILE, "--neurons", "0.5", "--batch", "8 x 128"), "8x128"),
        ((*COMPILE, "--neurons", "0.5", "--ignore", "no.such.name"), "matches nothing"),
        ((*COMPILE, "--recipe", "hlaf"), "'half'"),
        ((*COMPILE, "--recipe", "bad-pass.yaml"), "'prune-heads'"),
        ((*COMPILE, "--recipe", "bad-option.yaml"), "'ratio'"),
        (
            (*COMPILE, "--recipe", "broken.yaml"),
            "'broken.yaml' is not valid YAML: line 1, column 10",
        ),
        (
            (*COMPILE, "--recipe", "nul.yaml"),
            "'nul.yaml' is not valid YAML: unacceptable character",
        ),
        ((*COMPILE, "--quantize", "int8-static"), "no data: scheme='int8-dynamic' for quantize"),
        ((*COMPILE, "--heads", "0.5"), "no axis group"),
        (("compile", "tiny-bert", "--recipe", "frozen.yaml", "-o", "out"), "frozen"),
        (("compile", "./nowhere", "--neurons", "0.5", "-o", "out"), "no folder"),
        (("compile", "tiny-mlp", "--neurons", "0.5", "-o", "foreign"), "did not write it"),
        (("compile", "tiny-mlp", "--neurons", "0.5", "-o", "file"), "file"),
        (("inspect", "a b"), "no folder"),
        (("inspect", "tiny-vit", "--dynamic", "height"), "'height' cannot be dynamic"),
        (("inspect", "tiny-mlp", "--dynamic", "width"), "no input"),
        (("inspect", "tiny-mlp", "--dynamic", "depth"), "'depth' is no size"),
        (("inspect", "foreign"), "config.json"),
        (("bench", "tiny-mlp", "--against", "foreign"), "compile the model first"),
        ((*COMPILE, "--neurons", "0.5", "--score", "obs"), "--calibration FILE"),
        ((*COMPILE, "--recipe", "edge"), "--calibration FILE"),
        ((*COMPILE, "--neurons", "0.5", "--calibration", "nowhere.txt"), "no calibration file"),
        ((*COMPILE, "--neurons", "0.5", "--calibration", "file"), ".npz"),
        ((*COMPILE, "--neurons", "0.5", "--calibration", "foreign"), "train.tsv"),
        ((*COMPILE, "--quantize", "int9"), "int8"),
        (("sensitivity", "tiny-mlp", "--ratios", "half"), "0.25,0.5"),
        (("sensitivity", "tiny-mlp", "--ratios", "0.5,1"), "below 1"),
        (("sensitivity", "tiny-mlp", "--score", "obss"), "obs"),
        (("sensitivity", "tiny-mlp", "--role", "head"), "no axis group"),
        (("sensitivity", "tiny-mlp", "--plot", "page.pdf"), ".html"),
        (("sensitivity", "tiny-mlp", "--plot", "no/page.html"), "no such folder"),
        (("bench", "tiny-mlp", "--against", "dense,int8"), "compile the model first"),
        (("eval", "tiny-mlp", "--task", "stss"), "'sts'"),
        (("eval", "tiny-mlp", "--task", "sts", "--data", "file-not-there"), "no file"),
        (("eval", "tiny-mlp", "--task", "neighbours"), "dense twin"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_leaves_no_file(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "bad-pass.yaml").write_text("passes: [prune-haeds]")
    (tmp_path / "bad-option.yaml").write_text("passes: [{prune-heads: {ration: 0.5}}]")
    (tmp_path / "broken.yaml").write_text("passes: [")
    (tmp_path / "nul.yaml").write_text("passes: \0")
    (tmp_path / "frozen.yaml").write_text("passes: [{prune-axis: {ratio: 0.5, role: residual}}]")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = _tree(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in sentence(result)
    assert "<unicode string>" not in result.stderr
    assert _tree(tmp_path) == before


PRUNE = (*COMPILE, "--neurons", "0.5")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compile", "tiny-mlp", "--neurons", "0.5", "-o", "file/out"), "cannot be written"),
        (("compile", "tiny-mlp", "--neurons", "0.5", "-o", "/proc/out"), "cannot be written"),
        ((*PRUNE, "--calibration", "latin.txt"), "'latin.txt' is no UTF-8"),
        ((*PRUNE, "--calibration", "broken.npz"), "'broken.npz' is no .npz file"),
        (("sensitivity", "tiny-mlp", "--calibration", "empty.txt"), "holds no sentence"),
        (("sensitivity", "tiny-mlp", "--role", "haed"), "no role 'haed'; did you mean 'head'"),
        (("sensitivity", "tiny-mlp", "--score", "obss"), "'obs'"),
        (("sensitivity", "tiny-mlp", "--plot", "/proc/page.html"), "cannot be written"),
        ((*COMPILE, "--recipe", "late.yaml"), "'prune-neurons' comes after 'quantize'"),
        ((*COMPILE, "--recipe", "role.yaml"), "did you mean 'head'"),
        (
            (*PRUNE, "--task", "digits", "--checkpoints", "/proc/checkpoints"),
            "'/proc/checkpoints/checkpoint' cannot be written",
        ),
        (("bench", "made", "--against", "dense,nowhere"), "nothing called 'nowhere'"),
        (("bench", "made", "--against", "itn8"), "did you mean 'int8'"),
        (("bench", "made", "--against", "foreign"), "'foreign' is no artifact"),
        (("bench", "tiny-mlp", "--against", "int8"), "compile the model first"),
    ],
    ids=str,
)
def test_what_needs_no_model_to_be_seen_is_refused_before_one_is_loaded(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    def loads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("graphprune.models.load_model", loads)
    monkeypatch.setattr("graphprune.exporters.open_artifact", loads)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.npz").write_text("no zip")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "role.yaml").write_text("passes: [{prune-axis: {ratio: 0.5, role: haed}}]")
    (tmp_path / "late.yaml").write_text(
        "passes: [{quantize: {scheme: int8-dynamic}}, "
        "{repeat: {passes: [{prune-neurons: {ratio: 0.5}}]}}]"
    )
    for folder, name in (("foreign", "letter.txt"), ("made", "manifest.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    before = _tree(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in sentence(result)
    assert _tree(tmp_path) == before


def test_names_that_match_nothing_are_refused_before_any_pass_or_training(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("worked")

    monkeypatch.setattr("graphprune.pipeline.pipeline.run_pass", works)
    monkeypatch.setattr("graphprune.cli.training.training_of", works)
    (tmp_path / "late.yaml").write_text(
        "passes: [{prune-neurons: {ratio: 0.5}}, {repeat: {passes: ["
        "{prune-heads: {ratio: 0.5, ignore: [layers.0.wieght]}}]}}]"
    )
    for more in ((), ("--task", "digits")):
        result = run(*COMPILE, "--recipe", "late.yaml", *more)
        assert result.exit_code == 2, result.output
        assert "ignore: 'layers.0.wieght' matches nothing; did you mean" in sentence(result)


def test_a_twin_that_is_not_there_is_missed_before_the_program_is_read(
    run: Run, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr("graphprune.api.load", reads)
    monkeypatch.setattr("graphprune.exporters.Artifact.has_baseline", False)
    for against in ("dense", "int8"):
        result = run("bench", str(copied), "--against", against)
        assert result.exit_code == 2, result.output
        assert "no dense twin" in sentence(result)


@pytest.mark.parametrize(
    "file", ["model.onnx", "program/program.json", "program/tensors.safetensors"]
)
@pytest.mark.parametrize(
    "command", [("bench",), ("inspect",), ("compile", "--neurons", "0.5", "-o", "x")]
)
def test_a_tampered_artifact_is_refused(run: Run, copied: Path, command: Any, file: str) -> None:
    target = copied / file
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(bytes(data))
    result = run(command[0], str(copied), *command[1:])
    assert result.exit_code == 2
    assert file in sentence(result)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "graphprune-artifact", "sha256": {}}']
)
def test_a_broken_manifest_is_refused(run: Run, copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    result = run("inspect", str(copied))
    assert result.exit_code == 2
    assert "manifest.json" in sentence(result) or "export" in sentence(result)


def test_a_fault_of_ours_is_exit_code_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr("graphprune.pipeline.recipe.builtin_recipes", broken)
    result = run("recipes")
    assert result.exit_code == 1
    assert "internal error, RuntimeError: oops" in sentence(result)


def _tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_version(run: Run) -> None:
    import graphprune

    assert run("--version").stdout == f"graphprune {graphprune.__version__}\n"
