"""The fastest model within a maximum loss, by bisection over speed-ups."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from graphprune.errors import UnsupportedError
from graphprune.ir.module import ProgramModule
from graphprune.passes.budget.choose import Reached, Work
from graphprune.pipeline.base import PassResult
from graphprune.training.outcome import Drop, Outcome, paired_drop

log = logging.getLogger(__name__)

ROUNDS = 6  # of bisection: the speed-up is then known to a 64th of the range, in logarithms


def largest_within(work: Work, max_drop: float, task: Callable[[Any], Outcome]) -> PassResult:
    """Bisect speed-ups between the dense model and the least that there can be.

    A model is kept where the upper bound of its drop is at most `max_drop`.
    """
    dense = task(ProgramModule(work.program))
    low, high = 1.0, work.fastest()
    best: tuple[Reached, Drop] | None = None
    tried: list[str] = []
    for i in range(ROUNDS):
        work.ctx.progress(i, ROUNDS, "budgets")
        speedup = (low * high) ** 0.5
        try:
            reached = work.choose({"speedup": speedup})
        except UnsupportedError as e:  # found by measuring
            tried.append(f"{speedup:.2f}x: {e}")
            high = speedup
            continue
        drop = paired_drop(dense, task(ProgramModule(reached.program)), seed=work.ctx.seed)
        tried.append(f"{speedup:.2f}x: {drop.summary}")
        if drop.upper <= max_drop:
            low, best = speedup, (reached, drop)
        else:
            high = speedup
    work.ctx.progress(ROUNDS, ROUNDS, "budgets")
    if best is None:
        sentence = (
            f"nothing was removed: already at {high:.2f}x the bound of the "
            f"drop is above {max_drop:g}; allow more, or give more items to decide by"
        )
        log.warning("%s", sentence)
        return work.unchanged({"max_drop": max_drop}, [sentence, *tried])
    reached, drop = best
    report = replace(reached.report, asked={"max_drop": max_drop}, drop=drop)
    return work.result(replace(reached, report=report), tried)
