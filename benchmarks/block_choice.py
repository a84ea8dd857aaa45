"""How blocks of a matrix are chosen and compensated, and what that costs in output error.

Matrices of all-MiniLM-L6-v2's third layer, 32x4 blocks, calibrated on 256 sentences of the STS
Benchmark's training part; Σ |ΔW x|² / Σ |W x|² over their tokens:

- magnitude: the smallest blocks go, nothing compensates;
- sweep: SparseGPT from left to right, columns to the right compensate;
- its choice, exact: the sweep's blocks, and all that stays compensates;
- exact: the blocks too by exact costs, one after another (structured OBS), as the passes do.

Seconds are CPU time. $GRAPHPRUNE_DATA names the folder that holds stsb/.

    python -m benchmarks.block_choice [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

import graphprune
from benchmarks.common import Row, Settings, data_folder, main
from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites
from graphprune.calibration.stream import Stream
from graphprune.models import load_model
from graphprune.models.data.calibration import calibration_batches
from graphprune.passes.solvers.block_obs import fitted_blocks
from graphprune.passes.solvers.sparsegpt import Inputs, output_error, sparsegpt, swept
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_mask

PATTERN = parse_pattern("32x4")
LAYER = "layer.2."
SITES = ("attention.self.query", "intermediate.dense", "output.dense")
SENTENCES, DAMPING = 256, 0.01


def measure(settings: Settings) -> Iterator[Row]:
    """A row for each matrix and sparsity."""
    loaded = load_model("minilm")
    names = list(loaded.example_inputs)
    file = data_folder("stsb/train.tsv") / "train.tsv"
    batches = calibration_batches(file, names, loaded.tokenizer_dir, SENTENCES)
    program = graphprune.compile(
        loaded.module, [], example_inputs=dict(loaded.example_inputs)
    ).program
    every = {s.tensor.partition(LAYER)[2]: s for s in linear_sites(axis_groups(program))}
    sites = [every[f"{name}.weight"] for name in SITES[: 1 if settings.quick else None]]
    for site, moments in zip(sites, Stream(program, batches).moments(program, sites), strict=True):
        weight, gram = site.matrix(program).double(), moments.matrix
        inputs = Inputs.of(gram, DAMPING)
        for zeros in (0.5, 0.8):
            gone = removed_mask(weight.abs(), zeros, PATTERN, per_row=False)
            start = time.process_time()
            right = swept(weight.clone(), inputs, zeros, PATTERN)
            middle = time.process_time()
            exact = sparsegpt(weight, inputs, zeros, PATTERN)
            end = time.process_time()
            errors = {
                "magnitude": weight.masked_fill(gone, 0),
                "sweep": right,
                "its choice, exact": fitted_blocks(weight, inputs.gram, right == 0, PATTERN),
                "exact": exact,
            }
            yield {
                "matrix": f"{site.tensor} {weight.shape[0]} x {weight.shape[1]}",
                "zeros": f"{zeros:.0%}",
                **{k: f"{output_error(weight, v, gram):.3g}" for k, v in errors.items()},
                "sweep s": middle - start,
                "exact s": end - middle,
            }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main("block_choice", measure)
