"""Behavior held still while code moves: what a dozen models become, as files to compare with.

For every case: the saved program (graph, kept indices, history), the outputs on the example, the
operators of the ONNX file and the files of the artifact. Beside them the help of every command,
and an artifact, a recipe and a checkpoint, which later versions load or refuse by version.

    python -m tests.golden --write     make them, by the code as it is
    python -m tests.golden             make them again in memory and list what differs
    python -m tests.golden NAME ...    only these cases

Numbers are compared with a tolerance, since another CPU rounds otherwise.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
import yaml
from torch import Tensor

import graphprune
from graphprune.models.zoo.tiny import tiny

HERE = Path(__file__).parent / "expected"
TOLERANCE = 2e-3
COMMANDS = (
    "inspect", "compile", "bench", "generate", "eval", "sensitivity", "passes", "recipes",
    "models", "demo", "check", "front", "device-kit", "compare",
)  # fmt: skip
TIMES = re.compile("second|time|date|version|cpu|machine|threads", re.IGNORECASE)
CLEAN = "[remove-no-ops, fold-constants, remove-dead-nodes]"


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a recipe.

    Attributes:
        model: a tiny model's name.
        passes: of the recipe, as YAML.
        cache: whether a decoder's cached form is captured too.
        train: whether labeled batches are given.
    """

    model: str
    passes: str
    cache: bool = False
    train: bool = False


CASES = {
    "encoder": Case(
        "tiny-bert", f"[prune-heads: {{ratio: 0.5}}, prune-neurons: {{ratio: 0.5}}, repeat: "
        f"{{passes: {CLEAN}, at_most: 4}}]",
    ),
    "encoder-calibrated": Case(
        "tiny-roberta", "[prune-heads: {ratio: 0.5, score: obs, allocation: global}, "
        "prune-neurons: {ratio: 0.5, score: obs, round_to: 8}]",
    ),
    "encoder-int8": Case("tiny-distilbert", "[prune-neurons: {ratio: 0.5, score: fluctuation}, "
                         "quantize: {scheme: int8-dynamic}]"),
    "factored-embedding": Case("tiny-electra", "[prune-heads: {ratio: 0.25, score: taylor}]",
                               train=True),
    "shared-layers": Case(
        "tiny-albert", "[prune-heads: {ratio: 0.5}, prune-neurons: {ratio: 0.5}]"
    ),
    "packed-projections": Case("tiny-encoder", "[prune-heads: {ratio: 0.5, score: activation}]"),
    "tied-decoder": Case("tiny-gpt2", "[sparsegpt: {pattern: '2:4'}]"),
    "decoder-sparsellm": Case("tiny-opt", "[sparsellm: {sparsity: 0.5}]"),
    "cached-decoder": Case(
        "tiny-llama", "[prune-heads: {ratio: 0.5}, prune-neurons: {ratio: 0.5}]", cache=True
    ),
    "grouped-queries": Case("tiny-qwen2", "[prune-heads: {ratio: 0.5, score: obs}]", cache=True),
    "experts": Case("tiny-mixtral", "[prune-neurons: {ratio: 0.5}]"),
    "encoder-decoder": Case("tiny-t5", "[prune-heads: {ratio: 0.5}, prune-neurons: {ratio: 0.5}]"),
    "image-classifier": Case("tiny-vit", "[wanda: {sparsity: 0.5}, prune-heads: {ratio: 0.5}]"),
    "fused-attention": Case("tiny-fused-vit", "[prune-axis: {role: neuron, ratio: 0.5}]"),
    "convolutions": Case("tiny-cnn", "[fold-batch-norm, prune-neurons: {ratio: 0.5}]"),
    "trained-zeros": Case(
        "tiny-mlp", "[gradual-magnitude: {final: 0.5, epochs: 2, every: 1, lr: 0.01}, shrink]",
        train=True,
    ),
    "trained-topology": Case("tiny-mlp", "[neuroprune: {epochs: 2, lr: 0.01}, shrink]", train=True),
    "recovered": Case(
        "tiny-mlp", "[prune-neurons: {ratio: 0.5}, least-squares]", train=True
    ),
    "distilled": Case(
        "tiny-mlp", "[magnitude: {sparsity: 0.5}, distill: {epochs: 2, lr: 0.01}]", train=True
    ),
}  # fmt: skip


@dataclass(slots=True)
class Record:
    """What a case comes to: JSON that is compared, and tensors."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]


def main() -> None:
    """Write, or compare and exit with 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all by default")
    parser.add_argument("--write", action="store_true", help="take what is now as expected")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = 0
    for name in options.names or CASES:
        record = made(CASES[name])
        if options.write:
            write(name, record)
        differences = list(compared(name, record))
        print(f"{name}: {'equal' if not differences else ''}", flush=True)
        for line in differences[:20]:
            print(f"    {line}")
        wrong += bool(differences)
    if not options.names:
        wrong += sum(_compare_text(*item, take=options.write) for item in helps())
        if options.write:
            write_files()
        wrong += sum(_load_files())
    sys.exit(1 if wrong else 0)


def made(case: Case) -> Record:
    """Compile a case and take down what came out."""
    model, inputs = tiny(case.model)
    batches = calibration(inputs)
    options: dict[str, Any] = {"calibration": batches, "cache": case.cache}
    if case.train:
        options["training"] = graphprune.Training(labeled(batches), device="cpu")
    compiled = graphprune.compile(
        model, {"passes": yaml.safe_load(case.passes)}, example_inputs=inputs, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "program")
        compiled.export(Path(folder) / "artifact")
        return Record(_data(Path(folder)), _outputs(compiled, inputs))


def calibration(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The example, and three more batches in another order."""
    return [{name: t.roll(i, 0).roll(i, -1) for name, t in inputs.items()} for i in range(4)]


def labeled(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batches with class labels."""
    return [{**b, "labels": torch.arange(len(next(iter(b.values())))) % 2} for b in batches]


def _data(folder: Path) -> dict[str, Any]:
    import onnx

    onnx_file = graphprune.open(folder / "artifact").model_path
    nodes = onnx.load(onnx_file, load_external_data=False).graph.node
    program = json.loads((folder / "program" / "program.json").read_text())
    return {
        "program": program,
        "onnx": dict(sorted(Counter(n.op_type for n in nodes).items())),
        "artifact": sorted(
            p.relative_to(folder / "artifact").as_posix()
            for p in (folder / "artifact").rglob("*")
            if p.is_file()
        ),
    }


def _outputs(compiled: graphprune.Compiled, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = pytree.tree_leaves(compiled.module.eval()(**inputs))
    tensors = [t for t in outputs if isinstance(t, Tensor)]
    return {f"output{i}": t.contiguous() for i, t in enumerate(tensors)}


def write(name: str, record: Record) -> None:
    """Keep a case."""
    from safetensors.torch import save_file

    HERE.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.data, sort_keys=True).encode()
    (HERE / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))
    save_file(record.tensors, HERE / f"{name}.safetensors")


def compared(name: str, record: Record) -> Iterator[str]:
    """What differs from the case as it was kept."""
    from safetensors.torch import load_file

    expected = json.loads(gzip.decompress((HERE / f"{name}.json.gz").read_bytes()))
    yield from differences(expected, json.loads(json.dumps(record.data)))
    kept = load_file(HERE / f"{name}.safetensors")
    if kept.keys() != record.tensors.keys():
        yield f"outputs: {sorted(kept)} and now {sorted(record.tensors)}"
        return
    for key, before in kept.items():
        now = record.tensors[key]
        if before.shape != now.shape or before.dtype is not now.dtype:
            yield f"{key}: {before.dtype}{list(before.shape)}, now {now.dtype}{list(now.shape)}"
        elif not torch.allclose(before, now, rtol=TOLERANCE, atol=TOLERANCE * _scale(before)):
            yield f"{key}: other values"


def _scale(tensor: Tensor) -> float:
    return float(tensor.double().abs().mean()) if tensor.numel() else 0.0


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Places in two JSON values that differ by more than rounding; times are left out."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if TIMES.search(key):
                continue
            if key not in before or key not in now:
                yield f"{where}.{key}: only {'before' if key in before else 'now'}"
            else:
                yield from differences(before[key], now[key], f"{where}.{key}")
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            yield f"{where}: {len(before)} items, now {len(now)}"
        for i, (a, b) in enumerate(zip(before, now, strict=False)):
            yield from differences(a, b, f"{where}[{i}]")
    elif isinstance(before, float) and isinstance(now, float | int):
        # Errors of 1e-7 are rounding, and so is their difference.
        if not math.isclose(before, now, rel_tol=TOLERANCE, abs_tol=1e-4):
            yield f"{where}: {before}, now {now}"
    elif before != now:
        yield f"{where}: {before!r:.80}, now {now!r:.80}"


def helps() -> Iterator[tuple[str, str]]:
    """The help of every command, and the lists of passes and recipes."""
    calls = [["--help"], *([c, "--help"] for c in COMMANDS), ["passes"], ["recipes"]]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    for call in calls:
        done = subprocess.run(
            [sys.executable, "-m", "graphprune", *call],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        kind = "help" if "--help" in call else "list"
        yield f"{kind} {call[0].replace('--help', 'all')}.txt", done.stdout


def _compare_text(name: str, text: str, *, take: bool) -> bool:
    if take:
        (HERE / name).write_text(text)
    differs = (HERE / name).read_text() != text
    print(f"{name}: {'DIFFERS' if differs else 'equal'}", flush=True)
    return differs


def write_files() -> None:
    """An artifact, a saved program, a recipe and a checkpoint, as this version writes them."""
    folder = HERE / "files"
    shutil.rmtree(folder, ignore_errors=True)
    compiled = _mlp("[prune-neurons: {ratio: 0.5}]")
    compiled.export(folder / "artifact")
    compiled.save(folder / "program")
    (folder / "recipe.yaml").write_text("passes:\n  - prune-neurons: {ratio: 0.5}\n")
    _mlp(TRAINED, folder / "checkpoints")


TRAINED = "[finetune: {epochs: 2, lr: 0.01}]"


def _mlp(passes: str | Path, checkpoints: Path | None = None) -> graphprune.Compiled:
    model, inputs = tiny("tiny-mlp")
    batches = labeled(calibration(inputs))
    training = graphprune.Training(
        batches, device="cpu", checkpoints=checkpoints, resume=checkpoints is not None
    )
    recipe = passes if isinstance(passes, Path) else {"passes": yaml.safe_load(passes)}
    return graphprune.compile(model, recipe, example_inputs=inputs, training=training)


def _load_files() -> Iterator[bool]:
    """Whether each of the files still does what it did, or is refused by its version."""
    folder = HERE / "files"
    expected = _mlp("[prune-neurons: {ratio: 0.5}]").program.tensors
    for name, read in {
        "artifact": lambda: graphprune.load(folder / "artifact").program.tensors,
        "program": lambda: graphprune.load(folder / "program").program.tensors,
        "recipe": lambda: _mlp(folder / "recipe.yaml").program.tensors,
    }.items():
        yield _read(name, read, expected)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder / "checkpoints", copy, dirs_exist_ok=True)
        yield _read(
            "checkpoint", lambda: _mlp(TRAINED, Path(copy)).program.tensors,
            _mlp(TRAINED).program.tensors,
        )  # fmt: skip


def _read(name: str, read: Any, expected: Any) -> bool:
    try:
        found = read()
    except graphprune.GraphPruneError as e:
        print(f"{name}: refused, {e}")
        return "version" not in str(e)
    same = found.keys() == expected.keys() and all(
        torch.allclose(t, expected[k], rtol=TOLERANCE, atol=TOLERANCE) for k, t in found.items()
    )
    print(f"{name}: {'equal' if same else 'DIFFERS'}")
    return not same


if __name__ == "__main__":
    main()
