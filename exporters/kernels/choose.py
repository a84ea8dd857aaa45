"""Which layers become sparse products: the form that took the least time on this machine.

Layers that read one value are chosen together, because stock int8 multiplies them together. Each
group is cut out of the graph, written in every form as it will be exported, and timed at the sizes
of the example inputs. Times depend on shapes and on how many blocks are zero, hardly on which; so
they are kept by those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

import graphprune
from graphprune.exporters.kernels.every import every_sparse
from graphprune.exporters.kernels.library import Library
from graphprune.exporters.kernels.lower import SOME, chain_of, lower, of_pattern, own_products
from graphprune.exporters.kernels.packing import WIDTH, density
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.onnx.names import input_names
from graphprune.exporters.quantize.layers import Editor, Layer, find_layers
from graphprune.exporters.quantize.quantize import Choice, NothingToQuantizeError, quantize
from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.costs import Costs, machine
from graphprune.exporters.runtime.device_kit import KitDevice
from graphprune.exporters.runtime.latency import cost
from graphprune.exporters.runtime.measure import RUNS
from graphprune.exporters.runtime.probe import cpu, until_stable
from graphprune.exporters.runtime.session import (
    TUNED,
    Feeds,
    feeds_of,
    inputs_of,
    open_session,
)
from graphprune.exporters.runtime.timing import default_clock
from graphprune.ir.batches import sized
from graphprune.ir.program import Program
from graphprune.ir.quantization import PATTERNS, Mark
from graphprune.pipeline.device import Cost
from graphprune.storage.folders import cache_dir

if TYPE_CHECKING:
    import onnx

    from graphprune.exporters.kernels.packing import Floats

STOCK = ("float", "int8")
_TRIED = (0.5, 0.8)  # fractions of zero blocks that tell from where on a pattern pays


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Layers that read one value.

    Attributes:
        layers: in the order of the graph.
        rows: of the value: tokens, of all samples together.
        part: the layers alone in float, as a model with one input [rows, inputs].
        kinds: of each layer: outputs, inputs, whether it has a bias, and its activation.
        zeros: the fraction of zero blocks, by pattern.
    """

    layers: tuple[Layer, ...]
    rows: int
    part: onnx.ModelProto
    kinds: tuple[tuple[int, int, bool, str], ...]
    zeros: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class Variant:
    """A form of a group: stock, or sparse with a fraction of zero blocks.

    Attributes:
        name: one of `STOCK`, or a pattern.
        zeros: None for stock, and for the group's own zeros.
    """

    name: str
    zeros: float | None = None


@final
class Chooser:
    """Chooses by times measured on this machine, which are kept for 30 days, or by a kit's.

    Attributes:
        library: of the kernels.
        threads: within operators.
    """

    def __init__(
        self,
        library: Library,
        feeds: Feeds,
        *,
        threads: int = 1,
        cache: Path | None = None,
        device: KitDevice | None = None,
    ) -> None:
        """Measure nothing yet.

        Args:
            library: of the kernels.
            feeds: inputs at whose sizes layers are timed.
            threads: within operators.
            cache: folder of what was measured; by default "kernels" in the user's cache folder.
            device: another machine, which a kit of sparse products was measured on.
        """
        self.library, self.feeds = library, feeds
        self.threads, self.device = threads, device
        environment = {
            "cpu": machine(),
            "threads": threads,
            "session": dict(TUNED),
            "graphprune": graphprune.__version__,
            "onnxruntime": version("onnxruntime"),
            "kernels": library.to_json(),
        }
        self._costs = Costs(cache or cache_dir() / "kernels", environment)

    def __call__(self, model: onnx.ModelProto, layers: Sequence[Layer], mark: Mark) -> Choice:
        """Choose a form for each product that has zeros.

        Args:
            model: in float; stays as it is.
            layers: of the model, those that may be quantized.
            mark: how stock layers are quantized.
        """
        # Seven bits are exact on every CPU.
        bits = 7 if mark.reduce_range or self.device is not None else self.library.bits
        choice = Choice()
        groups = groups_of(model, layers, self.feeds)
        if self.device is not None and self.device.blocks:
            return self._as_timed(model, layers, mark, groups)
        for group, times in self._timed(groups, bits, mark):
            decided = _decided(group, times)
            choice.records.append(decided)
            for layer in group.layers:
                if decided["form"] in PATTERNS:
                    choice.sparse[layer] = of_pattern(decided["form"], bits)
                elif decided["form"] == "float":
                    choice.floats[layer] = decided["reason"]
        return choice

    def _as_timed(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        mark: Mark,
        groups: Sequence[Group],
    ) -> Choice:
        """Sparse wherever blocks are zero: so a budget's kit timed whole sublayers."""
        assert self.device is not None
        choice = every_sparse(model, layers, mark, pattern=self.device.blocks, bits=7)
        for group in groups:
            for form in (self.device.blocks, "int8"):
                sparse = form != "int8"
                names = [x.weight for x in group.layers if (x in choice.sparse) == sparse]
                if names:
                    choice.records.append(
                        {
                            "layers": names,
                            "rows": group.rows,
                            "zeros": dict(group.zeros),
                            "ms": {},
                            "form": form,
                            "pays_from": None,
                            "reason": "sparse wherever blocks are zero: the kit of a budget has no "
                            "times of single products",
                        }
                    )
        return choice

    def to_json(self) -> dict[str, Any]:
        """The library, and the machine that was chosen for, as JSON for the manifest."""
        name = cpu()["name"] if self.device is None else self.device.name
        return {**self.library.to_json(), "cpu": name, "threads": self.threads}

    def _timed(
        self, groups: Sequence[Group], bits: int, mark: Mark
    ) -> list[tuple[Group, dict[Variant, Cost]]]:
        """Each group with the times of its variants."""
        keys = {
            (number, variant): key_of(group, variant, bits, mark)
            for number, group in enumerate(groups)
            for variant in variants_of(group)
        }
        if self.device is None:
            known = self._costs.read(set(keys.values()))
        else:
            named = {
                name_of(groups[number], variant): key for (number, variant), key in keys.items()
            }
            known = {named[name]: cost for name, cost in self.device.lookup(named).items()}
        # Times of one group come from one run, or a busy minute would decide.
        stale = {number for (number, _), key in keys.items() if key not in known}
        wanted = {
            key: (groups[number], variant)
            for (number, variant), key in keys.items()
            if number in stale
        }
        measured = self._measured(wanted, bits, mark) if wanted else {}
        self._costs.write(measured)
        costs = {**known, **measured}
        found: list[dict[Variant, Cost]] = [{} for _ in groups]
        for (number, variant), key in keys.items():
            found[number][variant] = costs[key]
        return list(zip(groups, found, strict=True))

    def _measured(
        self, wanted: Mapping[str, tuple[Group, Variant]], bits: int, mark: Mark
    ) -> dict[str, Cost]:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            paths, feeds = [], []
            for key, (group, variant) in wanted.items():
                path = Path(folder) / f"{key}.onnx"
                feeds.append(write_variant(group, variant, path, bits, mark))
                paths.append(path)
            with child(paths, self.threads, TUNED) as process:
                process.warm_up(feeds)
                clock = default_clock(self.threads)
                times = until_stable(lambda: process.round(RUNS, clock))
            sizes = [path.stat().st_size for path in paths]
        return {key: cost(own, size) for key, own, size in zip(wanted, times, sizes, strict=True)}


def timed_feeds(program: Program, batch: Sequence[int]) -> Feeds:
    """Inputs of the deployed entry, at whose sizes layers are timed.

    Args:
        program: to be exported.
        batch: samples, and tokens of each (after a cache: tokens of past); the example inputs'
            sizes where it is empty.
    """
    program = program.in_float32()
    entry = program.entries[program.deployed]
    inputs = tuple(sized(entry, batch)) if batch else entry.example
    return feeds_of(inputs, input_names(entry))


def groups_of(model: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds) -> list[Group]:
    """Products with zeros, those that read one value together.

    Args:
        model: in float; stays as it is.
        layers: of the model; others than products with a weight of their own are left out.
        feeds: inputs that the model is run on, for the number of rows of each value.
    """
    editor, weights = own_products(model, layers)
    by_input: dict[str, list[Layer]] = {}
    for layer in weights:
        by_input.setdefault(editor.nodes[layer.node].input[0], []).append(layer)
    kept = {
        value: together
        for value, together in by_input.items()
        if any((weights[x] == 0).mean() >= SOME for x in together)
    }
    rows = _rows(editor.model, list(kept), feeds)
    return [
        _group(editor, together, [weights[x] for x in together], rows[value])
        for value, together in kept.items()
    ]


def _rows(model: onnx.ModelProto, values: Sequence[str], feeds: Feeds) -> dict[str, int]:
    """How many rows values have: all their dimensions but the last."""
    import onnx
    from onnx import helper

    if not values:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    inputs = {value.name: value for value in probe.graph.input}
    inner = [name for name in values if name not in inputs]
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in inner)
    found = {name: feeds[name].shape for name in values if name in inputs}
    if inner:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            path = Path(folder) / "model.onnx"
            # Types and shapes of the outputs are ONNX Runtime's to find, so no check of the file.
            onnx.save_model(probe, path, save_as_external_data=True)
            session = open_session(path, 1)
            fed = {name: feeds[name] for name in inputs_of(session) if name in feeds}
            arrays = session.run(inner, fed)
        found |= {name: array.shape for name, array in zip(inner, arrays, strict=True)}
    return {name: math.prod(shape[:-1]) for name, shape in found.items()}


def _group(editor: Editor, layers: Sequence[Layer], weights: Sequence[Floats], rows: int) -> Group:
    from onnx import TensorProto, helper

    chains = [chain_of(editor, editor.nodes[layer.node]) for layer in layers]
    nodes = [node for chain in chains for node in chain.nodes]
    constants = {name for node in nodes for name in node.input} & editor.weights.keys()
    inputs = weights[0].shape[1]
    value = nodes[0].input[0]
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [rows, inputs])],
        [
            helper.make_tensor_value_info(chain.output, TensorProto.FLOAT, [rows, len(weight)])
            for chain, weight in zip(chains, weights, strict=True)
        ],
        [editor.weights[name] for name in sorted(constants)],
    )
    part = helper.make_model(
        graph, opset_imports=editor.model.opset_import, ir_version=editor.model.ir_version
    )
    kinds = tuple(
        (*weight.shape, bool(chain.bias), chain.activation)
        for chain, weight in zip(chains, weights, strict=True)
    )
    zeros = {pattern: _zeros(weights, pattern) for pattern in PATTERNS}
    return Group(tuple(layers), rows, part, kinds, zeros)


def _zeros(weights: Sequence[Floats], pattern: str) -> float:
    """The fraction of zero blocks of several weights [outputs, inputs] together."""
    height = of_pattern(pattern, 8).height
    densities = [density(weight, height) for weight in weights]
    return 1 - float(np.average(densities, weights=[weight.size for weight in weights]))


def variants_of(group: Group) -> list[Variant]:
    """What is timed: stock forms, patterns that have zeros here, and those that tell a trend."""
    first, second = PATTERNS
    found = [Variant(name) for name in STOCK]
    if group.zeros[first] >= SOME:
        found.append(Variant(first))
    if group.zeros[second] >= group.zeros[first] + SOME:
        found.append(Variant(second))
    return found + [Variant(first, zeros) for zeros in _TRIED]


def name_of(group: Group, variant: Variant) -> str:
    """A variant in words."""
    zeros = "" if variant.zeros is None else f" at {variant.zeros:.0%} zeros"
    return f"{group.layers[0].weight} as {variant.name}{zeros}"


def key_of(group: Group, variant: Variant, bits: int, mark: Mark) -> str:
    """One text for all groups that take the same time in a form."""
    zeros = group.zeros.get(variant.name, 0.0) if variant.zeros is None else variant.zeros
    form: list[Any] = [variant.name]
    if variant.name in PATTERNS:
        form += [bits, round(zeros, 2)]
    elif variant.name == "int8":
        form += [mark.scheme, mark.reduce_range]
    text = json.dumps([group.rows, group.kinds, form])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_variant(group: Group, variant: Variant, path: Path, bits: int, mark: Mark) -> Feeds:
    """Write a group in a form.

    Args:
        group: whose part is written.
        variant: the form; with zeros of its own, weights are random.
        path: the ONNX file.
        bits: of sparse codes.
        mark: how stock int8 is quantized.

    Returns:
        Random inputs, float32 [rows, inputs].
    """
    import onnx
    import onnx_ir as ir

    model = onnx.ModelProto()
    model.CopyFrom(group.part)
    x = model.graph.input[0]
    shape = [dim.dim_value for dim in x.type.tensor_type.shape.dim]
    rng = np.random.default_rng(0)
    feeds = {x.name: rng.standard_normal(shape).astype(np.float32)}
    if variant.zeros is not None:
        _thin_out(model, of_pattern(variant.name, bits).height, variant.zeros, rng)
    if variant.name in PATTERNS:
        form = of_pattern(variant.name, bits)
        lower(model, {layer: form for layer in find_layers(model)})
    save_onnx(ir.from_proto(model), path)
    if variant.name == "int8":
        whole = replace(mark, ignored=(), keep_error=None)
        with contextlib.suppress(NothingToQuantizeError):
            quantize(path, path, whole, [feeds])
    return feeds


def _thin_out(model: onnx.ModelProto, height: int, zeros: float, rng: np.random.Generator) -> None:
    """Make every weight random, with so many zero blocks."""
    editor = Editor(model)
    for layer in find_layers(model):
        inputs, outputs = editor.array(layer.weight).shape
        strips, groups = -(-outputs // height), -(-inputs // WIDTH)
        alive = rng.permuted(np.arange(strips * groups)) >= round(zeros * strips * groups)
        mask = alive.reshape(strips, groups).repeat(height, 0).repeat(WIDTH, 1)
        weight = rng.standard_normal((outputs, inputs)) * mask[:outputs, :inputs]
        editor.replace(layer.weight, weight.T.astype(np.float32))


def _decided(group: Group, times: Mapping[Variant, Cost]) -> dict[str, Any]:
    """The fastest form of a group, as JSON for the manifest."""
    ms = {v.name: cost.ms for v, cost in times.items() if v.zeros is None}
    stock = min((name for name in ms if name in STOCK), key=lambda name: ms[name])
    form = min(ms, key=lambda name: ms[name])
    pays = pays_from({v.zeros: c.ms for v, c in times.items() if v.zeros is not None}, ms[stock])
    own = [f"{name} {took:.3g} ms" for name, took in sorted(ms.items(), key=lambda x: x[1])]
    return {
        "layers": [layer.weight for layer in group.layers],
        "rows": group.rows,
        "zeros": dict(group.zeros),
        "ms": ms,
        "form": form,
        "pays_from": pays,
        "reason": f"{', '.join(own)}; {_trend(pays)}",
    }


def pays_from(times: Mapping[float, float], stock: float) -> float | None:
    """From which fraction of zero blocks on a pattern is faster than stock; None: from none on.

    Args:
        times: milliseconds by fraction, of two fractions; in between and beyond they lie on a line.
        stock: milliseconds of the fastest stock form.
    """
    (low, slow), (high, fast) = sorted(times.items())
    if fast >= slow:  # Noise, or nothing but a fixed cost.
        return 0.0 if slow < stock else None
    found = low + (slow - stock) / (slow - fast) * (high - low)
    return None if found >= 1 else max(0.0, found)


def _trend(pays: float | None) -> str:
    pattern = PATTERNS[0]
    if pays is None:
        return f"{pattern} would not pay here with any zeros"
    return f"{pattern} pays from {pays:.0%} of zero blocks on"
