"""Move modules to their rooms: `git mv`, and every import, dotted name and path that follows.

    python tests/golden/moves.py            what would move
    python tests/golden/moves.py --apply    move it; a second call finds nothing to do

A module's new name may begin with its old one (capture -> capture.capture), so names are rewritten
once, in the call that moves the files. An interrupted call is undone by `git reset --hard`.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

CORE = {
    "program": "ir/program",
    "graph": "ir/graph",
    "propagate": "ir/propagate",
    "ops": "ir/operators",
    "cost": "ir/cost",
    "sizes": "ir/sizes",
    "quantized": "ir/quantization",
    "capture": "capture/capture",
    "functional": "capture/functionalize",
    "agreement": "capture/agreement",
    "dynamic": "capture/dynamic",
    "fixed": "capture/fixed",
    "guards": "capture/guards",
    "quiet": "capture/quiet",
    "decode": "capture/decoder",
    "fold": "capture/fold",
    "memory": "capture/memory",
    "spelling": "capture/spelling",
    "ruleless": "axes/ruleless",
    "dependence": "axes/dependence",
    "sites": "axes/sites",
    "axes/rules/_base": "axes/rules/registry",
    "rewrite": "rewrite/shrink",
    "verify": "verify/equivalence",
    "compare": "verify/error",
    "stream": "calibration/stream",
    "statistics": "calibration/gram",
    "passbase": "pipeline/base",
    "pipeline": "pipeline/pipeline",
    "registry": "pipeline/registry",
    "recipe": "pipeline/recipe",
    "events": "pipeline/events",
    "training": "training/spec",
    "fit": "training/fit",
    "objective": "training/objective",
    "losses": "training/losses",
    "optimizer": "training/optimizer",
    "workers": "training/distributed",
    "checkpoint": "training/checkpoint",
    "serialize": "storage/program",
    "codec": "storage/arguments",
    "treespec": "storage/treespec",
    "targets": "storage/allowlist",
    "files": "storage/folders",
    "report": "report/report",
    "html": "report/page",
}
PASSES = {
    "names": "name_patterns",
    "recover": "control/recover",
    "repeat": "control/repeat",
    "structural/remove": "structural/removal",
    "structural/select": "structural/selection",
    "structural/allocate": "structural/allocation",
    "structural/score": "structural/scores",
    "structural/calibrated": "structural/statistics",
    "weights/alternate": "solvers/alternation",
    "weights/solve": "solvers/sparsegpt",
    "structural/obs": "solvers/obs",
    "weights/magnitude": "sparsity/magnitude",
    "weights/wanda": "sparsity/wanda",
    "weights/sparsegpt": "sparsity/sparsegpt",
    "weights/sparsellm": "sparsity/sparsellm",
    "weights/prune": "sparsity/zeroing",
    "weights/pattern": "sparsity/sparsity_pattern",
    "weights/allocate": "sparsity/allocation",
    "weights/feedforward": "sparsity/feedforward",
    "training/least_squares": "sparsity/least_squares",
    "training/gradual": "training/gradual_magnitude",
    "training/structure": "training/gradual_structure",
    "training/regularize": "training/penalties",
    "training/sparse": "training/zeros",
}
EXPORTERS = {
    **{
        n: f"onnx/{n}"
        for n in (
            "convert",
            "cleanup",
            "names",
            "translations",
            "operators",
            "attention",
            "masks",
            "patterns",
            "plain_attention",
        )
    },
    "ort": "runtime/session",
    "parity": "runtime/parity",
    "drift": "runtime/drift",
    "past": "runtime/kv_cache",
    "generate": "runtime/generate",
    "quantize": "quantize/quantize",
    "layers": "quantize/layers",
    "artifact": "artifact/artifact",
    "write": "artifact/export",
    "results": "artifact/results",
}
MODELS = {
    **{n: f"loading/{n}" for n in ("loading", "loaded", "inputs", "cache", "packaged")},
    **{n: f"zoo/{n}" for n in ("tiny", "vit", "digits", "sentence", "heads")},
    **{
        n: f"data/{n}" for n in ("tables", "batches", "calibration", "tokenize", "text", "wikitext")
    },
}
TESTS = {
    "core/test_fold": "capture/test_fold",
    "core/test_api": "test_api",
    "core/test_calibrated_compile": "passes/structural/test_compile",
    "core/test_capture": "capture/test_capture",
    "core/test_cli": "cli/test_cli",
    "core/test_cli_training": "cli/test_training",
    "core/test_cost": "ir/test_cost",
    "core/test_decode": "capture/test_decoder",
    "core/test_dependence": "axes/test_dependence",
    "core/test_events": "pipeline/test_events",
    "core/test_files": "storage/test_folders",
    "core/test_front": "benchmarks/test_front",
    "core/test_html": "report/test_page",
    "core/test_pipeline": "pipeline/test_pipeline",
    "core/test_propagate": "ir/test_propagate",
    "core/test_recipe": "pipeline/test_recipe",
    "core/test_registry": "pipeline/test_registry",
    "core/test_rewrite": "rewrite/test_shrink",
    "core/test_sensitivity": "test_sensitivity",
    "core/test_serialize": "storage/test_program",
    "core/test_sizes": "ir/test_sizes",
    "core/test_stream": "calibration/test_stream",
    "core/test_training": "training/test_fit",
    "core/test_training_processes": "training/test_distributed",
    "core/test_verify": "verify/test_equivalence",
    "exporters/test_artifact": "exporters/artifact/test_artifact",
    "exporters/test_attention": "exporters/onnx/test_attention",
    "exporters/test_convert": "exporters/onnx/test_convert",
    "exporters/test_generate": "exporters/runtime/test_generate",
    "exporters/test_parity": "exporters/runtime/test_parity",
    "exporters/test_quantize": "exporters/quantize/test_quantize",
}

TESTS |= {
    **{
        f"passes/weights/test_{a}": f"passes/{b}"
        for a, b in {
            "allocate": "sparsity/test_allocation",
            "pattern": "sparsity/test_sparsity_pattern",
            "prune": "sparsity/test_zeroing",
            "scores": "sparsity/test_scores",
            "solve": "solvers/test_sparsegpt",
            "sparsellm": "sparsity/test_sparsellm",
        }.items()
    },
    **{
        f"passes/structural/test_{a}": f"passes/{b}"
        for a, b in {
            "allocate": "structural/test_allocation",
            "calibrated": "structural/test_statistics",
            "obs": "solvers/test_obs",
            "score": "structural/test_scores",
            "select": "structural/test_selection",
        }.items()
    },
    "passes/test_recover": "passes/control/test_recover",
    "passes/training/test_gradual": "passes/training/test_gradual_magnitude",
    "passes/training/test_structure": "passes/training/test_gradual_structure",
    "passes/training/test_least_squares": "passes/sparsity/test_least_squares",
    **{
        f"models/test_{name}": f"models/{room}/test_{name}"
        for room, names in {
            "loading": ("cache", "loading", "minilm"),
            "zoo": ("heads",),
            "data": ("batches", "calibration", "tables", "wikitext"),
            "tasks": ("labeled", "language_tasks", "tasks"),
        }.items()
        for name in names
    },
}

# Packages with their first line; those that exist keep theirs.
PACKAGES = {
    "graphprune/ir": "The program: graphs over named tensors, what their nodes compute and cost.",
    "graphprune/capture": "From a module to a program, by torch.export.",
    "graphprune/rewrite": "Removing units from a program, and masking them instead.",
    "graphprune/verify": "Whether a rewrite did what it says.",
    "graphprune/calibration": "Activations on calibration batches, streamed layer by layer.",
    "graphprune/pipeline": "Passes, recipes, and running them one after the other.",
    "graphprune/training": "Training a program: data, loop, losses, checkpoints.",
    "graphprune/storage": "Programs and artifacts as folders of JSON and safetensors.",
    "graphprune/report": "What was done, as text, Markdown and a page.",
    "passes/control": "Passes that run passes.",
    "passes/solvers": "Numerical methods that passes share: no graphs, only matrices.",
    "exporters/onnx": "From a program to an ONNX model.",
    "exporters/runtime": "Running ONNX models: sessions, timing, agreement, generation.",
    "exporters/quantize": "Quantizing ONNX models.",
    "exporters/artifact": "The folder that an export writes, and what is read from it.",
    "models/loading": "Models by name, folder or hub id.",
    "models/zoo": "Models that need no hub.",
    "models/data": "Texts, tables and batches.",
}
# Packages that are renamed as a whole.
RENAMED = {"passes/weights": "passes/sparsity"}

ROOT = Path.cwd()
FOLDERS = {
    "graphprune": "graphprune",
    "passes": "graphprune.passes",
    "exporters": "graphprune.exporters",
    "models": "graphprune.models",
}
TABLES = {"graphprune": CORE, "passes": PASSES, "exporters": EXPORTERS, "models": MODELS}


def git(*args: str) -> str:
    return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout


def dotted(path: str) -> str:
    top, _, rest = path.removesuffix(".py").partition("/")
    return ".".join([FOLDERS[top], *rest.split("/")])


MODULES_AT = {f"{top}/{a}.py": f"{top}/{b}.py" for top, t in TABLES.items() for a, b in t.items()}
FILES = {
    **MODULES_AT,
    **{f"{a}/__init__.py": f"{b}/__init__.py" for a, b in RENAMED.items()},
    **{f"tests/{a}.py": f"tests/{b}.py" for a, b in TESTS.items()},
}
NAMES = {dotted(a): dotted(b) for a, b in MODULES_AT.items()}
NAMES |= {dotted(a): dotted(b) for a, b in RENAMED.items()}
NAMES |= {f"tests.{a.replace('/', '.')}": f"tests.{b.replace('/', '.')}" for a, b in TESTS.items()}
NAME = re.compile(
    r"(?<![\w.\x00])(" + "|".join(map(re.escape, sorted(NAMES, key=len, reverse=True))) + r")(?!\w)"
)
# As a call's or an f-string's own: "graphprune/axes" stays, "graphprune/capture.py" does not.
PATH = re.compile(
    r"(?<![\w./-])(" + "|".join(map(re.escape, sorted(FILES, key=len, reverse=True))) + r")(?!\w)"
)


def renamed(text: str) -> str:
    text = NAME.sub(lambda m: NAMES[m.group(1)], text)
    return PATH.sub(lambda m: FILES[m.group(1)], text)


def statements(text: str) -> str:
    """`from graphprune import a, b`, where a or b moves, as statements of their own."""
    lines = text.splitlines(keepends=True)
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    for node in sorted(nodes, key=lambda n: -n.lineno):
        moving = [a for a in node.names if f"{node.module}.{a.name}" in NAMES]
        if not moving:
            continue
        indent = " " * node.col_offset
        new = []
        staying = [a for a in node.names if a not in moving]
        if staying:
            new.append(
                f"{indent}from {node.module} import {', '.join(map(ast.unparse, staying))}\n"
            )
        for alias in moving:
            # Written so that `renamed` leaves it alone: old names are hidden until then.
            package, _, name = NAMES[f"{node.module}.{alias.name}"].rpartition(".")
            called = alias.asname or alias.name
            end = f" as {called}" if called != name else ""
            new.append(f"{indent}from \x00{package} import {name}{end}\n")
        lines[node.lineno - 1 : node.end_lineno] = new
    return "".join(lines)


def rewritten(path: Path, text: str) -> str:
    if path.suffix == ".py":
        text = statements(text)
    return renamed(text).replace("\x00", "")


def sources() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".j2", ".yaml", ".js", ".mjs"}
    found = [ROOT / line for line in git("ls-files").splitlines()]
    return [p for p in found if p.suffix in kinds and p.is_file() and "golden" not in p.parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--apply", action="store_true")
    options = parser.parse_args()
    todo = {a: b for a, b in FILES.items() if a != b and (ROOT / a).is_file()}
    for a, b in todo.items():
        print(a, "->", b)
    if not todo or not options.apply:
        print(f"{len(todo)} to move")
        return
    if git("status", "--porcelain"):
        sys.exit("the working tree has changes; commit them first")
    for path in (*sources(), ROOT / "tests/golden/__main__.py"):
        text = path.read_text(encoding="utf-8")
        new = rewritten(path, text)
        if new != text:
            path.write_text(new, encoding="utf-8")
    for a in todo:  # a module that gives its name to its room stands in the way of the folder
        git("mv", a, f"{a}.moving")
    for a, b in todo.items():
        (ROOT / b).parent.mkdir(parents=True, exist_ok=True)
        git("mv", f"{a}.moving", b)
    for package, line in PACKAGES.items():
        file = ROOT / package / "__init__.py"
        if not file.exists():
            file.write_text(f'"""{line}"""\n', encoding="utf-8")
    _list_packages()
    git("add", "-A")


def _list_packages() -> None:
    found = []
    for top, name in FOLDERS.items():
        for file in (ROOT / top).rglob("__init__.py"):
            if not any(p.is_symlink() for p in file.parents):
                found.append(".".join([name, *file.parent.relative_to(ROOT / top).parts]))
    listed = "".join(f'    "{name}",\n' for name in sorted(found))
    file = ROOT / "pyproject.toml"
    text = re.sub(
        r"\npackages = \[\n.*?\]\n",
        f"\npackages = [\n{listed}]\n",
        file.read_text(),
        count=1,
        flags=re.S,
    )
    file.write_text(text)


if __name__ == "__main__":
    main()
