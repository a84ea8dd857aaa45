"""Labeled files: which columns are read, what labels become, and what is said of broken rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune.errors import ArtifactError, GraphPruneError
from graphprune.models.data.tables import Schema, Table, read_table


def _written(folder: Path, text: str) -> Path:
    file = folder / "table.tsv"
    file.write_bytes(text.encode())
    return file


def _labeled(*labels: str) -> Table:
    return Table(Path("x.tsv"), ("text",), "label", (("a",),) * len(labels), labels)


@pytest.mark.parametrize(
    ("header", "task", "text", "label"),
    [
        ("sentence\tlabel", "classification", ("sentence",), "label"),
        ("coarse\tfine\tquestion", "classification", ("question",), "coarse"),
        ("genre\tscore\tsentence1\tsentence2", "regression", ("sentence1", "sentence2"), "score"),
        ("text\tlabel\tscore", "regression", ("text",), "score"),
        ("text\tlabel\tscore", "classification", ("text",), "label"),
        ("question\tsentence\tlabel", "classification", ("question", "sentence"), "label"),
    ],
)
def test_usual_columns_are_recognized(
    tmp_path: Path, header: str, task: str, text: tuple[str, ...], label: str
) -> None:
    names = header.split("\t")
    table = read_table(_written(tmp_path, f"{header}\n" + "\t".join(f"<{n}>" for n in names)), task)
    assert (table.text, table.label) == (text, label)
    assert table.texts == (tuple(f"<{n}>" for n in text),)
    assert table.labels == (f"<{label}>",)


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    file = _written(tmp_path, "coarse\tfine\tquestion\tsentence\nA\tb\tWho?\tHe.\n")
    table = read_table(file, text=("question",), label="fine")
    assert (table.texts, table.labels) == ((("Who?",),), ("b",))


def test_rows_end_with_lines_only_and_quotes_are_text(tmp_path: Path) -> None:
    file = _written(tmp_path, '\ufeffsentence\tlabel\r\nhe said "no\x85\u2028so\t1\r\nb\t0\r\n')
    table = read_table(file)
    assert table.texts == (('he said "no\x85\u2028so',), ("b",))
    assert table.labels == ("1", "0")


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n", "\n \n\t\n"])
def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path, end: str) -> None:
    table = read_table(_written(tmp_path, f"sentence\tlabel\na\t1\nb\t0{end}"))
    assert (table.texts, table.labels) == ((("a",), ("b",)), ("1", "0"))


def test_a_carriage_return_within_a_cell_is_text(tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        lines = ("sentence\tlabel", "one\rtwo\t1", "b\t0", "")
        table = read_table(_written(tmp_path, end.join(lines)))
        assert (table.texts, table.labels) == ((("one\rtwo",), ("b",)), ("1", "0"))


def test_classes_are_sorted_and_integers_by_their_number() -> None:
    assert _labeled("10", "9", "-1", "9").classes() == ("-1", "9", "10")
    assert _labeled("no", "yes", "maybe", "no").classes() == ("maybe", "no", "yes")
    assert _labeled("10", "9", "x").classes() == ("10", "9", "x")
    with pytest.raises(GraphPruneError, match=r"every row of .* has the label 'a'"):
        _labeled("a", "a").classes()


def test_integers_are_classes_by_their_value() -> None:
    assert _labeled("01", "1", "10", "-0", "002").classes() == ("0", "1", "2", "10")
    # Beside words they are names as well.
    assert _labeled("01", "1", "x").classes() == ("01", "1", "x")
    assert _labeled("01", "1", "00").numbers(("0", "1")) == [1, 1, 0]
    assert _labeled("1", "02").numbers(("01", "02")) == [0, 1]
    assert _labeled("01", "00").numbers(("no", "yes")) == [1, 0]
    assert _labeled("1", "01", "x").numbers(("01", "1", "x")) == [1, 0, 2]
    with pytest.raises(GraphPruneError, match="every row"):
        _labeled("01", "1").classes()


def test_labels_are_names_of_classes_or_else_their_numbers() -> None:
    assert _labeled("no", "yes").numbers(("yes", "no")) == [1, 0]
    assert _labeled("1", "0", "1").numbers(("yes", "no")) == [1, 0, 1]
    # Classes that are numbers are meant by name.
    assert _labeled("9", "7").numbers(("7", "9")) == [1, 0]


@pytest.mark.parametrize("labels", [("0", "2"), ("no", "1"), ("no", "what")])
def test_an_unknown_label_is_named_with_its_line(labels: tuple[str, ...]) -> None:
    with pytest.raises(GraphPruneError, match=f"'x.tsv', line 3: the label '{labels[1]}'"):
        _labeled(*labels).numbers(("0", "1") if labels[0] == "0" else ("no", "yes"))


@pytest.mark.parametrize("label", ["many", "nan", "inf"])
def test_a_score_is_a_finite_number(label: str) -> None:
    assert _labeled("1", "-2.5").scores() == [1.0, -2.5]
    with pytest.raises(
        GraphPruneError, match=f"'x.tsv', line 3: the label '{label}' is not a number"
    ):
        _labeled("1", label).scores()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("sentence\tlabel\n", "no row below"),
        ("words\tlabel\na\t1\n", "--text-column"),
        ("sentence\tkind\na\t1\n", "--label-column"),
        ("sentence\tlabel\na\t1\nb\n", "line 3: 'b' has 1 cells"),
        ("sentence\tlabel\na\t1\n\nb\t1\n", "line 3 is blank"),
        ("sentence\tlabel\na\t1\n\n\t \nb\t1\n\n", "line 3 is blank"),
        ("\n\n", "is empty"),
        ("sentence\tlabel\na\tb\t1\n", "line 2: .* has 3 cells, the header line has 2"),
        ("sentence\tlabel\na\t1\nb\t \n", "line 3: the column 'label' is empty"),
        ("sentence\tlabel\n\t1\n", "line 2: the column 'sentence' is empty"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(GraphPruneError, match=says) as caught:
        read_table(_written(tmp_path, text))
    assert "table.tsv" in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin.tsv").write_bytes("sentence\tlabel\nété\t1\n".encode("latin-1"))
    with pytest.raises(GraphPruneError, match="no UTF-8"):
        read_table(tmp_path / "latin.tsv")
    with pytest.raises(GraphPruneError, match="there is no file"):
        read_table(tmp_path / "nowhere.tsv")
    with pytest.raises(GraphPruneError, match=r"lacks the columns \['fine'\].*--label-column"):
        read_table(_written(tmp_path, "sentence\tlabel\na\t1\n"), label="fine")


def test_a_schema_is_read_back_as_written(tmp_path: Path) -> None:
    schema = Schema("classification", ("a", "b"), "c", ("ja", "nö"))
    file = tmp_path / "task.json"
    file.write_bytes(schema.to_bytes())
    assert Schema.from_file(file) == schema
    for broken in ("", "[]", '{"task": "regression"}'):
        file.write_text(broken)
        with pytest.raises(ArtifactError, match=r"task\.json"):
            Schema.from_file(file)
