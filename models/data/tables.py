"""Labeled files: texts and labels in TAB-separated columns, and what a head makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from graphprune.errors import ArtifactError, GraphPruneError

# Columns that are recognized, by preference; pairs come before single texts.
PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
TEXTS = ("sentence", "text", "question")
LABELS: Mapping[str, tuple[str, ...]] = {
    "classification": ("label", "class", "coarse"),
    "regression": ("score", "label"),
}


@final
@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a labeled file.

    Attributes:
        file: where they were read.
        text: names of the one or two columns of text.
        label: name of the column of labels.
        texts: one or two texts a row.
        labels: as written, one a row.
    """

    file: Path
    text: tuple[str, ...]
    label: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]

    def line(self, row: int) -> str:
        """A row by file and line, for errors; the header is line 1."""
        return f"{str(self.file)!r}, line {row + 2}"

    def classes(self) -> tuple[str, ...]:
        """The distinct labels, sorted; where all of them are integers by value: 01 and 1 are one.

        Raises:
            GraphPruneError: there is only one.
        """
        whole = all(map(_is_whole, self.labels))
        found = sorted(set(map(_by_value, self.labels) if whole else self.labels))
        if len(found) < 2:
            raise GraphPruneError(
                f"every row of {str(self.file)!r} has the label {found[0]!r} in column "
                f"{self.label!r}; a classifier is trained on two classes at least"
            )
        return tuple(sorted(found, key=int) if whole else found)

    def numbers(self, classes: Sequence[str]) -> list[int]:
        """The labels as positions in `classes`, written as their names or, of words, as numbers.

        Raises:
            GraphPruneError: one is not among them; its line is named.
        """
        known = {name: i for i, name in enumerate(classes)}
        labels = self.labels
        if all(map(_is_whole, labels)) and not any(map(_is_whole, classes)):
            known = {str(i): i for i in range(len(classes))}
            labels = tuple(map(_by_value, labels))
        elif all(map(_is_whole, classes)):
            known = {_by_value(name): i for name, i in known.items()}
            labels = tuple(map(_by_value, labels))
        for row, label in enumerate(labels):
            if label not in known:
                raise GraphPruneError(
                    f"{self.line(row)}: the label {self.labels[row]!r} is none of the model's "
                    f"{len(classes)} classes, {_listed(classes)}; correct it, or give the right "
                    "column with --label-column"
                )
        return [known[label] for label in labels]

    def scores(self) -> list[float]:
        """The labels as numbers.

        Raises:
            GraphPruneError: one is not a number, NaN or infinite; its line is named.
        """
        found = []
        for row, label in enumerate(self.labels):
            try:
                found.append(float(label))
            except ValueError:
                found.append(float("nan"))
            if not abs(found[-1]) < float("inf"):
                raise GraphPruneError(
                    f"{self.line(row)}: the {self.label} {label!r} is not a number; correct it, or "
                    "give the right column with --label-column"
                )
        return found


@final
@dataclass(frozen=True, slots=True)
class Schema:
    """The task of a head and its columns; an artifact carries it as task.json.

    Attributes:
        task: "classification" or "regression".
        text: names of the one or two columns of text; none for whatever is recognized.
        label: name of the column of labels; empty for whatever is recognized.
        classes: names of the classes in the order of the head's scores; none for a regression.
    """

    task: str
    text: tuple[str, ...] = ()
    label: str = ""
    classes: tuple[str, ...] = ()

    def read(self, file: Path) -> Table:
        """A file's rows by these columns, as `read_table` reads them."""
        return read_table(file, self.task, self.text, self.label)

    def targets(self, table: Table) -> list[int] | list[float]:
        """A table's labels as the head's: class numbers, or scores."""
        return table.scores() if self.task == "regression" else table.numbers(self.classes)

    def to_bytes(self) -> bytes:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def from_file(file: Path) -> Schema:
        """Read what `to_bytes` wrote.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            task, label = data["task"], data["label"]
            text, classes = tuple(data["text"]), tuple(data["classes"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ArtifactError(
                f"{str(file)!r} does not say which columns the model was trained on; compile the "
                "model again"
            ) from e
        return Schema(task, text, label, classes)


def read_table(
    file: Path, task: str = "classification", text: Sequence[str] = (), label: str = ""
) -> Table:
    """Texts and labels from a TAB-separated file with a header line, without any quoting.

    1. text: the columns named; else the first of sentence1 + sentence2, question1 + question2,
       premise + hypothesis, question + sentence, sentence, text, question that the file has.
    2. label: the column named; else label, class or coarse, for a regression score or label.
    3. Blank lines at the end are dropped; in between they are refused.

    Args:
        file: in UTF-8; the first line names the columns.
        task: "classification" or "regression"; it only says which name of a label is preferred.
        text: one column, or two for pairs.
        label: the column of labels.

    Raises:
        GraphPruneError: a column is missing, there is no row, or a row is broken; its line is
            named.
    """
    header, rows = _cells(file)
    wanted = [*text, *([label] if label else [])]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise GraphPruneError(
            f"{str(file)!r} lacks the columns {missing}; its header line has {header}; name others "
            "with --text-column and --label-column"
        )
    columns = tuple(text) or _recognized(file, header, [*PAIRS, *((t,) for t in TEXTS)], "text")
    (named,) = (label,) if label else _recognized(file, header, [(n,) for n in LABELS[task]])
    if not rows:
        raise GraphPruneError(f"{str(file)!r} has a header line and no row below it")
    places = [header.index(name) for name in (*columns, named)]
    found = []
    for number, cells in enumerate(rows, 2):
        if not "".join(cells).strip():
            raise GraphPruneError(
                f"{str(file)!r}, line {number} is blank, and there are rows below it: remove it"
            )
        if len(cells) != len(header):
            raise GraphPruneError(
                f"{str(file)!r}, line {number}: {_short(cells)!r} has {len(cells)} cells, the "
                f"header line has {len(header)}; separate the columns by one TAB each"
            )
        chosen = [cells[i].strip() for i in places]
        if not all(chosen):
            empty = header[places[chosen.index("")]]
            raise GraphPruneError(
                f"{str(file)!r}, line {number}: the column {empty!r} is empty; fill it, or remove "
                "the line"
            )
        found.append(chosen)
    texts = tuple(tuple(row[:-1]) for row in found)
    return Table(file, columns, named, texts, tuple(row[-1] for row in found))


def _cells(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header's names, and the cells of every row below it."""
    try:
        # Neither splitlines nor universal newlines: a sentence may hold what they end a line at.
        with file.open(encoding="utf-8-sig", newline="\n") as opened:
            lines = [line.removesuffix("\n").removesuffix("\r") for line in opened]
    except OSError as e:
        raise GraphPruneError(f"there is no file {str(file)!r}") from e
    except UnicodeDecodeError as e:
        raise GraphPruneError(f"{str(file)!r} is no UTF-8 text file with a header line") from e
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not lines[0].strip():
        raise GraphPruneError(
            f"{str(file)!r} is empty: it needs a header line that names the columns, and rows"
        )
    header, *rows = (line.split("\t") for line in lines)
    return [name.strip() for name in header], rows


def _recognized(
    file: Path, header: Sequence[str], known: Sequence[tuple[str, ...]], what: str = "label"
) -> tuple[str, ...]:
    for names in known:
        if set(names) <= set(header):
            return names
    listed = ", ".join(" + ".join(names) for names in known)
    raise GraphPruneError(
        f"{str(file)!r} has the columns {list(header)}, none of them called {listed}; name one "
        f"with --{what}-column"
    )


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _by_value(label: str) -> str:
    """An integer as it is usually written; anything else as it is."""
    return str(int(label)) if _is_whole(label) else label


def _listed(names: Sequence[str], at_most: int = 8) -> str:
    more = ", ..." if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _short(cells: Sequence[str]) -> str:
    return "\t".join(cells)[:60]
