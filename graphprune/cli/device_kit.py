"""`graphprune device-kit`: a folder that times a model's parts on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.app import (
    Batch,
    Json,
    Model,
    Pickle,
    Quantization,
    ReduceRange,
    Target,
    Threads,
    print_json,
    stdout_console,
)
from graphprune.cli.early import check_choice
from graphprune.cli.names import KERNELS, TARGETS
from graphprune.cli.sizes import parse_batch
from graphprune.errors import GraphPruneError
from graphprune.storage.folders import check_writable

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.passes import Quantize


def device_kit_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    quantize: Quantization = "",
    reduce_range: ReduceRange = False,
    target: Target = TARGETS[0],
    batch: Batch = "",
    threads: Threads = 1,
    cache: Annotated[
        bool, typer.Option("--cache", help="A decoder with its key/value cache.")
    ] = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Write a folder that times a model's parts on another machine.

    It holds small models and a script, which needs onnxruntime and numpy alone: copy the folder,
    run `python kit/measure.py > device.json` there, and give the file to `graphprune compile
    --device`. With --target onnxruntime+kernels, and of an artifact with quantized zeros, it times
    sparse products too, and needs graphprune-kernels there.
    """
    check_choice("target", target, TARGETS)
    sizes = parse_batch(batch)
    check_writable(out.expanduser())

    # From here on torch is imported.
    from graphprune.cli.subject import opened
    from graphprune.exporters.runtime.device_kit import is_kit
    from graphprune.passes import Quantize
    from graphprune.storage.folders import check_target

    check_target(out.expanduser(), is_kit)
    last = Quantize(quantize, reduce_range=reduce_range) if quantize else None
    with opened(model, allow_pickle) as (subject, display):
        with display.step("capture"):
            start = subject.captured(cache)
        with display.step("write") as advance:
            count = write_kit_of(
                start.program, out, sizes, last, threads, advance, blocks=target == KERNELS
            )
    if as_json:
        print_json({"model": model, "path": str(out), "models": count})
        return
    stdout_console().print(
        f"{count} models written to {out}/; on the device:\n"
        f"  python {out}/measure.py > device.json",
        soft_wrap=True,
        markup=False,
    )


def write_kit_of(
    program: Program,
    out: Path,
    sizes: tuple[int, ...],
    last: Quantize | None,
    threads: int,
    progress: Any,
    *,
    blocks: bool = False,
) -> int:
    """Write what is timed elsewhere; how many models they are.

    1. Of a float program: what a budget would measure.
    2. Of a quantized one: the forms of its products with zeros.

    Raises:
        GraphPruneError: it is quantized otherwise than `last` says, or no product has zeros.
    """
    from graphprune.cli.sizes import timed_sizes
    from graphprune.exporters.kernels.choose import timed_feeds
    from graphprune.exporters.kernels.kit import write_forms_kit
    from graphprune.exporters.runtime.device_kit import write_kit

    def advanced(done: int, total: int, unit: str) -> None:
        progress(done, total)

    timed, mark = timed_sizes(program, sizes), program.quantization
    if mark is None:
        models, inputs = _measured(program, timed, last, threads, blocks)
        write_kit(models, out, inputs=inputs, threads=threads, progress=advanced)
        return len({id(model) for model in models.values()})
    if last is not None and (last.scheme, last.reduce_range) != (mark.scheme, mark.reduce_range):
        raise GraphPruneError(
            f"the model is quantized by {mark.scheme} already: leave --quantize and --reduce-range "
            "out"
        )
    feeds = timed_feeds(program, timed)
    script = write_forms_kit(program, out, feeds, threads=threads, progress=advanced)
    return len(list(script.parent.glob("*.onnx")))


def _measured(
    program: Program, sizes: tuple[int, ...], last: Quantize | None, threads: int, blocks: bool
) -> Any:
    """The models that a budget measures, by name, and their inputs."""
    from graphprune.ir.quantization import PATTERNS
    from graphprune.passes import Budget
    from graphprune.passes.budget.sized import named_models, sized_for

    mark = None if last is None else last.quantization(program)
    options = Budget(speedup=2, batch=sizes, threads=threads, blocks=PATTERNS[0] if blocks else "")
    return named_models(sized_for(options, program, mark))
