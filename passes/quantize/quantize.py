"""Quantize: choose how the exported model stores and multiplies its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.ir.quantization import SCHEMES, Mark
from graphprune.passes.name_patterns import check_names, check_patterns, matches, refuse_unmatched
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.suggest import suggest
from graphprune.validate import check_number, check_whole

_BLOCKS = (16, 32, 64, 128, 256)  # what ONNX Runtime's MatMulNBits takes


@register
@final
@dataclass(frozen=True, slots=True)
class Quantize(Pass):
    """Mark the program: export writes its matrices, and its lookup tables, in few bits.

    The program itself stays as it is, in float; `compile(...).module` computes as before. ONNX
    Runtime, MiniLM-L6 at 1 x 128 tokens on one thread: int8-dynamic 2.5 times as fast, the file a
    quarter (`python -m benchmarks.quantized`).

    1. "int8-dynamic": for encoders and most else. Needs no data.
    2. "int8-static": ranges of activations from calibration, which export reads once more. Also
       quantizes convolutions, which the other schemes leave in float.
    3. "int4-weights", "int8-weights": for decoders that generate token after token and wait for
       memory; about as slow as float for whole sequences.

    Attention's own products, normalizations and sums stay float. Pruning comes before, never after.

    Attributes:
        scheme: one of the four above.
        ignore: name patterns of weights to leave in float. Globs for a name or a module, or "re:"
            and a regular expression.
        targets: name patterns; only these weights are quantized.
        embeddings: whether lookup tables become int8 too, with a scale a row. A table that is also
            an output projection is quantized with it, or both stay float.
        keep_error: largest relative error of the outputs, ||quantized - float|| / ||float||.
            Export then measures every layer alone, a session each (a minute or two for a model of
            36 products), and leaves the costliest in float until it holds.
        block_size: weights that share a scale in the weights-only schemes: 16, 32, 64, 128 or 256.
        reduce_range: seven bits for int8 weights. x86 CPUs without VNNI (AMD before Zen 4, most of
            Intel's before 2019) add pairs of products in 16 bits, which overflow with eight bits:
            little in most encoders, ruinously in some language models. Export warns of it.
    """

    name: ClassVar[str] = "quantize"
    preserves: ClassVar[Invariant] = Invariant.ALL
    idempotent: ClassVar[bool] = True
    without_data: ClassVar[str] = "scheme='int8-dynamic'"

    scheme: str
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    embeddings: bool = True
    keep_error: float | None = None
    block_size: int = 32
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str) or self.scheme not in SCHEMES:
            raise RecipeError(
                f"there is no quantization scheme {self.scheme!r}; "
                f"{suggest(str(self.scheme), SCHEMES)}"
            )
        for option in ("ignore", "targets"):
            check_patterns(option, getattr(self, option))
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.keep_error is not None:
            rule = "a relative error above 0 such as 0.01, or null"
            check_number("keep_error", self.keep_error, rule, low=0, open_low=True)
        rule = "a power of two from 16"
        check_whole("block_size", self.block_size, rule, low=16)
        if self.block_size.bit_count() > 1:
            raise RecipeError(f"block_size must be {rule}, got {self.block_size!r}")

    @property
    def needs_calibration(self) -> bool:
        """Whether export will need calibration batches."""
        return self.scheme == "int8-static"

    def check(self, program: Program) -> None:
        check_names(self, program)

    def quantization(self, program: Program) -> Mark:
        weights = _weights(program)
        return Mark(
            self.scheme,
            tuple(sorted(name for name, known in weights.items() if not self._takes(known))),
            self.embeddings,
            self.keep_error,
            self.block_size,
            self.reduce_range,
        )

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Mark the program.

        Raises:
            RecipeError: a pattern matches no weight, or there is no calibration but the scheme
                needs it.
        """
        if self.needs_calibration and ctx.calibration is None:
            raise RecipeError(
                "scheme 'int8-static' takes the activations' ranges from calibration batches: give "
                "compile(..., calibration=batches), or take 'int8-dynamic', which needs none"
            )
        weights = _weights(program)
        for option in ("ignore", "targets"):
            names = [name for known in weights.values() for name in known]
            refuse_unmatched(option, getattr(self, option), names)
        mark = self.quantization(program)
        report = {"scheme": self.scheme, "weights": len(weights), "float": list(mark.ignored)}
        old = program.quantization
        if old == mark:
            return PassResult(program, False, report)
        if old is not None:
            report["replaced"] = old.to_json()
        marked = replace(program, quantization=mark)
        return PassResult(marked, True, report)

    def _takes(self, names: list[str]) -> bool:
        def hit(patterns: tuple[str, ...]) -> bool:
            return any(matches(pattern, name) for pattern in patterns for name in names)

        return not hit(self.ignore) and (not self.targets or hit(self.targets))


def _weights(program: Program) -> dict[str, list[str]]:
    """Tensors that may be weights of a product or a table, each with all its names."""
    found = {
        name: [name]
        for name, tensor in program.tensors.items()
        if tensor.is_floating_point() and tensor.dim() >= 2
    }
    for alias, name in program.aliases.items():
        if name in found:
            found[name].append(alias)
    return found
