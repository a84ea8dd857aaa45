"""How long sessions take: interleaved runs, by the wall clock or by one thread's CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal, final

import numpy as np

from graphprune.exporters.runtime.kv_cache import Feeds, filled, shapes_of

Clock = Literal["wall", "cpu"]

_CLOCKS: dict[str, Callable[[], int]] = {
    "wall": time.perf_counter_ns,
    # Of the calling thread: with one thread ORT computes in it, so other programs do not count.
    "cpu": time.thread_time_ns,
}


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
    """Two models measured in turns.

    Attributes:
        model: the model in question.
        against: what it is compared with.
        ratio: how many times faster the model is, median over rounds.
        ratio_low: lower quartile of the rounds' ratios; `ratio_high` the upper.
        rounds: how often the turn went round; `runs` is how often a model ran in each round.
        threads: within operators.
        clock: "wall", or "cpu" for the CPU time of one thread.
        shapes: of the inputs.
        others: further opponents of the same rounds, by name.
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
    """Time two sessions in turns, A B A B …, so that what slows the machine slows both.

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
    first, *rest = interleaved(sessions, feeds, repeats=repeats, runs=runs, clock=clock)
    found: dict[str, Comparison] = {}
    for name, times in zip(against, rest, strict=True):
        ratios = [b / a for a, b in zip(first, times, strict=True)]
        found[name] = Comparison(
            model=_timing(first),
            against=_timing(times),
            ratio=median(ratios),
            ratio_low=_quantile(ratios, 0.25),
            ratio_high=_quantile(ratios, 0.75),
            rounds=repeats,
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
    now = _CLOCKS[clock]
    result: list[list[float]] = [[] for _ in sessions]
    own = [filled(shapes_of(session), feeds) for session in sessions]
    for session, fed in zip(sessions, own, strict=True):
        for _ in range(2):
            session.run(None, fed)
    for _ in range(max(1, repeats)):
        for times, session, fed in zip(result, sessions, own, strict=True):
            fastest = min(_once(session, fed, now) for _ in range(max(1, runs)))
            times.append(fastest / 1e6)
    return result


def _once(session: Any, feeds: Feeds, now: Callable[[], int]) -> int:
    start = now()
    session.run(None, feeds)
    return now() - start


def _timing(times: Sequence[float]) -> Timing:
    return Timing(median(times), _quantile(times, 0.25), _quantile(times, 0.75))


def _quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(np.asarray(values), q))
