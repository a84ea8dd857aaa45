"""Which operators with an axis rule a run has seen, and why some never come."""

from __future__ import annotations

from graphprune.axes.rules import RULES

# Operators that no captured graph of a deterministic float64 model holds.
NEVER = {
    "random": "bernoulli rand rand_like randn randn_like alpha_dropout feature_dropout empty "
    "empty_like new_empty empty_strided new_empty_strided empty_permuted "
    "cauchy exponential geometric log_normal normal_functional poisson randint_like random uniform",
    "rare; tests/axes/test_operators.py has an example": "angle gcd heaviside igamma igammac "
    "isneginf isposinf i0 lcm logaddexp2 nextafter polygamma zero im2col max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d",
    "constants, which capture computes": "hann_window tril_indices triu_indices linspace",
    "no ATen operator; Python methods capture as `to`": "bool float double half int long",
    "written as other operators by capture": "view _unsafe_view softsign tanhshrink softmin "
    "lift_fresh numel sym_numel sym_stride sym_storage_offset",
}


def missing(seen: set[str]) -> tuple[list[str], list[str]]:
    """Names of operators with a rule that were not seen, and of those that cannot be."""
    excused = {name for names in NEVER.values() for name in names.split()}
    excused |= {name for name in RULES if name.startswith("special_")}  # rare too
    left = [name for name in RULES if name not in seen]
    return [n for n in left if n not in excused], [n for n in left if n in excused]
