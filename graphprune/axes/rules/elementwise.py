"""Operators that work element by element: equal dimensions are one axis, size-1 ones stay free."""

from __future__ import annotations

from torch import fx

from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RuleContext
from graphprune.axes.rules.registry import rule

_UNARY = (
    "abs", "acos", "acosh", "alias", "alpha_dropout", "asin", "asinh", "atan", "atanh",
    "bernoulli", "bitwise_not", "bool", "ceil", "celu", "clone", "contiguous", "cos",
    "cosh", "deg2rad", "detach", "digamma", "dropout", "elu", "erf", "erfc", "erfinv",
    "exp", "exp2", "expm1", "feature_dropout", "fill", "floor", "frac", "full_like",
    "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "isfinite", "isinf",
    "isnan", "leaky_relu", "lgamma", "lift", "lift_fresh", "lift_fresh_copy", "log",
    "log10", "log1p", "log2", "log_sigmoid", "logical_not", "logit", "mish", "nan_to_num",
    "neg", "ones_like", "positive", "rad2deg", "rand_like", "randn_like", "reciprocal",
    "relu", "relu6", "round", "rrelu", "rsqrt", "selu", "sgn", "sigmoid", "sign",
    "signbit", "silu", "sin", "sinc", "sinh", "softplus", "softshrink", "softsign", "sqrt",
    "square", "tan", "tanh", "tanhshrink", "threshold", "to", "_to_copy", "trunc",
    "type_as", "zeros_like", "empty_like", "float", "double", "half", "int", "long",
    "angle", "cauchy", "exponential", "geometric", "log_normal", "normal_functional", "poisson",
    "randint_like", "random", "uniform", "zero", "feature_alpha_dropout", "i0", "isneginf",
    "isposinf", "special_airy_ai",
    "special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1",
    "conj", "_conj", "special_erfcx", "special_i0e", "special_i1", "special_i1e",
    "special_log_ndtr",
    "special_modified_bessel_i0", "special_modified_bessel_i1", "special_modified_bessel_k0",
    "special_modified_bessel_k1", "special_ndtri", "special_scaled_modified_bessel_k0",
    "special_scaled_modified_bessel_k1", "special_spherical_bessel_j0",
)  # fmt: skip
_BROADCAST = (
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod",
    "pow", "atan2", "hypot", "copysign", "maximum", "minimum", "fmax", "fmin", "clamp",
    "clamp_min", "clamp_max", "clip", "where", "masked_fill", "addcmul", "addcdiv", "lerp",
    "eq", "ne", "lt", "le", "gt", "ge", "greater", "greater_equal", "less", "less_equal",
    "not_equal", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or",
    "bitwise_xor", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
    "bitwise_left_shift", "bitwise_right_shift", "expand_as", "copy", "xlogy",
    "float_power", "logaddexp", "polar", "complex", "_prelu_kernel",
    "gcd", "heaviside", "igamma", "igammac", "lcm", "logaddexp2", "nextafter", "polygamma",
    "special_chebyshev_polynomial_t", "special_chebyshev_polynomial_u",
    "special_chebyshev_polynomial_v", "special_chebyshev_polynomial_w",
    "special_hermite_polynomial_h", "special_hermite_polynomial_he",
    "special_laguerre_polynomial_l", "special_legendre_polynomial_p",
    "special_shifted_chebyshev_polynomial_t", "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v", "special_shifted_chebyshev_polynomial_w",
    "special_zeta",
)  # fmt: skip


# What maps each value alone, or broadcasts: nothing of it looks at a neighbor.
ELEMENTWISE = frozenset((*_UNARY, *_BROADCAST))


@rule(*_UNARY)
def unary(c: RuleContext) -> Dims:
    """The output has the axes of the first tensor argument."""
    operand = c.node.args[0] if c.node.args else c.get("self", c.get("input"))
    return c.dims(operand)


@rule(*_BROADCAST)
def broadcast(c: RuleContext) -> Dims:
    """Equal dimensions unify, aligned from the right; size-1 dimensions stay free."""
    operands = [c.dims(a) for a in c.arguments.values() if isinstance(a, fx.Node)]
    return c.broadcast(*operands)


@rule("prelu")
def prelu(c: RuleContext) -> Dims:
    """One slope a channel, or one for all."""
    dims, weight = c.dims(c.get("self")), c.dims(c.get("weight"))
    if weight and weight[-1].size != 1 and len(weight) == 1 and len(dims) > 1:
        c.unify(dims[1], weight[0])
        return dims
    return c.broadcast(dims, weight)


@rule("glu")
def glu(c: RuleContext) -> Dims:
    """Two halves of one axis, multiplied: they are one axis twice."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims))
    half = c.sizes()[d]
    first, second = c.cut(dims[d], [half, half])
    c.unify(first, second)
    return (*dims[:d], first, *dims[d + 1 :])
