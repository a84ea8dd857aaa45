"""README and docs: every Python snippet runs, every recipe loads, every command line is one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import graphprune as gp
from graphprune.cli.app import app
from graphprune.ir.cost import flops
from graphprune.models.zoo.tiny import tiny
from graphprune.pipeline.device import Cost
from graphprune.pipeline.recipe import loads

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_SITE = "https://github.com/graphprune/graphprune/blob/main/"
_FOREIGN = re.compile(r"^(from|import) (fastembed|onnxruntime|transformers)", re.MULTILINE)


def blocks(language: str) -> Iterator[Any]:
    """All fenced blocks of a language, as test parameters named by page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[2] == language:
                line = text[: match.start()].count("\n") + 2
                yield pytest.param(match[3], id=f"{page.name}:{line}")


def _snippets(page: Path) -> list[str]:
    """Python blocks of a page that need nothing but this project; tests/consumers runs the rest."""
    found = [m[3] for m in _FENCE.finditer(page.read_text(encoding="utf-8")) if m[2] == "python"]
    return [code for code in found if not _FOREIGN.search(code)]


class Flops:
    """A device whose milliseconds are FLOPs: the models here are too small to be timed."""

    name, threads, can_measure = "flops", 1, True

    def measure(self, models: Mapping[str, gp.Program], **options: Any) -> dict[str, Cost]:
        found = {name: flops(p, p.deployed) / 1e6 for name, p in models.items()}
        return {name: Cost(ms, models[name].nbytes(), ms, ms) for name, ms in found.items()}


def tokenizer(folder: Path) -> Any:
    """A tokenizer of some words, also as files in a folder."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "man": 3, "eats": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return made


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What snippets take for granted, on tiny models."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graphprune.api._device", lambda file, threads, progress: Flops())
    model, batch = tiny("tiny-encoder")
    llm, ids = tiny("tiny-llama")
    labels = torch.arange(len(batch["input_ids"])) % 2
    Path("train.tsv").write_text("sentence\tlabel\na man eats a man\t1\na man\t0\n")
    Path("dev.tsv").write_text("sentence1\tsentence2\tscore\na man\ta man\t5\na\teats\t0\n")
    return {
        "gp": gp,
        "model": model,
        "batch": batch,
        "batches": [batch] * 4,
        "tok": tokenizer(tmp_path),
        "tokenizer_dir": tmp_path,
        "dev": tmp_path / "dev.tsv",
        "llm": llm,
        "ids": ids,
        "token_batches": [ids] * 2,
        "loader": [{**batch, "labels": labels}] * 2,
        "dev_batches": [{**batch, "labels": labels}],
    }


SNIPPETS = [page for page in PAGES if page.stem != "CONTRIBUTING" and _snippets(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(page: Path, names: dict[str, Any]) -> None:
    # One after another, as a reader would: a page's later snippets go on from its earlier ones.
    if any("kernels" in code for code in _snippets(page)):
        pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    for code in _snippets(page):
        exec(compile(code, page.name, "exec"), names)


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
