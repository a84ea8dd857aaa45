"""HTML of a few tables, for what notebooks show of an object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def block(title: str, *parts: str) -> str:
    """A titled block of HTML parts; the title is escaped, empty parts are left out."""
    return "".join([f"<div><b>{escape(title)}</b>", *parts, "</div>"])


def paragraph(text: str) -> str:
    """A paragraph; nothing for an empty text."""
    return f"<p>{escape(text)}</p>" if text else ""


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is to the left, numbers and the rest to the right."""
    body = "".join(_row("td", row) for row in rows)
    return f"<table><thead>{_row('th', header)}</thead><tbody>{body}</tbody></table>"


def folded(title: str, lines: Sequence[str]) -> str:
    """Lines under a title that opens when it is clicked; nothing where there are none."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{escape(title)} ({len(lines)})</summary><ul>{items}</ul></details>"


def _row(tag: str, cells: Sequence[object]) -> str:
    first, *rest = cells
    left = f'<{tag} style="text-align:left">{escape(str(first))}</{tag}>'
    return f"<tr>{left}{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in rest)}</tr>"
