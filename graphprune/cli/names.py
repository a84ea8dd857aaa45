"""Names that options take, for completion and early errors: known without importing torch.

`tests/cli/test_names.py` holds these lists to what they name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from graphprune.ir.quantization import SCHEMES
from graphprune.pipeline.recipe_names import builtin_recipes
from graphprune.storage.layout import LAYOUTS

Complete = Callable[[str], list[tuple[str, str]]]

# Task -> what it is for.
TASKS = {
    "neighbors": "sentence encoders: neighbors that dense and pruned model agree on",
    "sts": "sentence encoders: the STS Benchmark",
    "digits": "classifiers of 8x8 images",
    "perplexity": "language models: a text",
    "piqa": "language models: PIQA",
    "lambada": "language models: LAMBADA",
    "classification": "a labeled file",
    "regression": "a labeled file with scores",
}
COMPARING = ("neighbors",)  # tasks that compare with the dense model
TRAINABLE = ("classification", "regression", "digits")  # tasks whose data can train
BRINGS_DATA = ("digits",)  # tasks that need no file to train from
SCORES = ("magnitude", "random", "fluctuation", "activation", "obs", "taylor")
ALLOCATIONS = ("uniform", "global")
LAYOUT_NAMES = ("auto", *LAYOUTS)
WEIGHTS = ("auto", "beside", "inside")
KERNELS = "onnxruntime+kernels"
TARGETS = ("onnxruntime", "genai", KERNELS)

_PASS_NAME = re.compile(r'^    name: ClassVar\[str\] = "([a-z0-9-]+)"', re.MULTILINE)


def pass_names() -> list[str]:
    """The built-in passes, read from their source: importing them imports torch."""
    spec = importlib.util.find_spec("graphprune.passes")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = (file for folder in folders for file in Path(folder).rglob("*.py"))
    return sorted(name for file in files for name in _PASS_NAME.findall(file.read_text("utf-8")))


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Built-in models; the shell itself completes folders."""
    from graphprune.models.loading.names import BUILT_IN

    return _starting(((m.name, m.kind) for m in BUILT_IN.values()), incomplete)


def complete_pass(incomplete: str) -> list[tuple[str, str]]:
    """Passes."""
    return _starting(((name, "") for name in pass_names()), incomplete)


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Built-in recipes."""
    return _starting(builtin_recipes().items(), incomplete)


def complete_scheme(incomplete: str) -> list[tuple[str, str]]:
    """Quantization schemes."""
    return _starting(SCHEMES.items(), incomplete)


def complete_task(incomplete: str) -> list[tuple[str, str]]:
    """Tasks."""
    return _starting(TASKS.items(), incomplete)


def completing(names: Iterable[str]) -> Complete:
    """A completion of plain names."""
    known = tuple(names)

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return _starting(((name, "") for name in known), incomplete)

    return complete


def _starting(pairs: Iterable[tuple[str, str]], incomplete: str) -> list[tuple[str, str]]:
    return [(name, text) for name, text in pairs if name.startswith(incomplete)]
