"""One sentence and an exit code for every kind of bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


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
        ((*COMPILE, "--neurons", "0.5", "--reduce-range"), "--quantize int8-dynamic or"),
        ((*COMPILE, "--quantize", "int4-weights", "--reduce-range"), "--reduce-range goes with"),
        ((*COMPILE, "--neurons", "0.5", "--target", "tensorrt"), "'genai'"),
        ((*COMPILE, "--neurons", "0.5", "--target", "genai"), "compile(..., cache=True)"),
        (("sensitivity", "tiny-mlp", "--ratios", "half"), "0.25,0.5"),
        (("sensitivity", "tiny-mlp", "--ratios", "0.5,1"), "below 1"),
        (("sensitivity", "tiny-mlp", "--score", "obss"), "obs"),
        (("sensitivity", "tiny-mlp", "--role", "head"), "no axis group"),
        (("sensitivity", "tiny-mlp", "--plot", "page.pdf"), ".html"),
        (("sensitivity", "tiny-mlp", "--plot", "no/page.html"), "no such folder"),
        (("bench", "tiny-mlp", "--against", "dense,int8"), "compile the model first"),
        (("eval", "tiny-mlp", "--task", "stss"), "'sts'"),
        (("eval", "tiny-mlp", "--task", "sts", "--data", "file-not-there"), "no file"),
        (("eval", "tiny-mlp", "--task", "neighbors"), "dense model"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_leaves_no_file(
    run: Run, sentence: Sentence, tmp_path: Path, arguments: tuple[str, ...], says: str
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
    sentence: Sentence,
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
    run: Run, sentence: Sentence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def _tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}
