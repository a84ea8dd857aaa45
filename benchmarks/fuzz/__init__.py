"""Random models, random cuts: is the shrunk model the model without those units?

    python -m benchmarks.fuzz --graphs N --seed S [--minutes M] [--ort K] [--workers W]

A graph is drawn from its seed and number: some steps (attention, convolutions, norms, slices,
in-place writes, lookups, …) over a sequence or an image, written as the source of an nn.Module.
Its parameters, buffers and inputs are random, everything is float64. It is captured; every free
axis group, that is neither frozen nor normalized, may lose units;
`graphprune.rewrite.shrink.shrink` removes them; and the result is compared at up to four shapes and
two scales of the inputs.

graphprune's own reference (`rewrite.shrink.mask`) is not used, because it shares its axis facts
with the rewrite. What is taken from graphprune is only which slices of which parameters are to go.
From there two oracles say what is left:

absence         The captured graph is run by an interpreter in `absence`, which carries beside every
                value what of it is absent, and leaves absent terms out of sums. How absence passes
                through an operator follows from torch: tags of elementwise operators, and what
                changes when absent elements are filled otherwise. Means keep their denominators.
                It is defined for every cut but one: where weights alone are summed and several axes
                are cut at once (whether to cut such a sum depends on the axis, see there). Those
                are counted as skipped.
zeroed weights  Plain torch, no graph: the nn.Module itself, with the slices of removed units zero
                in every parameter and buffer. It is defined where that removes them: the step that
                writes a model notes where units are summed that have no weights at that place and
                may be other than zero (exp, a constant added), or where weights alone are summed.
                Models with a cache are left out.

Beside cuts, the captured graph must be the model at every shape, keeping all units must give the
same graph over the same tensors, and with `--ort K` the first K graphs run in ONNX Runtime after a
cut, within what torch itself errs in float32. An exception other than a refusal (CaptureError, or
UnsupportedError from capture) is a failure too. A failure is made smaller step by step and printed
as a module.
"""
