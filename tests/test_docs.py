"""README and docs: every Python snippet runs, every recipe loads, every command line is one."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import graphprune as gp
from graphprune.cli.app import app
from graphprune.models.zoo.tiny import tiny
from graphprune.pipeline.recipe import loads

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_SITE = "https://github.com/graphprune/graphprune/blob/main/"
# Run by tests/consumers, where what they need is installed.
_ELSEWHERE = {"fastembed", "onnxruntime", "transformers"}


def blocks(language: str) -> Iterator[Any]:
    """All fenced blocks of a language, as test parameters named by page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[2] == language:
                line = text[: match.start()].count("\n") + 2
                yield pytest.param(match[3], id=f"{page.name}:{line}")


def imported(code: str) -> set[str]:
    """Names of packages that code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What snippets take for granted, on tiny models."""
    pytest.importorskip("transformers")
    model, batch = tiny("tiny-bert")
    llm, ids = tiny("tiny-llama")
    labeled = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}] * 2
    return {
        "gp": gp,
        "model": model,
        "batch": batch,
        "batches": [batch] * 4,
        "llm": llm,
        "ids": ids,
        "token_batches": [ids] * 2,
        "loader": labeled,
        "dev_batches": labeled,
    }


@pytest.mark.slow
@pytest.mark.parametrize("code", [*blocks("python")])
def test_snippet_runs(
    code: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = imported(code)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    if needed & _ELSEWHERE:
        pytest.skip("run by tests/consumers")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), dict(names))


@pytest.mark.parametrize("text", [*blocks("yaml")])
def test_recipe_loads(text: str) -> None:
    assert loads(text)


def commands() -> Iterator[Any]:
    """Every line of a shell block that calls graphprune."""
    for block in blocks("sh"):
        (text,) = block.values
        for line in text.splitlines():
            if line.startswith("graphprune "):
                yield pytest.param(line, id=f"{block.id} {line[:40]}")


@pytest.mark.parametrize("line", [*commands()])
def test_command_is_one(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    # Parses options and their values; runs nothing.
    command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in _LINK.findall(text):
        assert (page.parent / link).exists(), link
    for link in re.findall(re.escape(_SITE) + r"([^)#\s]+)", text):
        assert (ROOT / link).exists(), link


def test_readme_links_are_absolute() -> None:
    # PyPI shows it, where relative links lead nowhere.
    assert not _LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
