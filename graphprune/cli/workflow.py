"""The passes, described."""

from __future__ import annotations

import dataclasses
import inspect
import re

from graphprune.pipeline.events import JSON


def describe_passes() -> list[dict[str, JSON]]:
    """Every pass: name, first line of its docstring, options with type, default, meaning."""
    from graphprune.pipeline.registry import options, registered

    described: list[dict[str, JSON]] = []
    for name, cls in registered().items():
        doc = inspect.getdoc(cls) or ""
        meanings = _attributes(doc)
        rows = [
            {
                "option": field.name,
                "type": str(field.type).replace("graphprune.pipeline.base.", ""),
                "default": "required"
                if field.default is dataclasses.MISSING
                else _yaml(field.default),
                "meaning": meanings.get(field.name, ""),
            }
            for field in options(cls)
        ]
        described.append({"name": name, "summary": doc.partition("\n")[0], "options": rows})
    return described


def _attributes(doc: str) -> dict[str, str]:
    """The entries of a Google docstring's section "Attributes"."""
    section = doc.partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
