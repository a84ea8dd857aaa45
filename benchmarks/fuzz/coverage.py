"""Which operators with an axis rule a run has seen, and why some never come."""

from __future__ import annotations

from graphprune.axes.rules import RULES

# Operators that no captured graph of a deterministic float64 model holds.
NEVER = {
    "random": "bernoulli rand rand_like randn randn_like alpha_dropout feature_dropout empty "
    "empty_like new_empty empty_strided new_empty_strided empty_permuted",
    "constants, which capture computes": "hann_window tril_indices triu_indices linspace",
    "no ATen operator; Python methods capture as `to`": "bool float double half int long",
    "written as other operators by capture": "view _unsafe_view softsign tanhshrink softmin "
    "lift_fresh numel sym_numel sym_stride sym_storage_offset",
}


def missing(seen: set[str]) -> tuple[list[str], list[str]]:
    """Names of operators with a rule that were not seen, and of those that cannot be."""
    excused = {name for names in NEVER.values() for name in names.split()}
    left = [name for name in RULES if name not in seen]
    return [n for n in left if n not in excused], [n for n in left if n in excused]
