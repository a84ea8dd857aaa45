"""Draw graphs at random, and write them: graph number i of a seed is always the same one."""

from __future__ import annotations

import random

from benchmarks.fuzz.activations import CONSTANT, ZERO
from benchmarks.fuzz.images import IMAGE_STEPS
from benchmarks.fuzz.source import IMAGE, SEQUENCE, Builder, Choices, Graph, Source, Step
from benchmarks.fuzz.steps import SEQUENCE_STEPS

FEATURES = 5  # of a sequence's input
COLORS = 3
CLASSES = 3
# Constructs left out, by the kind of step: put one here while its repair is on the way.
SWITCHED_OFF: frozenset[str] = frozenset()


def draw(seed: int, number: int) -> Graph:
    """The graph of this number, whatever else is drawn."""
    rng = random.Random(f"{seed}/{number}")
    domain = IMAGE if rng.random() < 0.3 else SEQUENCE
    kinds = []
    current = domain
    for _ in range(rng.choice((1, 1, 2, 2, 2, 3, 3, 4))):
        table = _table(current)
        kinds.append(rng.choices(list(table), [w for _, w in table.values()])[0])
        current = SEQUENCE if kinds[-1] == "tokens" else current
    steps = tuple(
        Step(kind, rng.choice((2, 2, 3, 4)), _activation(rng), rng.randrange(1, 2**16))
        for kind in kinds
    )
    width, batch = rng.choice((4, 6, 8, 12)), rng.choice((2, 3, 4))
    length = rng.choice((4, 6) if domain == IMAGE else (2, 3, 4, 5, 6, 8))
    # Symbolic sizes make everything twice as slow, and most errors show at any one shape.
    dynamic = rng.random() < 0.5
    return Graph(domain, width, batch, length, dynamic, steps, rng.randrange(2**31))


def _activation(rng: random.Random) -> str:
    drawn = rng.random()
    if drawn < 0.4:
        return rng.choice(ZERO[:4])
    return rng.choice(ZERO) if drawn < 0.75 else rng.choice(CONSTANT)


def _table(domain: str) -> dict[str, tuple[Builder, float]]:
    table = IMAGE_STEPS if domain == IMAGE else SEQUENCE_STEPS
    return {name: entry for name, entry in table.items() if name not in SWITCHED_OFF}


def write(graph: Graph) -> Source:
    """The module of a graph, without steps that no longer fit because one before them went."""
    b = Source(graph.domain, graph.width, graph.length)
    if graph.domain == IMAGE:
        b.inputs["x"] = "float", ("b", COLORS, graph.length, graph.length)
        stem = b.layer(f"nn.Conv2d({COLORS}, {graph.width}, 1)")
    else:
        b.inputs["x"] = "float", ("b", "l", FEATURES)
        stem = b.linear(FEATURES, graph.width)
    b.line(f"x = {stem}(x)")
    for s in graph.steps:
        table = IMAGE_STEPS if b.domain == IMAGE else SEQUENCE_STEPS
        if s.kind in table:
            table[s.kind][0](b, Choices(s))
    if b.domain == IMAGE:
        b.line(f"x = {b.layer(f'nn.Conv2d({b.width}, {CLASSES}, 1)')}(x)")
    else:
        b.line(f"x = {b.linear(b.width, CLASSES)}(x)")
    b.tidy()
    return b
