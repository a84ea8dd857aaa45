"""Make a failing graph smaller for as long as it still fails in the same way, and print it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.fuzz.check import Failure, check
from benchmarks.fuzz.drawing import write
from benchmarks.fuzz.source import Graph, Step

SIMPLE = "F.relu({})"


def minimized(failure: Failure, attempts: int = 60) -> Failure:
    """The failure of a smaller graph, or the given one.

    Args:
        failure: what to start from.
        attempts: number of graphs to try at most.
    """
    best = failure
    improved = True
    while improved and attempts > 0:
        improved = False
        for graph in _smaller(best.graph):
            attempts -= 1
            found = [f for f in check(graph, 4, thorough=True).failures if f.kind == failure.kind]
            if found:
                best = found[0]
                improved = True
                break
            if attempts <= 0:
                break
    return best


def _smaller(graph: Graph) -> Iterator[Graph]:
    """Graphs with less in them, those with the least first."""
    steps = graph.steps
    for i in range(len(steps)):
        yield replace(graph, steps=(*steps[:i], *steps[i + 1 :]))
    if graph.dynamic:
        yield replace(graph, dynamic=False)
    for i, step in enumerate(steps):
        for simpler in _simpler(step):
            yield replace(graph, steps=(*steps[:i], simpler, *steps[i + 1 :]))
    if graph.width > 4:
        yield replace(graph, width=4)
    if graph.batch > 2:
        yield replace(graph, batch=2)
    if graph.length > 4:
        yield replace(graph, length=4)


def _simpler(step: Step) -> Iterator[Step]:
    if step.variant:
        yield replace(step, variant=0)
    if step.act != SIMPLE:
        yield replace(step, act=SIMPLE)
    if step.n > 2:
        yield replace(step, n=2)


def script(failure: Failure) -> str:
    """The failure as Python that runs by itself, from the root of the repository."""
    source = write(failure.graph)
    return f'''"""{failure.kind}: {failure.detail}"""

{source.text()}

if __name__ == "__main__":
    from benchmarks.fuzz.check import check_source
    from benchmarks.fuzz.source import Graph

    graph = Graph.from_json({failure.graph.to_json()!r})
    kept = {failure.kept!r}
    print(check_source(Net(), graph, kept))
'''
