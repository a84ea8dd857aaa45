"""A device kit of sparse products: what their forms take on another machine."""

from __future__ import annotations

from pathlib import Path

from graphprune.errors import GraphPruneError
from graphprune.exporters.kernels.choose import (
    groups_of,
    key_of,
    name_of,
    variants_of,
    write_variant,
)
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import file_bytes
from graphprune.exporters.quantize.layers import find_layers
from graphprune.exporters.runtime.device_kit import BITS, SCRIPT, finish_kit, is_kit
from graphprune.exporters.runtime.latency import File
from graphprune.exporters.runtime.session import Feeds
from graphprune.ir.program import Program
from graphprune.pipeline.device import Progress
from graphprune.storage.folders import check_target, whole_folder


def write_forms_kit(
    program: Program,
    folder: Path,
    feeds: Feeds,
    *,
    threads: int = 1,
    progress: Progress = lambda done, total, unit: None,
) -> Path:
    """Write a kit that times the products of a program that have zeros, in every form.

    On the device it needs graphprune-kernels beside numpy and onnxruntime.

    Args:
        program: marked for quantization; its deployed entry is taken.
        folder: where to; a kit that was there before is replaced as a whole, or not at all.
        feeds: inputs of that entry, at whose sizes layers are timed.
        threads: that the script takes without --threads.
        progress: called with how many are done, of how many, of what.

    Returns:
        The script.

    Raises:
        GraphPruneError: the program is not marked, or no product has zeros.
    """
    import onnx_ir as ir

    mark = program.quantization
    if mark is None:
        raise GraphPruneError("a kit of sparse products is of a model that was quantized")
    check_target(folder, is_kit)
    model = ir.to_proto(to_onnx(program, program.deployed))
    layers = [layer for layer in find_layers(model) if mark.takes(layer.weight)]
    variants = {
        key_of(group, variant, BITS, mark): (group, variant)
        for group in groups_of(model, layers, feeds)
        for variant in variants_of(group)
    }
    if not variants:
        raise GraphPruneError(
            "no product of this model has zeros, so there is nothing to time: zero blocks first, "
            "such as Magnitude(0.5, pattern='32x4')"
        )
    with whole_folder(folder) as fresh:
        files = {}
        for number, (key, (group, variant)) in enumerate(variants.items(), 1):
            path = fresh / f"{key}.onnx"
            fed = write_variant(group, variant, path, BITS, mark)
            files[key] = File(path, fed, file_bytes(path))
            progress(number, len(variants), "models")
        finish_kit(
            fresh,
            files,
            {key: [name_of(*pair)] for key, pair in variants.items()},
            model=program.model,
            mark=mark,
            threads=threads,
            library=True,
        )
    return folder / SCRIPT
