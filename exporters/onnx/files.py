"""ONNX files on disk: the graph, and its weights inside or beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import ExportError
from graphprune.storage.shared import Weights

if TYPE_CHECKING:
    import onnx_ir as ir

# "beside": ONNX Runtime maps the file instead of parsing and copying it, so that the model loads
# faster and its weights are memory that processes share. "inside": one file, for what opens one.
WEIGHTS = ("auto", "beside", "inside")
BESIDE_ABOVE = 20_000_000  # bytes of weights, with "auto"
INSIDE_BELOW = 2_000_000_000  # protobuf's limit is 2 GiB


def data_file(path: Path) -> Path:
    """Where the weights beside an ONNX file are: model.onnx_data, as web runtimes look for it."""
    return path.with_name(f"{path.name}_data")


def save_onnx(model: ir.Model, path: Path, weights: str = "auto") -> None:
    """Write and check a model.

    Args:
        model: what to write.
        path: the ONNX file; its weights may go to `data_file(path)`.
        weights: "beside", "inside", or "auto": beside above 20 MB.

    Raises:
        ExportError: the weights do not fit inside, or onnx.checker refuses the file.
    """
    import onnx
    import onnx_ir as ir

    size = weight_bytes(model)
    if weights == "inside" and size > INSIDE_BELOW:
        raise ExportError(
            f"{size / 1e9:.1f} GB of weights do not fit inside an ONNX file, which ends at 2 GB: "
            "take weights='beside'"
        )
    path.unlink(missing_ok=True)
    data_file(path).unlink(missing_ok=True)
    if weights == "beside" or (weights == "auto" and size > BESIDE_ABOVE):
        ir.save(model, path, external_data=data_file(path).name)
    else:
        ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as e:
        raise ExportError(f"the exported file is not valid ONNX: {e}") from e


def copy_onnx(source: Path, target: Path) -> None:
    """Copy an ONNX file and what lies beside it: the file names its weights' file."""
    import onnx_ir as ir

    weights = "beside" if len(files_of(source)) > 1 else "inside"
    save_onnx(ir.load(source), target, weights)


def weights_of(root: Path, file: str) -> Weights | None:
    """The float32 weights beside an ONNX file in a folder; None where there are none beside."""
    import onnx

    path = root / file
    if not data_file(path).is_file():
        return None
    places = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type == onnx.TensorProto.FLOAT and "location" in where:
            places.append((int(where.get("offset", 0)), int(where["length"])))
    return Weights(root, f"{file}_data", tuple(places))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a model's weights."""
    weights = [v.const_value for v in model.graph.initializers.values()]
    return sum(int(w.nbytes) for w in weights if w is not None)


def files_of(path: Path) -> list[Path]:
    """An ONNX file, and the file of its weights where there is one; also by its older name."""
    beside = [data_file(path), path.with_suffix(".onnx.data")]
    return [path, *(file for file in beside if file.is_file())]


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of its weights beside it."""
    return sum(file.stat().st_size for file in files_of(path))
