"""Quantize an exported float file as a Mark says, with ONNX Runtime's own quantizer.

Measured with ORT 1.31 on AVX-512 VNNI, one thread, MiniLM-L6 at 1 x 128 tokens, float = 1:

    int8 weights, a scale a channel      2.55    the products and their biases are fused, all 36
    the same with seven bits             2.57    cosine a little lower; not needed with VNNI
    int8 weights, a scale a tensor       2.64    cosine 0.89 instead of 0.99 on random tokens
    uint8 weights, a scale a channel     1.52    MLAS has no fast kernel for them here

Of recurrent layers, "int8-dynamic" takes LSTM (com.microsoft.DynamicQuantizeLSTM, a scale a row of
each gate); GRU and RNN have no such operator.

Without VNNI (AVX2) pairs of uint8 x int8 products are added in 16 bits and saturate: seven-bit
weights (reduce_range) are exact there.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.errors import ArtifactError, ExportError
from graphprune.exporters.kernels.lower import Form, lower
from graphprune.exporters.onnx.files import file_bytes, save_onnx
from graphprune.exporters.onnx.recurrent import made_of
from graphprune.exporters.quantize.layers import (
    Editor,
    Layer,
    find_layers,
    half_tied,
    readers_of,
)
from graphprune.exporters.runtime.costs import machine
from graphprune.exporters.runtime.drift import Drift, Outputs, drifts, run_all, worst
from graphprune.exporters.runtime.session import Feeds, open_session
from graphprune.ir.quantization import OVERFLOWING, Mark

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

BITS = {"int4-weights": 4, "int8-weights": 8}
_LARGE = 1_000_000_000  # bytes: protobuf ends at 2 GiB, and the quantizer copies
_FAR = 0.5  # drift above which a user hears what may be the cause
_MEASURED = 8  # calibration batches that drift is measured on, beside the examples

Notes = dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """Forms of layers that are not those of the scheme.

    Attributes:
        sparse: layers that become sparse products.
        floats: layers that stay float, with the reason.
        records: of each choice, JSON for the manifest.
    """

    sparse: dict[Layer, Form] = field(default_factory=dict)
    floats: dict[Layer, str] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


Choose = Callable[["onnx.ModelProto", Sequence[Layer], Mark], Choice]
"""Chooses among the layers of a float model which leave the scheme."""


class NothingToQuantizeError(ExportError):
    """The scheme has no operator for any layer of the file."""


def quantize(
    source: Path,
    target: Path,
    mark: Mark,
    feeds: Sequence[Feeds],
    calibration: Sequence[Feeds] = (),
    weights: str = "auto",
    choose: Choose | None = None,
) -> Notes:
    """Write `target`, the file `source` quantized, and measure how far it drifts.

    Args:
        source: a float ONNX file.
        target: where to write; may be the source.
        mark: what to quantize, and how.
        feeds: inputs to measure drift on.
        calibration: inputs that fix the ranges of activations in scheme "int8-static".
        weights: where `target` has them (`files.save_onnx`).
        choose: which layers leave the scheme, for other forms; by default none.

    Returns:
        JSON for the manifest: how many layers are quantized, those left in float with the reason,
        and the drift of every output.

    Raises:
        ExportError: there is nothing to quantize, ranges have no calibration, nothing holds
            keep_error, or ONNX Runtime cannot run the result.
    """
    if mark.needs_calibration and not calibration:
        raise ExportError(
            "scheme 'int8-static' takes the activations' ranges from calibration batches, and "
            "there are none: give export(..., calibration=batches)"
        )
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        feeds = [*feeds, *calibration[:_MEASURED]]
        work = _Work(source, Path(folder), mark, feeds, calibration)
        chosen, notes = work.choose(choose)
        work.write(chosen, target, weights)
        session = _session(target, mark)
        found = drifts(work.outputs, work.expected, run_all(session, feeds))
    return {
        "scheme": mark.scheme,
        "products": sum(layer.kind in ("matmul", "conv") for layer in chosen),
        "tables": sum(layer.kind == "embedding" for layer in chosen),
        "recurrent": sum(layer.kind == "lstm" for layer in chosen),
        "sparse": sum(layer in work.sparse for layer in chosen),
        **notes,
        "drift": [d.to_json() for d in found],
    }


def warn_of_overflow(mark: Mark, notes: Notes) -> None:
    """Say so where this CPU is an x86 one without VNNI, and eight-bit weights are far off on it."""
    error = worst([Drift(**drift) for drift in notes["drift"]])
    known = {name.lower() for name in machine()["capabilities"]}
    pairs = "avx2" in known and not any("vnni" in name for name in known)
    eight = mark.scheme in OVERFLOWING and not mark.reduce_range
    if pairs and eight and error > _FAR:
        log.warning(
            "this CPU adds products of int8 weights in 16 bits, which overflow with eight-bit "
            "weights, and the quantized model's outputs are %.0f %% off the float model's: give "
            "Quantize(%r, reduce_range=True), whose seven bits are exact on every CPU (in a recipe "
            "reduce_range: true, on the command line --reduce-range); on a CPU with VNNI this file "
            "may be right",
            100 * error,
            mark.scheme,
        )


@final
class _Work:
    """One file to quantize, its layers, and what its float form computes."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        mark: Mark,
        feeds: Sequence[Feeds],
        calibration: Sequence[Feeds],
    ) -> None:
        import onnx

        self.folder, self.mark, self.feeds = folder, mark, feeds
        self.model = onnx.load(source)
        inputs = [i.name for i in self.model.graph.input]
        self.calibration = [
            {name: feed[name] for name in inputs if name in feed} for feed in calibration
        ]
        self.large = file_bytes(source) > _LARGE
        self.layers = find_layers(self.model)
        self.sparse: Mapping[Layer, Form] = {}
        self.outputs = [output.name for output in self.model.graph.output]
        self.expected: Outputs = run_all(open_session(source, 1), feeds)

    def choose(self, choose: Choose | None) -> tuple[list[Layer], Notes]:
        """The layers to quantize, and the others with the reason."""
        chosen, left = [], {}
        for layer in self.layers:
            if reason := self._obstacle(layer):
                left[layer] = reason
            else:
                chosen.append(layer)
        chosen = self._without_half_tied(chosen, left)
        if not chosen:
            raise NothingToQuantizeError(
                f"scheme {self.mark.scheme!r} finds nothing to quantize among "
                f"{len(self.layers)} layers; the first is left because: "
                f"{next(iter(left.values()), 'there is no layer with a constant weight')}"
            )
        notes: Notes = {}
        if choose is not None:
            choice = choose(self.model, chosen, self.mark)
            self.sparse = choice.sparse
            left.update(choice.floats)
            chosen = [layer for layer in chosen if layer not in choice.floats]
            notes["choices"] = choice.records
        if self.mark.keep_error is not None:
            chosen, within = self._within(self.mark.keep_error, chosen, left)
            notes |= within
        return chosen, {"float": {tensor_of(layer): why for layer, why in left.items()}, **notes}

    def _obstacle(self, layer: Layer) -> str:
        if not self.mark.takes(tensor_of(layer)):
            return "left in float on request"
        if layer.kind in ("lstm", "recurrent"):
            return self._recurrent_obstacle(layer)
        if layer.kind == "embedding" and not self.mark.embeddings:
            return "embeddings=False"
        if layer.kind == "conv" and self.mark.scheme != "int8-static":
            return f"{self.mark.scheme} has no fast convolution"
        return ""

    def _recurrent_obstacle(self, layer: Layer) -> str:
        node = next(n for n in self.model.graph.node if n.name == layer.node)
        if self.mark.scheme != "int8-dynamic":
            return f"{self.mark.scheme} has no recurrent layer"
        if node.op_type != "LSTM":
            return f"onnxruntime has no {node.op_type} in int8"
        readers = readers_of(self.model.graph)
        constant = {i.name for i in self.model.graph.initializer}
        if not constant.issuperset(node.input[1:3]):
            return "its recurrence is computed"
        others = [n for weight in node.input[1:3] for n in readers[weight] if n.op_type != "LSTM"]
        return f"{others[0].name!r} reads the same weight and stays float" if others else ""

    def _without_half_tied(self, chosen: list[Layer], left: dict[Layer, str]) -> list[Layer]:
        while gone := half_tied(self.model, chosen):
            left.update(gone)
            chosen = [layer for layer in chosen if layer not in gone]
        return chosen

    def error(self, chosen: Collection[Layer]) -> float:
        """The relative error of the outputs when only these layers are quantized."""
        path = self.folder / "candidate.onnx"
        self.write(chosen, path)
        actual = run_all(_session(path, self.mark, 1), self.feeds)
        return worst(drifts(self.outputs, self.expected, actual))

    def _within(
        self, limit: float, chosen: list[Layer], left: dict[Layer, str]
    ) -> tuple[list[Layer], Notes]:
        """Leave the costliest layers in float until the outputs are within the limit.

        Layers are ranked by the error that each makes alone; how many have to go is found by
        doubling and halving, so that n layers take n + 2 log n measurements.
        """
        total = self.error(chosen)
        if total <= limit:
            return chosen, {"error": total}
        groups = _together(chosen)
        alone = {weight: self.error(group) for weight, group in groups.items()}
        ranked = sorted(groups, key=lambda weight: -alone[weight])

        def kept(count: int) -> list[Layer]:
            gone = set(ranked[:count])
            return [layer for layer in chosen if layer.weight not in gone]

        low, high, measured = 0, 1, {0: total}
        while high < len(ranked):
            measured[high] = self.error(kept(high))
            if measured[high] <= limit:
                break
            low, high = high, 2 * high
        high = min(high, len(ranked))
        while high - low > 1:
            middle = (low + high) // 2
            measured[middle] = self.error(kept(middle))
            low, high = (low, middle) if measured[middle] <= limit else (middle, high)
        if high == len(ranked):
            raise ExportError(
                f"keep_error={limit:g} leaves nothing to quantize: the least costly layer alone "
                f"({ranked[-1]!r}) makes an error of {alone[ranked[-1]]:.1e}, all together "
                f"{total:.1e}"
            )
        for layer in chosen:
            if layer.weight in ranked[:high]:
                left[layer] = f"keep_error: alone it makes an error of {alone[layer.weight]:.1e}"
        return kept(high), {"error": measured[high], "error_alone": alone}

    def write(self, chosen: Collection[Layer], target: Path, weights: str = "auto") -> None:
        """Write the file with just these layers quantized."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        stock = [layer for layer in chosen if layer not in self.sparse]
        largest = 64 if self.mark.reduce_range else 127
        names = Editor(model).prepare(stock, self.layers, largest)
        if names:
            with _quiet():
                model = self._products(model, names)
        lower(model, {layer: self.sparse[layer] for layer in chosen if layer in self.sparse})
        del model.graph.value_info[:]
        _save(model, target, weights)

    def _products(self, model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
        import onnx

        if self.mark.scheme in BITS:
            return self._blocks(model, names)
        source, target = self.folder / "float.onnx", self.folder / "quantized.onnx"
        _save(model, source, "beside" if self.large else "inside")
        if self.mark.scheme == "int8-static":
            self._static(source, target, names)
        else:
            self._dynamic(source, target, names)
        return onnx.load(target)

    def _dynamic(self, source: Path, target: Path, names: list[str]) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=self.mark.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=names,
            use_external_data_format=self.large,
            extra_options={"DefaultTensorType": 1},
        )

    def _static(self, source: Path, target: Path, names: list[str]) -> None:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        # What sits between two convolutions is quantized too, or each would go through float.
        between = [n.name for n in self.model.graph.node if n.op_type in _BETWEEN]
        convolutions = any(layer.kind == "conv" for layer in self.layers)
        quantize_static(
            source,
            target,
            _Reader(self.calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Conv", *(_BETWEEN if convolutions else ())],
            per_channel=True,
            reduce_range=self.mark.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[*names, *(between if convolutions else ())],
            use_external_data_format=self.large,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "DefaultTensorType": 1,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "CalibMaxIntermediateOutputs": 16,
            },
        )

    def _blocks(self, model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

        config = DefaultWeightOnlyQuantConfig(
            block_size=self.mark.block_size,
            is_symmetric=True,
            accuracy_level=4,  # int8 activations: the only fast path on CPUs
            op_types_to_quantize=("MatMul",),
            bits=BITS[self.mark.scheme],
        )
        others = [n.name for n in model.graph.node if n.name not in names]
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=others)
        quantizer.process()
        return quantizer.model.model


_BETWEEN = ("Relu", "Clip", "MaxPool")


@final
class _Reader:
    """Calibration inputs as ORT's calibrator asks for them."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next inputs, or None after the last."""
        return next(self._feeds, None)

    def __iter__(self) -> Iterator[Feeds]:
        return self._feeds


def tensor_of(layer: Layer) -> str:
    """The program's tensor that a layer's weight is, or is made of."""
    return made_of(layer.weight) if layer.kind in ("lstm", "recurrent") else layer.weight


def _together(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by weight: a table and the projection tied to it are quantized both or not at all."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.weight, []).append(layer)
    return groups


def _save(model: onnx.ModelProto, path: Path, weights: str = "auto") -> None:
    import onnx_ir as ir

    save_onnx(ir.from_proto(model), path, weights)


def _session(path: Path, mark: Mark, threads: int | None = None) -> Any:
    try:
        return open_session(path, threads)
    except ArtifactError as e:
        raise ExportError(
            f"onnxruntime {version('onnxruntime')} cannot run what scheme {mark.scheme!r} writes: "
            f"{e}; take another scheme, or a newer onnxruntime"
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep ORT's quantizer from the user's log; importing it sets up logging for everybody."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
