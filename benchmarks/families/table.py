"""Rows as a table, in a terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import Row

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
_HEAD = (
    "| family | parameters | FLOPs | cut | stays, and why | ONNX Runtime |\n"
    "|---|---|---|---|---|---|"
)


def shown(row: Row) -> Row:
    """A row in words."""
    return {
        "family": row["family"],
        "parameters": _parameters(row),
        "FLOPs": f"{row['FLOPs']:.0%}" if "FLOPs" in row else "",
        "cut": ", ".join(row.get("cut", ())),
        "stays": "; ".join(_stays(row)),
        "ORT": _agreement(row),
    }


def write(page: Path, rows: Sequence[Row]) -> None:
    """Put the tables of all sections into a page, between its markers."""
    old = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    lines = "\n".join(_lines(rows))
    made = re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n{lines}\n{END}",
        old,
        flags=re.DOTALL,
    )
    page.write_text(made, encoding="utf-8")


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    ran = sum("ORT" in row for row in rows)
    missing = sum("missing" in row for row in rows)
    yield f"{ran} of {len(rows) - missing} families run after the cut."
    for domain in dict.fromkeys(row["domain"] for row in rows):
        yield f"\n## {domain}\n\n{_HEAD}"
        for row in rows:
            if row["domain"] == domain and "missing" not in row:
                yield "| " + " | ".join(_escaped(v) for v in shown(row).values()) + " |"
    yield ""


def _escaped(cell: str) -> str:
    # Placeholders of a model's own names, such as <lambda>, are no HTML.
    return cell.replace("|", "\\|").replace("<", "&lt;")


def _agreement(row: Row) -> str:
    if "ORT" not in row:
        return ""
    fixed = len(set(row["shapes"])) == 1
    return f"{row['ORT']:.0e}" + (" at one shape" if fixed else "")


def _parameters(row: Row) -> str:
    if "parameters" not in row:
        return ""
    after = row.get("parameters after")
    return f"{row['parameters']:,}" + (f" → {after:,}" if after is not None else "")


def _stays(row: Row) -> Iterator[str]:
    """Failures first, then what is refused, frozen by operators, and held by norms and outputs."""
    if "failed" in row:
        # Of the many names of groups, none says more than the node that differs.
        text = re.sub(r"removing units of .* does not", "removing units does not", row["failed"])
        yield f"**{_short(text, 300)}**"
    if "missing" in row:
        yield row["missing"]
    for f in row.get("frozen", ()):
        yield _short(f["text"].replace("of parameters", "of weights"))
    if row.get("normalized"):
        yield f"norm statistics: {', '.join(row['normalized'])}"
    yield from _merged(row.get("stays", ()))
    yield from (f"refused: {_short(sentence)}" for sentence in row.get("refused", ()))


def _merged(stays: Sequence[str]) -> list[str]:
    """Without the place, which differs from layer to layer; each once."""
    return list(dict.fromkeys(_short(re.sub(r" at [\w.]+$", "", text)) for text in stays))


def _short(text: str, most: int = 130) -> str:
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"
