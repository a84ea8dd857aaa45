"""What is checked of every pass's result."""

from collections.abc import Callable

import torch

from graphprune.ir.program import Program
from graphprune.verify.invariants import fingerprint


def test_a_fingerprint_sees_what_a_pass_could_write_to(captured: Callable[[str], Program]) -> None:
    program = captured("tiny-mlp")
    assert fingerprint(program) == fingerprint(program)
    other = program.with_graphs(program.fork_graphs())
    assert fingerprint(other) == fingerprint(program)
    assert fingerprint(program.with_tensors({"x": torch.zeros(1)})) != fingerprint(program)
