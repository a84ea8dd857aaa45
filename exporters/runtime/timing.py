"""How long models take: interleaved runs, by the wall clock or by one thread's CPU time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, final

import numpy as np

from graphprune.errors import GraphPruneError
from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.kv_cache import Feeds, filled, shapes_of
from graphprune.exporters.runtime.probe import CLOCKS as _CLOCKS
from graphprune.exporters.runtime.probe import one_round, warm_up
from graphprune.exporters.runtime.session import DEFAULT, TUNED

Clock = Literal["wall", "cpu"]


@final
@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run: median and quartiles, over rounds, of each round's fastest."""

    ms: float
    low: float
    high: float


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models measured interleaved.

    Attributes:
        model: the model in question.
        against: what it is compared with.
        ratio: how many times faster the model is, median over rounds.
        ratio_low: lower quartile of the rounds' ratios; `ratio_high` the upper.
        rounds: number of rounds; `runs` is how often a model ran in each round.
        threads: within operators.
        clock: "wall", or "cpu" for the CPU time of one thread.
        shapes: of the inputs.
        others: further opponents of the same rounds, by name.
        default: the same models in the same rounds, opened with ONNX Runtime's default options;
            None where one set of options was timed.
    """

    model: Timing
    against: Timing
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    runs: int
    threads: int
    clock: str
    shapes: Mapping[str, tuple[int, ...]]
    others: Mapping[str, Comparison] = field(default_factory=dict)
    default: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(
    model: Any,
    against: Any,
    feeds: Feeds,
    *,
    threads: int = 1,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock | None = None,
) -> Comparison:
    """Time two sessions interleaved, A B A B …, so that what slows the machine slows both.

    Args:
        model: the session in question.
        against: the session to compare with.
        feeds: inputs for both; of a decoder's cache, both have their own.
        threads: how many threads the sessions were opened with; recorded.
        repeats: rounds.
        runs: runs of each session in a round, of which the fastest counts.
        clock: by default `default_clock(threads)`.
    """
    return compare_all(
        model,
        {"against": against},
        feeds,
        threads=threads,
        repeats=repeats,
        runs=runs,
        clock=clock,
    )


def compare_all(
    model: Any,
    against: Mapping[str, Any],
    feeds: Feeds,
    *,
    threads: int = 1,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock | None = None,
) -> Comparison:
    """Like `compare`, with several opponents in the same rounds: the first, the rest as others."""
    clock = clock or default_clock(threads)
    sessions = [model, *against.values()]
    times = interleaved(sessions, feeds, repeats=repeats, runs=runs, clock=clock)
    return _comparison(times, against, feeds, runs, threads, clock)


def compare_files(
    model: Path,
    against: Mapping[str, Path],
    feeds: Feeds,
    *,
    threads: int = 1,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock | None = None,
) -> Comparison:
    """Like `compare_all`, for ONNX files, in two processes of their own, interleaved too.

    In one, sessions have the options that docs/deploy.md names; in the other ONNX Runtime's own,
    which is what the result's `default` compares.

    Raises:
        GraphPruneError: a file does not load or run, or takes inputs that the model does not.
    """
    clock = clock or default_clock(threads)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(child([model, *against.values()], threads, config))
            for config in (TUNED, DEFAULT)
        ]
        for name, shapes in zip(against, processes[0].inputs[1:], strict=True):
            strange = sorted(shapes.keys() - feeds.keys())
            if strange:
                raise GraphPruneError(
                    f"{name!r} takes inputs {strange} that {str(model)!r} does not: only forms of "
                    "one model can be measured against each other"
                )
        for process in processes:
            process.warm_up(feeds)
        rounds = [[p.round(runs, clock) for p in processes] for _ in range(max(1, repeats))]
    tuned, default = (
        _comparison(zip(*times, strict=True), against, feeds, runs, threads, clock)
        for times in zip(*rounds, strict=True)
    )
    return replace(tuned, default=default)


def _comparison(
    times: Iterable[Sequence[float]],
    against: Iterable[str],
    feeds: Feeds,
    runs: int,
    threads: int,
    clock: str,
) -> Comparison:
    """The first model's times, a round each, beside those of its opponents."""
    first, *rest = times
    found: dict[str, Comparison] = {}
    for name, theirs in zip(against, rest, strict=True):
        ratios = [b / a for a, b in zip(first, theirs, strict=True)]
        found[name] = Comparison(
            model=_timing(first),
            against=_timing(theirs),
            ratio=median(ratios),
            ratio_low=_quantile(ratios, 0.25),
            ratio_high=_quantile(ratios, 0.75),
            rounds=len(first),
            runs=runs,
            threads=threads,
            clock=clock,
            shapes={name: tuple(array.shape) for name, array in feeds.items()},
        )
    main, *others = found
    return replace(found[main], others={name: found[name] for name in others})


def default_clock(threads: int) -> Clock:
    """CPU time of one thread, which other programs do not slow; of more, only the wall clock."""
    return "cpu" if threads == 1 else "wall"


def interleaved(
    sessions: Sequence[Any],
    feeds: Feeds,
    *,
    repeats: int = 20,
    runs: int = 3,
    clock: Clock = "wall",
) -> list[list[float]]:
    """For each session, each round's fastest run in milliseconds."""
    own = [filled(shapes_of(session), feeds) for session in sessions]
    for session, fed in zip(sessions, own, strict=True):
        warm_up(session, fed)
    rounds = [one_round(sessions, own, runs, _CLOCKS[clock]) for _ in range(max(1, repeats))]
    return [list(times) for times in zip(*rounds, strict=True)]


def _timing(times: Sequence[float]) -> Timing:
    return Timing(median(times), _quantile(times, 0.25), _quantile(times, 0.75))


def _quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(np.asarray(values), q))
