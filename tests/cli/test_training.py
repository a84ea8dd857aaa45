"""Training from the command line: labeled files, a fresh head, recovery, and what is refused."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune.cli.app import app
from graphprune.cli.compile import steps_of
from graphprune.cli.sizes import input_names
from graphprune.cli.subject import Model
from graphprune.cli.summary import Summary
from graphprune.cli.training import (
    LabeledData,
    TrainingOptions,
    labeled_data,
    trained_first,
    training_of,
    with_task_head,
)
from graphprune.errors import RecipeError
from graphprune.models import load_model
from graphprune.models.data.tables import Schema
from graphprune.models.tasks import evaluate
from graphprune.passes import L1, Distill, Finetune, PruneHeads, PruneNeurons, PruneRecover

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with its tokenizer, and labeled files: whether w1 is in a text, how often.

    The encoder is in m/, the files are train.tsv, dev.tsv (labels no and yes) and pairs.tsv.
    """
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("labeled")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=22,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        model = transformers.BertModel(config, add_pooling_layer=False)
        model.embeddings.word_embeddings.weight.data.normal_()
        model.save_pretrained(root / "m")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(20)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "m" / "tokenizer.json"))
    (root / "m" / "tokenizer_config.json").write_text(
        '{"pad_token": "[PAD]", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    rng = random.Random(0)
    for name, count in (("train", 160), ("dev", 60)):
        texts = [_text(rng, i % 2) for i in range(count)]
        _write(root / f"{name}.tsv", "text\tlabel", [[t, _label(t)] for t in texts])
    pairs = [[_text(rng, i % 3), _text(rng, i % 2)] for i in range(90)]
    rows = [[*p, str(sum(t.split().count("w1") for t in p))] for p in pairs]
    _write(root / "pairs.tsv", "sentence1\tsentence2\tscore", rows)
    return root


def _text(rng: random.Random, hits: int) -> str:
    words = [f"w{rng.randrange(2, 20)}" for _ in range(rng.randrange(3, 9))] + ["w1"] * hits
    rng.shuffle(words)
    return " ".join(words)


def _label(text: str) -> str:
    return "yes" if "w1" in text.split() else "no"


def _write(file: Path, header: str, rows: list[list[str]]) -> None:
    file.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", "utf-8")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line beside the labeled files."""
    monkeypatch.chdir(folder)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return invoke


TASK = ("--task", "classification")
LEARN = (*TASK, "--train", "train.tsv", "--lr", "0.005", "--batch-size", "16")
CUT = ("compile", "m", "--neurons", "0.5", "--heads", "0.5", "--no-measure")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    """What compile said of a model with a fresh head, pruned and distilled; it is in out/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = (*CUT, *LEARN, "--eval", "dev.tsv", "--distill", "2", "--epochs", "4")
        result = CliRunner().invoke(app, [*arguments, "-o", "out", "--json"])
    assert result.exit_code == 0, result.stderr
    assert "train the dense model" in result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.slow
def test_a_fresh_head_is_trained_before_pruning_and_is_the_dense_model(
    made: Any, folder: Path
) -> None:
    quality, trained = made["quality"], made["trained"]
    assert "the dense model" in (folder / "out" / "graphprune" / "report.html").read_text("utf-8")
    assert [p["name"] for p in made["report"]["passes"]] == [
        "prune-neurons",
        "prune-heads",
        "distill",
    ]
    # Half of the examples are yes: an untrained head knows nothing.
    assert trained["metric_before"] < 0.75
    assert trained["metric_after"] > 0.9
    assert quality["dense"]["value"] == pytest.approx(trained["metric_after"])
    distilled = made["report"]["passes"][2]["details"]
    assert quality["pruned"]["value"] == pytest.approx(distilled["metric_after"])
    assert quality["pruned"]["value"] > 0.9
    # Calibrated on the training file, since nothing else was given.
    assert made["report"]["passes"][0]["step"]["prune-neurons"]["score"] == "obs"
    assert made["calibration"]["samples"] == 160


def test_the_teacher_is_the_trained_model(folder: Path) -> None:
    options = TrainingOptions("classification", folder / "train.tsv", epochs=1, lr=0.005)
    labeled = labeled_data(options, [])
    assert labeled is not None
    tokenizer = folder / "m"
    subject, labeled = with_task_head(Model(load_model(str(tokenizer))), labeled, 0)
    assert isinstance(subject, Model)
    for module in subject.loaded.module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = subject.captured()
    training = training_of(labeled, input_names(start.program), tokenizer, 64)
    dense, _ = trained_first(start, training, options, 0, lambda event: None)
    head = "head.weight"
    assert not torch.allclose(dense.program.tensors[head], start.program.tensors[head])
    assert dense.report.before == dense.report.after
    # Nothing was cut and nothing is dropped out, so the student equals the teacher.
    again = gp.compile(dense, [Distill(alpha=0, epochs=1, lr=1e-12)], training=training)
    assert again.report.passes[0].details["epochs"][0]["loss"] == pytest.approx(0, abs=1e-6)
    assert [p.name for p in again.report.passes] == ["distill"]


def test_the_artifact_remembers_columns_and_classes(
    run: Run, sentence: Sentence, folder: Path, made: Any
) -> None:
    schema = Schema.from_file(folder / "out" / "graphprune" / "task.json")
    assert schema == Schema("classification", ("text",), "label", ("no", "yes"))
    assert (
        "graphprune/task.json"
        in json.loads((folder / "out" / "graphprune" / "manifest.json").read_text())["sha256"]
    )
    evaluation = ("eval", "out", "--task", "classification", "--data", "dev.tsv")
    found = json.loads(run(*evaluation, "--json").stdout)
    assert found["pruned"] == made["quality"]["pruned"]
    assert found["dense"] == made["quality"]["dense"]
    assert "±" in run(*evaluation).stdout
    in_torch = evaluate(
        "classification",
        gp.load(folder / "out").program,
        tokenizer_dir=folder / "out",
        data=folder / "dev.tsv",
        schema=schema,
    )
    assert in_torch.value == found["pruned"]["value"]
    # Other names of the same columns.
    text = (folder / "dev.tsv").read_text().replace("text\tlabel", "q\tkind", 1)
    (folder / "renamed.tsv").write_text(text)
    other = (*evaluation[:-1], "renamed.tsv")
    assert "lacks the columns ['text', 'label']" in sentence(run(*other))
    named = run(*other, "--text-column", "q", "--label-column", "kind", "--json")
    assert json.loads(named.stdout) == found


@pytest.mark.slow
def test_compile_goes_on_from_an_artifact_with_its_head(run: Run, folder: Path, made: Any) -> None:
    arguments = ("compile", "out", "--neurons", "0.5", *LEARN, "--eval", "dev.tsv")
    result = run(*arguments, "--finetune", "1", "--no-measure", "-o", "more", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["trained"] is None
    names = [p["name"] for p in found["report"]["passes"]]
    assert names == ["prune-neurons", "prune-heads", "distill", "prune-neurons", "finetune"]
    assert found["quality"]["dense"] == made["quality"]["dense"]
    assert (folder / "more" / "graphprune" / "task.json").read_bytes() == (
        folder / "out" / "graphprune" / "task.json"
    ).read_bytes()


@pytest.mark.slow
def test_a_trained_head_is_judged_and_pruned_as_it_is(run: Run, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig.from_pretrained(folder / "m", id2label={0: "yes", 1: "no"})
    model = transformers.BertForSequenceClassification(config)
    model.classifier.weight.data.normal_()
    model.save_pretrained(folder / "c")
    for file in (folder / "m").glob("tokenizer*"):
        shutil.copy(file, folder / "c")
    evaluation = (*TASK, "--data", "dev.tsv", "--json")
    dense = json.loads(run("eval", "c", *evaluation).stdout)["dense"]
    arguments = ("compile", "c", "--heads", "0.25", "--score", "magnitude", "--no-measure")
    result = run(*arguments, *TASK, "--eval", "dev.tsv", "-o", "kept-head", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["trained"] is None
    assert found["quality"]["dense"] == dense
    assert Schema.from_file(folder / "kept-head" / "graphprune" / "task.json").classes == (
        "yes",
        "no",
    )
    header, *rows = (folder / "dev.tsv").read_text().splitlines()
    opposite = {"yes": "no", "no": "yes"}
    turned = [[text, opposite[label]] for text, label in (row.split("\t") for row in rows)]
    _write(folder / "turned.tsv", header, turned)
    wrong = json.loads(run("eval", "c", *TASK, "--data", "turned.tsv", "--json").stdout)["dense"]
    assert wrong["value"] == pytest.approx(1 - dense["value"])


@pytest.mark.slow
def test_pairs_are_trained_on_their_scores(run: Run, folder: Path) -> None:
    arguments = (*CUT, "--task", "regression", "--train", "pairs.tsv", "--eval", "pairs.tsv")
    more = ("--lr", "0.005", "--batch-size", "16", "--epochs", "4", "--finetune", "2")
    result = run(*arguments, *more, "-o", "scored", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    pruned = found["quality"]["pruned"]
    assert pruned["metric"] == "Spearman"
    assert pruned["value"] > found["trained"]["metric_before"] + 0.3
    last = found["report"]["passes"][-1]["details"]
    assert pruned["value"] == pytest.approx(last["metric_after"], abs=1e-3)
    inputs = json.loads((folder / "scored" / "graphprune" / "manifest.json").read_text())["inputs"]
    assert {i["name"] for i in inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    again = json.loads(
        run("eval", "scored", "--task", "regression", "--data", "pairs.tsv", "--json").stdout
    )
    assert again["pruned"] == pruned


@pytest.mark.slow
def test_texts_longer_than_the_model_takes_are_cut_everywhere(run: Run, folder: Path) -> None:
    # w1 is beyond the 64 positions of the model, and among them.
    rows = [["w2 " * 70 + "w1", "no"], ["w1 " + "w2 " * 69, "yes"]] * 20
    for name in ("long", "short"):
        length = 100 if name == "long" else 64
        cut = [[" ".join(text.split()[:length]), label] for text, label in rows]
        _write(folder / f"{name}.tsv", "text\tlabel", cut)
    found = []
    for name in ("long", "short"):
        file = f"{name}.tsv"
        arguments = (*CUT, *TASK, "--train", file, "--eval", file, "--calibration", file)
        result = run(*arguments, "--lr", "0.005", "--epochs", "1", "-o", name, "--json")
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout))
        evaluation = ("eval", name, *TASK, "--data", file, "--json")
        assert json.loads(run(*evaluation).stdout)["pruned"] == found[-1]["quality"]["pruned"]
    assert found[0]["calibration"] == found[1]["calibration"] == {"samples": 2, "tokens": 128}
    assert found[0]["quality"] == found[1]["quality"]
    first, second = (f["trained"]["epochs"][0]["loss"] for f in found)
    assert first == second


@pytest.mark.parametrize(
    ("losses", "metrics", "words"),
    [
        ([0.7, 0.6, 0.5], (0.505, 0.855), "3 epochs, accuracy 0.505 -> 0.855"),
        ([0.7, 0.6, 0.5], (None, None), "3 epochs, loss 0.700 -> 0.500"),
        ([0.7], (None, None), "1 epoch, loss 0.700"),
    ],
)
def test_the_dense_model_s_training_in_words(
    losses: list[float], metrics: tuple[float | None, float | None], words: str
) -> None:
    trained = {
        "epochs": [{"loss": loss} for loss in losses],
        "metric": None if metrics[0] is None else "accuracy",
        "metric_before": metrics[0],
        "metric_after": metrics[1],
    }
    none: Any = None
    summary = Summary("m", Path("out"), 1.0, none, {}, None, {}, trained=trained)
    assert summary.trained_first() == words
    assert not Summary("m", Path("out"), 1.0, none, {}, None, {}).trained_first()


def test_epochs_without_a_new_head_are_refused_for_images_too() -> None:
    labeled = LabeledData(TrainingOptions("digits", epochs=1), recovers=True)
    with pytest.raises(RecipeError, match="--epochs has no effect"):
        with_task_head(Model(load_model("tiny-vit")), labeled, 0)


@pytest.mark.slow
def test_training_resumes_where_its_checkpoints_are(
    run: Run, sentence: Sentence, folder: Path
) -> None:
    arguments = (*CUT, *LEARN, "--epochs", "1", "--finetune", "1", "--no-baseline")
    kept = (*arguments, "--checkpoints", "kept")
    first = run(*kept, "--eval", "dev.tsv", "-o", "once", "--json")
    assert first.exit_code == 0, first.stderr
    # Without a baseline the model is evaluated alone.
    assert list(json.loads(first.stdout)["quality"]) == ["pruned"]
    assert (folder / "kept" / "dense" / "0-finetune" / "training.json").is_file()
    assert (folder / "kept" / "0-finetune" / "training.json").is_file()
    said = sentence(run(*kept, "-o", "again"))
    assert "holds a checkpoint of an earlier run: go on from it with --resume" in said
    resumed = run(*kept, "--resume", "-o", "again")
    assert resumed.exit_code == 0, resumed.stderr
    one, two = (gp.load(folder / name).program.tensors for name in ("once", "again"))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.slow
def test_the_recipe_recover_names_what_it_needs(run: Run, folder: Path) -> None:
    assert json.loads(run("recipes", "--json").stdout)["recover"]["needs"] == "--task and --train"
    arguments = ("compile", "m", "--recipe", "recover", *LEARN, "-o", "recovered", "--no-measure")
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "2 of 4 heads" in shown.stdout or "1 of 4 heads" in shown.stdout
    distilled = gp.load(folder / "recovered").report.passes[2]
    assert distilled.step == {"distill": {"lr": 0.005}}
    # Two epochs, and no --eval to choose the best by.
    assert re.search(r"dense model trained first: 2 epochs, loss 0\.\d+ -> 0\.\d+", shown.stdout)


@pytest.fixture(scope="module")
def rated(folder: Path) -> str:
    """A recipe in which two passes train at a rate of their own, one of them the usual one."""
    file = folder / "rated.yaml"
    file.write_text(
        "passes:\n"
        "- finetune\n"
        "- distill: {lr: 5.0e-5}\n"
        "- l1: {lr: 0.25, alpha: 1.0}\n"
        "- prune-recover:\n"
        "    passes: [{prune-neurons: {ratio: 0.5}}, {finetune: {epochs: 1}}]\n"
        "    rounds: 2\n"
        "- prune-heads: {ratio: 0.25}\n"
    )
    return str(file)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (TrainingOptions("classification"), 5e-5),
        (TrainingOptions("classification", lr=0.125), 0.125),
        (TrainingOptions("digits"), 1e-3),
        (TrainingOptions("digits", lr=0.125), 0.125),
    ],
)
def test_the_learning_rate_reaches_what_trains_and_names_none(
    rated: str, options: TrainingOptions, rate: float
) -> None:
    first, distill, l1, recover, heads = steps_of(rated, {}, lr=options.own_rate)
    assert first == Finetune(lr=rate)
    assert (distill, l1) == (Distill(lr=5e-5), L1(lr=0.25, alpha=1.0))
    assert recover == PruneRecover((PruneNeurons(0.5), Finetune(epochs=1, lr=rate)), rounds=2)
    assert heads == PruneHeads(0.25)
    flags = steps_of(None, {"finetune": {"epochs": 1}, "prune-heads": None}, lr=options.own_rate)
    assert flags == [Finetune(epochs=1, lr=rate)]
    assert options.rate == rate


def test_the_digits_bring_their_own_data() -> None:
    pytest.importorskip("sklearn")
    from graphprune.models.zoo.digits import digits

    labeled = labeled_data(TrainingOptions("digits", batch=100), [])
    assert labeled is not None
    training = training_of(labeled, ["pixel_values"], None, 128)
    for split, batches in (("train", training.data), ("test", training.eval)):
        images, labels = digits(split)
        assert not callable(batches)
        assert batches is not None
        sums = {
            (round(float(i.sum()), 3), int(n))
            for b in batches
            for i, n in zip(b["pixel_values"], b["labels"], strict=True)
        }
        wanted = zip(images, labels, strict=True)
        assert sums == {(round(float(i.sum()), 3), int(n)) for i, n in wanted}


def test_spans_are_distilled_and_the_dense_model_learns_from_whole_texts(run: Run) -> None:
    steps = {}
    for out, spans in (("without", ()), ("with", ("--spans", "3"))):
        result = run("compile", "m", "--neurons", "0.5", *LEARN, "--distill", "1", "--epochs", "1",
                     *spans, "--no-measure", "--no-baseline", "-o", out, "--json")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        summary = json.loads(result.stdout)
        first, distill = summary["trained"], summary["report"]["passes"][-1]["details"]
        steps[out] = first["steps"], distill["steps"]
        assert distill["labels"] == "used"
    assert steps == {"without": (10, 10), "with": (10, 40)}


RECOVER = ("compile", "m", "--neurons", "0.5", "-o", "no")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*RECOVER, "--distill", "1"), "give --task classification"),
        (("compile", "m", "--recipe", "recover", "-o", "no"), "give --task classification"),
        ((*RECOVER, "--recipe", "half", "--distill", "1"), "not both"),
        ((*RECOVER, "--train", "train.tsv"), "--train needs --task"),
        ((*RECOVER, "--eval", "dev.tsv"), "--eval needs --task"),
        ((*RECOVER, "--checkpoints", "kept"), "--checkpoints needs --task"),
        ((*RECOVER, "--resume"), "--resume needs --task"),
        ((*RECOVER, "--epochs", "2"), "--epochs needs --task"),
        ((*RECOVER, "--lr", "5e-5"), "--lr needs --task"),
        ((*RECOVER, "--batch-size", "32"), "--batch-size needs --task"),
        ((*RECOVER, "--text-column", "text"), "--text-column needs --task"),
        ((*RECOVER, "--label-column", "label"), "--label-column needs --task"),
        ((*RECOVER, *TASK, "--eval", "dev.tsv", "--lr", "1"), "--lr is about training: give --tr"),
        ((*RECOVER, "--task", "digits", "--text-column", "text"), "--text-column is for a file"),
        (("compile", "out", *RECOVER[2:], *LEARN, "--finetune", "1", "--epochs", "2"), "--epochs"),
        (("compile", "out", *RECOVER[2:], *LEARN), "--lr has no effect"),
        ((*RECOVER, *TASK), "needs --train FILE"),
        ((*RECOVER, *TASK, "--eval", "dev.tsv", "--distill", "1"), "distill needs --train FILE"),
        ((*RECOVER, *TASK, "--eval", "dev.tsv", "--score", "magnitude"), "has no head"),
        ((*RECOVER, "--task", "clasification", "--train", "train.tsv"), "'classification'"),
        ((*RECOVER, "--task", "digits", "--train", "train.tsv"), "its own images"),
        ((*RECOVER, *TASK, "--train", "nowhere.tsv"), "no file 'nowhere.tsv'"),
        ((*RECOVER, *TASK, "--train", "broken.tsv"), "line 3"),
        ((*RECOVER, *TASK, "--train", "one.tsv"), "every row"),
        ((*RECOVER, *TASK, "--train", "train.tsv", "--eval", "other.tsv"), "'maybe' is none of"),
        ((*RECOVER, "--task", "regression", "--train", "train.tsv"), "is not a number"),
        ((*RECOVER, *TASK, "--train", "train.tsv", "--label-column", "x"), "lacks the columns"),
        ((*RECOVER, *LEARN, "--distill", "0"), "epochs must be"),
        ((*RECOVER, *LEARN, "--epochs", "0"), "epochs must be"),
        ((*RECOVER, *LEARN, "--lr", "-1"), "lr must be"),
        ((*RECOVER, *LEARN, "--batch-size", "0"), "--batch-size"),
        ((*RECOVER, "--spans", "2"), "--spans needs --task classification"),
        ((*RECOVER, *LEARN, "--finetune", "1", "--spans", "2"), "for passes that distill"),
        ((*RECOVER, *LEARN, "--distill", "1", "--spans", "-1"), "--spans must be 0 or more"),
        ((*RECOVER, "--task", "digits", "--distill", "1", "--spans", "2"), "is for --task class"),
        ((*RECOVER, *LEARN, "--resume"), "--checkpoints FOLDER"),
        (("compile", "tiny-bert", *RECOVER[2:], *LEARN), "no tokenizer"),
        (("eval", "m", *TASK, "--data", "dev.tsv"), "has no head"),
        (("eval", "m", *TASK, "--data", "nowhere.tsv"), "no file"),
        (("eval", "out", "--task", "regression", "--data", "pairs.tsv"), "for classification"),
        (("eval", "out", *TASK, "--data", "other.tsv"), "line 2: the label 'maybe'"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("made")
@pytest.mark.slow
def test_bad_input_is_one_sentence_before_any_work(
    run: Run, sentence: Sentence, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    _write(folder / "broken.tsv", "text\tlabel", [["w1", "yes"], ["w2"]])
    _write(folder / "one.tsv", "text\tlabel", [["w1", "yes"]])
    _write(folder / "other.tsv", "text\tlabel", [["w1", "maybe"]])
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in sentence(result)
    assert "capture" not in result.stderr
    assert not (folder / "no").exists()
