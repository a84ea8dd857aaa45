"""Imports go one way, and importing graphprune is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UPPER = ("graphprune.exporters", "graphprune.models", "graphprune.passes")
# May not be imported by the folder, at any depth.
FORBIDDEN = {
    "graphprune": UPPER,
    "passes": ("graphprune.exporters", "graphprune.models", "graphprune.api", "graphprune.cli"),
    "exporters": ("graphprune.passes", "graphprune.models", "graphprune.api", "graphprune.cli"),
    "models": ("graphprune.passes", "graphprune.exporters", "graphprune.api", "graphprune.cli"),
}
# Those that reach up, inside functions, for the user's convenience.
REACH_UP = (
    "graphprune/api.py",
    "graphprune/cli/",
    "exporters/artifact/artifact.py",  # Artifact.evaluate
)
# Every room imports those before it alone.
ROOMS = (
    "errors", "suggest", "validate", "notebook", "ir", "axes", "rewrite", "verify", "calibration",
    "storage", "capture", "pipeline", "training", "report",
)  # fmt: skip
# Later rooms that a file names inside a function or for types, and why.
LATER = {
    "graphprune/ir/module.py": ("storage",),  # a pickled module is a saved program
    "graphprune/pipeline/base.py": ("training",),  # the type of what the user gave to train with
}
HEAVY = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "transformers", "sklearn")
ARCHITECTURES = re.compile(
    r"\b(albert|bart|bert|bloom|convnext|deberta|deit|distilbert|electra|falcon|gemma\d?|"
    r"gpt_?2|gptj|gpt_neox?|llama\d?|mistral|mixtral|mpt|opt|phi\d?|qwen\d?|resnet|roberta|swin|"
    r"t5|whisper|xlnet|num_attention_heads|num_key_value_heads|intermediate_size|hidden_size)\b",
    re.IGNORECASE,
)


def _files(folder: str) -> list[Path]:
    # rglob does not follow the links inside graphprune/.
    return sorted(p for p in (ROOT / folder).rglob("*.py") if not _through_link(p))


def _through_link(path: Path) -> bool:
    return any(part.is_symlink() for part in path.parents)


def _imports(tree: ast.AST, deferred: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every imported name with its line, and whether it is not imported with the module.

    That is so inside functions, and under `if TYPE_CHECKING:`.
    """
    for node in ast.iter_child_nodes(tree):
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inside = True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, inside
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module, node.lineno, inside
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno, inside
        else:
            yield from _imports(node, inside)


def _is_under(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_go_one_way(folder: str) -> None:
    wrong = []
    for path in _files(folder):
        where = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, line, inside in _imports(tree):
            if where.startswith(REACH_UP) and inside:
                continue
            if _is_under(name, FORBIDDEN[folder]):
                wrong.append(f"{where}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_those_before_them(room: str) -> None:
    later = tuple(f"graphprune.{name}" for name in ROOMS[ROOMS.index(room) + 1 :])
    folder = ROOT / "graphprune" / room
    wrong = []
    for path in sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]:
        where = path.relative_to(ROOT).as_posix()
        allowed = tuple(f"graphprune.{name}" for name in LATER.get(where, ()))
        for name, line, inside in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            if _is_under(name, later) and not (inside and _is_under(name, allowed)):
                wrong.append(f"{where}:{line} imports {name}")
    assert wrong == []


def test_every_room_has_its_place() -> None:
    folder = ROOT / "graphprune"
    rooms = {p.name for p in folder.iterdir() if (p / "__init__.py").is_file()}
    assert rooms - {"cli", "passes", "exporters", "models"} == set(ROOMS) - {
        "errors",
        "suggest",
        "validate",
        "notebook",
    }


@pytest.mark.parametrize("folder", ["graphprune", "passes", "exporters"])
def test_heavy_packages_are_imported_inside_functions(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _files(folder)
        for name, line, inside in _imports(ast.parse(path.read_text(encoding="utf-8")))
        if not inside and _is_under(name, HEAVY)
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["graphprune", "passes", "exporters"])
def test_no_architecture_is_named(folder: str) -> None:
    """No pass, rule or exporter knows a model: what it does follows from operators alone."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number} names {found.group()!r}"
        for path in _files(folder)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := ARCHITECTURES.search(line)) and not line.endswith("# a name of ONNX")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["graphprune", "graphprune.passes", "graphprune.pipeline.pipeline"]
)
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("graphprune", "passes", "exporters", "models")
        for path in _files(folder)
        if path.name != "__main__.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []
