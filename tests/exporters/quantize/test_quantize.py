"""Lowering a mark: the numbers in the file are those that the scheme promises."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.errors import ExportError, GraphPruneError
from graphprune.exporters import export, measure
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx, weight_bytes
from graphprune.exporters.onnx.names import input_names
from graphprune.exporters.quantize.layers import find_layers
from graphprune.exporters.quantize.quantize import quantize, warn_of_overflow
from graphprune.exporters.runtime.session import feeds_of, open_session
from graphprune.ir.program import Program
from graphprune.ir.quantization import SCHEMES, Mark
from graphprune.passes import Quantize
from graphprune.pipeline.base import Context
from graphprune.storage.program import load

Captured = Callable[[str], Program]
MODEL = "model.onnx"


@dataclass(frozen=True)
class File:
    """A quantized file, with what `quantize` says about it and the float file it comes from."""

    path: Path
    notes: dict[str, Any]
    source: Path

    def weights(self) -> dict[str, npt.NDArray[Any]]:
        model = onnx.load(self.path)
        return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}

    def operators(self) -> Counter[str]:
        return Counter(n.op_type for n in onnx.load(self.path).graph.node)

    def run(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        session = open_session(self.path, 1)
        result: npt.NDArray[Any] = session.run(None, {session.get_inputs()[0].name: x})[0]
        return result

    @property
    def shrinkage(self) -> float:
        """Of the weights: names make up most of a tiny file."""
        quantized, dense = (weight_bytes(ir.load(p)) for p in (self.path, self.source))
        return quantized / dense


Lower = Callable[..., File]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Program], Path]:
    folder = tmp_path_factory.mktemp("float")

    @functools.cache
    def made(key: int) -> Path:
        path = folder / f"{key}.onnx"
        save_onnx(to_onnx(alive[key]), path)
        return path

    alive: dict[int, Program] = {}  # an id is only unique among living objects

    def find(program: Program) -> Path:
        alive[id(program)] = program
        return made(id(program))

    return find


@pytest.fixture
def lower(float_file: Callable[[Program], Path], tmp_path: Path) -> Lower:
    """Mark a program, and lower its float file, which is exported once a module."""
    number = itertools.count()

    def lowered(program: Program, scheme: str, **options: Any) -> File:
        entry = program.forward
        feeds = [feeds_of(entry.example, input_names(entry))]
        marked = Quantize(scheme, **options).run(program, Context(calibration=[entry.example]))
        mark = marked.program.quantization
        assert mark is not None
        path = tmp_path / f"{next(number)}.onnx"
        source = float_file(program)
        return File(path, quantize(source, path, mark, feeds, feeds), source)

    return lowered


# Eight bits saturate on CPUs without VNNI, in ONNX Runtime's own kernels.
SEVEN_BITS = True


def marked(program: Program, scheme: str, **options: Any) -> Program:
    context = Context(calibration=[program.forward.example])
    return Quantize(scheme, **options).run(program, context).program


class Net(nn.Module):
    """A table, two products and a normalization between them; the table may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 64)
        self.wide = nn.Linear(64, 192)
        self.norm = nn.LayerNorm(192)
        self.narrow = nn.Linear(192, 64, bias=False)
        self.head = nn.Linear(64, 300, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.narrow(self.norm(self.wide(self.table(ids)).relu()))
        result: Tensor = self.head(x)
        return result


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(3)
    return capture(Net(), {"ids": torch.randint(300, (3, 7))})


@pytest.fixture(scope="module")
def tied() -> Program:
    torch.manual_seed(3)
    return capture(Net(tied=True), {"ids": torch.randint(300, (3, 7))})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "name", ["tiny-mlp", "tiny-cnn", "tiny-encoder", "tiny-fused-vit", "tiny-gpt2", "tiny-llama"]
)
def test_every_scheme_runs_and_stays_near(
    name: str, scheme: str, captured: Captured, lower: Lower
) -> None:
    file = lower(captured(name), scheme, reduce_range=SEVEN_BITS)
    least = 0.9 if scheme.startswith("int4") else 0.999
    assert all(d["cosine"] > least for d in file.notes["drift"])
    assert file.notes["products"] > 0
    assert file.shrinkage < 1


@pytest.mark.parametrize(
    ("scheme", "operator", "left"),
    [
        ("int8-dynamic", "MatMulInteger", 0),
        ("int8-static", "QuantizeLinear", 3),
        ("int8-weights", "MatMulNBits", 0),
        ("int4-weights", "MatMulNBits", 0),
    ],
)
def test_every_product_is_quantized(
    scheme: str, operator: str, left: int, program: Program, lower: Lower
) -> None:
    file = lower(program, scheme)
    assert (file.operators()[operator], file.operators()["MatMul"]) == (3, left)
    assert file.shrinkage < 0.4


def test_weights_have_a_scale_a_channel_and_lie_within_half_a_step(
    program: Program, lower: Lower
) -> None:
    found = lower(program, "int8-dynamic").weights()
    for name in ("wide.weight", "narrow.weight", "head.weight"):
        exact = program.tensors[name].numpy().T
        codes, scales = found[f"{name}_quantized"], found[f"{name}_scale"]
        np.testing.assert_allclose(scales, np.abs(exact).max(0) / 127, rtol=1e-6)
        assert np.all(np.abs(codes * scales - exact) <= scales * 0.5001)


def test_a_table_has_a_scale_a_row(program: Program, lower: Lower) -> None:
    found = lower(program, "int8-dynamic").weights()
    exact = program.tensors["table.weight"].numpy()
    codes, scales = found["table.weight_row_int8"], found["table.weight_row_scales"]
    assert codes.dtype == np.int8
    np.testing.assert_allclose(scales, np.abs(exact).max(1, keepdims=True) / 127, rtol=1e-6)
    assert np.all(np.abs(codes * scales - exact) <= scales * 0.5001)
    assert "table.weight" not in found


def test_a_looked_up_row_is_exact_to_half_a_step(lower: Lower) -> None:
    table = nn.Embedding(50, 16)
    source = capture(nn.Sequential(table), (torch.arange(6).reshape(2, 3),))
    ids = np.array([[49, 0, 7], [7, 1, 48]])
    rows = lower(source, "int8-dynamic").run(ids)
    exact = table.weight.detach().numpy()[ids]
    assert np.all(np.abs(rows - exact) <= np.abs(exact).max(-1, keepdims=True) / 127 * 0.5001)


def simulated(x: Tensor, weight: Tensor) -> Tensor:
    """x W' with a uint8 scale for all of x, and a scale for each row of W, in seven bits."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    codes = ((x / scale).round() + zero).clamp(0, 255) - zero
    step = weight.abs().amax(1, keepdim=True) / 64
    rows = (weight / step).round().clamp(-64, 64)
    return (codes @ rows.T) * scale * step.T


def test_onnx_runtime_computes_what_torch_simulates(lower: Lower) -> None:
    """One product: sums of integers are exact, so only the scales' rounding is left."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 40)
    source = capture(nn.Sequential(layer), (torch.randn(5, 96),))
    x = torch.randn(9, 96)
    file = lower(source, "int8-dynamic", reduce_range=SEVEN_BITS)
    actual = torch.from_numpy(file.run(x.numpy()))
    expected = simulated(x, layer.weight.detach()) + layer.bias.detach()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_within_half_a_step(bits: int, lower: Lower) -> None:
    """Rows of the identity give back the dequantized weight; their own int8 form is exact."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=False)
    source = capture(nn.Sequential(layer), (torch.randn(3, 64),))
    file = lower(source, f"int{bits}-weights", block_size=16)
    (node,) = onnx.load(file.path).graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["bits"], attributes["block_size"]) == (bits, 16)
    assert attributes["accuracy_level"] == 4
    actual = file.run(np.eye(64, dtype=np.float32))
    exact = layer.weight.detach().numpy().T
    largest = np.abs(exact).reshape(4, 16, 48).max(1).repeat(16, 0)
    # A step is max / 2^(bits-1), and the largest value on the other side may be cut by one step.
    assert np.all(np.abs(actual - exact) <= largest / 2 ** (bits - 1) * 1.01)


def test_seven_bits_on_request(program: Program, lower: Lower) -> None:
    found = lower(program, "int8-dynamic", reduce_range=True).weights()
    codes = [v for k, v in found.items() if k.endswith("_quantized")]
    assert len(codes) == 3
    assert all(np.abs(c.astype(int)).max() <= 64 for c in codes)


@pytest.mark.parametrize(
    ("capabilities", "reduced", "warned"),
    [
        (["avx", "avx2"], False, True),
        (["AVX2"], False, True),
        (["avx", "avx2"], True, False),
        (["avx2", "avx512_vnni"], False, False),
        (["avx2", "avx_vnni"], False, False),
        (["asimd"], False, False),
    ],
)
def test_sums_that_overflow_on_this_cpu_are_warned_of(
    program: Program,
    lower: Lower,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capabilities: list[str],
    reduced: bool,
    warned: bool,
) -> None:
    module = sys.modules[quantize.__module__]
    monkeypatch.setattr(module, "machine", lambda: {"capabilities": capabilities})
    notes = lower(program, "int8-dynamic", reduce_range=reduced).notes
    mark = Mark("int8-dynamic", reduce_range=reduced)
    warn_of_overflow(mark, notes)
    assert not caplog.text  # what is right is right
    (drift, *_) = notes["drift"]
    warn_of_overflow(mark, {**notes, "drift": [{**drift, "error": 1.09}]})
    assert ("109 % off" in caplog.text) == warned
    assert ("reduce_range=True" in caplog.text) == warned


def test_ignored_layers_and_tables_stay_float(program: Program, lower: Lower) -> None:
    file = lower(program, "int8-dynamic", ignore=("head",), embeddings=False)
    assert file.weights()["head.weight"].dtype == np.float32
    assert file.weights()["table.weight"].dtype == np.float32
    assert file.notes["float"] == {
        "table.weight": "embeddings=False",
        "head.weight": "left in float on request",
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_table_is_quantized_with_its_projection(
    scheme: str, tied: Program, lower: Lower
) -> None:
    both = lower(tied, scheme)
    assert all(v.dtype != np.float32 or v.size < 4000 for v in both.weights().values())
    assert (both.notes["products"], both.notes["tables"]) == (3, 1)
    assert both.shrinkage < 0.6
    neither = lower(tied, scheme, embeddings=False)
    assert neither.notes["products"] == 2
    assert list(neither.notes["float"]) == ["table.weight"]


def test_costly_layers_stay_float_until_the_error_holds(lower: Lower) -> None:
    """In one weight every row has an outlier, which nothing reads, and so its steps are coarse."""
    torch.manual_seed(0)
    first, second, third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)
    with torch.no_grad():
        second.weight[:, 0] = 30.0
        first.weight[0] = 0.0
        first.bias[0] = -1.0  # this unit never fires
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    source = capture(net, (torch.randn(16, 64),))
    options = {"reduce_range": SEVEN_BITS}
    assert lower(source, "int8-dynamic", **options).notes["drift"][0]["error"] > 0.05
    kept = lower(source, "int8-dynamic", keep_error=0.05, **options)
    assert list(kept.notes["float"]) == ["2.weight"]
    assert kept.notes["drift"][0]["error"] <= 0.05
    alone = kept.notes["error_alone"]
    assert max(alone, key=alone.__getitem__) == "2.weight"
    with pytest.raises(ExportError, match="leaves nothing to quantize"):
        lower(source, "int8-dynamic", keep_error=1e-9, **options)


def test_an_artifact_holds_the_dense_twin_in_both_forms(program: Program, tmp_path: Path) -> None:
    quantized = marked(program, "int8-dynamic", reduce_range=SEVEN_BITS)
    artifact = export(quantized, tmp_path / "out", baseline=program)
    manifest = artifact.manifest
    assert manifest["precision"]["onnx"] == "int8-dynamic"
    assert all(a["error"] <= 1e-4 for a in manifest["parity"][MODEL])
    assert manifest["sizes"][MODEL] < 0.4 * manifest["sizes"]["baseline.onnx"]
    assert manifest["quantization"].keys() == {MODEL, "baseline-int8.onnx"}
    assert manifest["quantization"][MODEL]["drift"][0]["cosine"] > 0.99
    result = artifact.benchmark({"ids": torch.randint(300, (2, 5))}, "dense,int8", repeats=2)
    assert list(result.others) == ["int8"]
    assert result.others["int8"].model == result.model
    assert json.loads(json.dumps(result.to_json()))["others"]["int8"]["rounds"] == 2
    assert load(artifact.path / "program").quantization is not None


def test_a_float_artifact_can_be_measured_against_int8(program: Program, tmp_path: Path) -> None:
    artifact = export(program, tmp_path / "out", baseline=program)
    assert sorted(p.name for p in artifact.path.glob("*.onnx")) == ["baseline.onnx", MODEL]
    batch = {"ids": torch.randint(300, (2, 5))}
    result = artifact.benchmark(batch, "dense,int8,int4-weights", repeats=2)
    assert list(result.others) == ["int8", "int4-weights"]
    for name, message in {
        "int9": "did you mean",
        "int8-static": "needs calibration",
        "nowhere": "no such folder",
    }.items():
        with pytest.raises(GraphPruneError, match=message):
            artifact.benchmark(batch, name, repeats=1)


def test_measure_measures_what_is_exported(program: Program) -> None:
    assert 0 < measure(marked(program, "int8-dynamic"), repeats=2) < 100


def test_static_ranges_need_batches_at_export(program: Program, tmp_path: Path) -> None:
    static = marked(program, "int8-static")
    none: tuple[list[Any] | None, ...] = (None, [])
    for given in none:
        with pytest.raises(ExportError, match="there are none"):
            export(static, tmp_path / "out", calibration=given)
    with pytest.raises(GraphPruneError, match="calibration batch 0"):
        export(static, tmp_path / "out", calibration=[{"x": torch.zeros(1, 2)}])
    assert list(tmp_path.iterdir()) == []


def test_batches_that_are_not_finite_are_refused(captured: Captured, tmp_path: Path) -> None:
    static = marked(captured("tiny-mlp"), "int8-static")
    batches = [{"x": torch.full((2, 12), float("nan"))}]
    with pytest.raises(ExportError, match="batch 0: 'x' holds NaN"):
        export(static, tmp_path / "out", calibration=batches)


def test_a_target_without_the_operators_is_named(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "graphprune.exporters.artifact.export.TARGETS",
        {"onnxruntime": ("int8-dynamic",), "other": ("int4-weights",)},
    )
    with pytest.raises(ExportError, match=r"'onnxruntime' has no operators.*\['other'\] run"):
        export(marked(program, "int4-weights"), tmp_path / "out")


def test_a_runtime_that_cannot_run_it_is_named(
    program: Program, lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as module

    class Wrong(module.MatMulNBitsQuantizer):  # type: ignore[misc]
        def process(self) -> None:
            super().process()
            for node in self.model.model.graph.node:
                node.op_type = node.op_type.replace("MatMulNBits", "MatMulOfTomorrow")

    monkeypatch.setattr(module, "MatMulNBitsQuantizer", Wrong)
    with pytest.raises(ExportError, match=r"onnxruntime \S+ cannot run what scheme 'int4-weights'"):
        lower(program, "int4-weights")


def test_nothing_to_quantize_is_an_error(captured: Captured, lower: Lower) -> None:
    with pytest.raises(ExportError, match="finds nothing to quantize among 3"):
        lower(captured("tiny-mlp"), "int8-dynamic", ignore=("layers",))


def test_the_log_stays_as_it_was(program: Program, lower: Lower) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable)
    lower(program, "int4-weights")
    lower(program, "int8-dynamic")
    assert (list(root.handlers), root.level, root.manager.disable) == before


def test_large_weights_go_to_a_second_file(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = export(marked(program, "int8-dynamic"), tmp_path / "small", baseline=program)
    for module in ("onnx.files.BESIDE_ABOVE", "quantize.quantize._LARGE"):
        monkeypatch.setattr(f"graphprune.exporters.{module}", 1000)
    large = export(marked(program, "int8-dynamic"), tmp_path / "large", baseline=program)
    names = {f"{name}.onnx_data" for name in ("model", "baseline", "baseline-int8")}
    assert {p.name for p in large.path.glob("*_data")} == names
    ids = {"ids": np.arange(6).reshape(2, 3)}
    for one, other in (
        (small.session(1), large.session(1)),
        (small.baseline_session(1), large.baseline_session(1)),
    ):
        np.testing.assert_allclose(one.run(None, ids)[0], other.run(None, ids)[0], atol=1e-6)


def test_convolutions_are_quantized_with_static_ranges(captured: Captured, lower: Lower) -> None:
    file = lower(captured("tiny-cnn"), "int8-static")
    assert file.notes["float"] == {}
    assert file.shrinkage < 0.5


def test_layers_know_their_weights(program: Program, float_file: Callable[[Program], Path]) -> None:
    found = find_layers(onnx.load(float_file(program)))
    assert [(layer.weight, layer.kind) for layer in found] == [
        ("table.weight", "embedding"),
        ("wide.weight", "matmul"),
        ("narrow.weight", "matmul"),
        ("head.weight", "matmul"),
    ]


def test_half_precision_programs_are_quantized_from_float32(
    program: Program, tmp_path: Path
) -> None:
    half = program.cast(torch.float32, torch.bfloat16)
    artifact = export(marked(half, "int8-dynamic"), tmp_path / "out")
    assert artifact.manifest["quantization"][MODEL]["products"] == 3
