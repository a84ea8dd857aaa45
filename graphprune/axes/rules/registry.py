"""How rules are registered.

A rule says, for one ATen operator, which axes its outputs have and which axes are the same. If the
operator also takes sizes as arguments, a rewriter rebuilds those arguments after axes shrank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphprune.axes.rules.context import RewriteContext, RuleContext

Rule = Callable[[RuleContext], Any]
Rewriter = Callable[[RewriteContext], None]

RULES: dict[str, Rule] = {}
REWRITERS: dict[str, Rewriter] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the axis rule of ATen operators, by base name ("linear"), for all overloads.

    The function takes a `RuleContext` and returns the output's axes: a tuple of `Axis`, one a
    dimension, or a list of such tuples for an operator with several outputs.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"operator {name!r} has a rule already")
            RULES[name] = function
        return function

    return register


def rewriter(*names: str) -> Callable[[Rewriter], Rewriter]:
    """Register what rebuilds the size arguments of ATen operators after axes shrank."""

    def register(function: Rewriter) -> Rewriter:
        for name in names:
            if name in REWRITERS:
                raise ValueError(f"operator {name!r} has a rewriter already")
            REWRITERS[name] = function
        return function

    return register
