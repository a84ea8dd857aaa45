"""Expressions of one and of two values, element by element: every such operator with a rule."""

from __future__ import annotations

# f(0) = 0: a unit whose weights are zero stays zero.
ZERO: tuple[str, ...] = (
    "F.relu({})", "F.gelu({})", "F.silu({})", "torch.tanh({})", "({} * {})", "{}.abs()",
    "torch.sin({})", "torch.asinh({})", "torch.atan({})", "torch.erf({})",
    "torch.expm1({}.tanh())", "F.hardtanh({})", "F.hardswish({})", "F.leaky_relu({}, 0.2)",
    "F.elu({})", "F.celu({})", "F.selu({})", "F.softsign({})", "F.softshrink({}, 0.1)",
    "F.tanhshrink({})", "F.hardshrink({}, 0.1)", "F.relu6({})", "F.mish({})", "torch.sign({})",
    "torch.sgn({})", "{}.abs().sqrt()", "torch.log1p({}.abs())", "torch.square({})",
    "torch.neg({})",
    "torch.trunc(3 * {})", "torch.round(3 * {})", "torch.floor(3 * {})", "torch.ceil(3 * {})",
    "torch.frac({})", "torch.positive({})", "torch.rad2deg({})", "torch.deg2rad({})",
    "torch.erfinv(0.9 * {}.tanh())", "torch.atanh(0.9 * {}.tanh())", "torch.asin(0.9 * {}.tanh())",
    "torch.sinh({}.tanh())", "torch.tan({}.tanh())", "F.threshold({}, 0.1, 0.0)",
    "torch.nan_to_num({}, nan=0.0)", "F.dropout({}, 0.5, False)", "F.rrelu({}, 0.1, 0.3, False)",
    "F.alpha_dropout({}, 0.5, False)", "F.feature_alpha_dropout({}, 0.5, False)",
    "{}.clone()", "{}.contiguous()",
    "{}.detach()", "{}.clamp(-1.0, 1.5)", "{}.clamp_min(-0.5)",
    "{}.clamp_max(0.5)", "torch.clip({}, -1, 1)", "torch.mul({}, 0.5)", "({} / 3)",
    "torch.true_divide({}, 3)", "torch.remainder({}, 1.5)", "torch.fmod({}, 1.5)",
    "torch.floor_divide({}, 0.3)", "{}.abs().pow(1.5)", "torch.float_power({}, 2).to({}.dtype)",
    "({} > 0).to(torch.float64)", "{}.masked_fill({} > 0.5, 2.0)", "torch.where({} > 1, 1.0, {})",
    "{}.lt(0).double()", "torch.gt({}, 0.1).type_as({})", "torch.zeros_like({}) + {}",
    "{} + torch.full_like({}, 0.0)", "torch.ne({}, 0).double()", "(({} > 0) & ({} < 1)).double()",
    "torch.minimum({}, {} * 2)", "torch.fmax({}, {} * 2)", "torch.max({}, {} * 0.5)",
    "torch.xlogy({}, {}.abs() + 1)", "torch.empty_like({}).zero_() + {}",
    "torch.bitwise_and({} > 0, {} < 1).double()", "(({} * 3).long() << 1).double()",
    "(({} * 3).int() >> 1).double()", "torch.bitwise_xor({} > 0, {} > 1).double()",
    "torch.threshold({}, 0.2, 0.0)", "torch.isnan({}).double() + {}",
    "torch.isinf({}).double() + {}", "torch.signbit({}).double() * {}",
)  # fmt: skip

# f(0) is something else: after these a unit is absent only where it is summed.
CONSTANT: tuple[str, ...] = (
    "(F.elu({}) + 1)", "torch.sigmoid({})", "torch.cos({})", "torch.exp({}.tanh())",
    "torch.cosh({}.tanh())", "F.softplus({})", "torch.acos(0.9 * {}.tanh())",
    "torch.acosh({}.abs() + 1.5)", "torch.reciprocal({}.abs() + 1)", "torch.rsqrt({}.abs() + 1)",
    "torch.log({}.abs() + 0.5)", "torch.log2({}.abs() + 0.5)", "torch.log10({}.abs() + 0.5)",
    "F.logsigmoid({})", "torch.logit({}.sigmoid(), 0.01)", "torch.digamma({}.abs() + 1)",
    "torch.lgamma({}.abs() + 1.5)", "torch.erfc({})", "torch.exp2({}.tanh())", "F.hardsigmoid({})",
    "torch.sinc({})", "torch.logical_not({} > 0).double()", "torch.isfinite({}).double()",
    "torch.ones_like({})", "torch.full_like({}, 0.7)", "(1 - {})", "torch.rsub({}, 2.0)",
    "({} + 0.3)", "torch.pow(2.0, {}.tanh())", "torch.logaddexp({}, {} * 0.5)",
    "torch.hypot({}, {} + 1)", "torch.atan2({}, {} + 1)", "torch.copysign({} + 1, {})",
    "torch.le({}, 0.2).double()", "{}.ge(0).double()", "torch.eq({}, 0).double()",
    "torch.bitwise_not({} > 0).double()", "torch.polar({}.abs() + 1, {}).abs()",
    "torch.complex({}, {} + 1).abs()", "torch.logical_or({} > 1, {} < 0.5).double()",
    "torch.less({}, 0.3).double()", "torch.greater_equal({}, 0).double()",
    "torch.less_equal({}, 0.3).double()", "torch.greater({}, -0.1).double()",
    "torch.not_equal({}, 0.2).double()", "torch.logical_xor({} > 0, {} < 0.2).double()",
    "torch.fill({}, 0.4)",
)  # fmt: skip

# Of two values of one width.
PAIRS: tuple[str, ...] = (
    "{} + {}", "{} * {}", "{} - {}", "torch.add({}, {}, alpha=0.5)", "torch.rsub({}, {})",
    "{} / ({}.abs() + 1)", "torch.where({} > 0, {}, 0.0)", "torch.maximum({}, {})",
    "torch.minimum({}, {})", "torch.fmax({}, {})", "torch.fmin({}, {})", "torch.max({}, {})",
    "torch.min({}, {})", "torch.atan2({}, {}.abs() + 1)", "torch.hypot({}, {})",
    "torch.copysign({}, {})", "torch.clamp({}, {}, None)", "torch.clamp({}, max={})",
    "torch.remainder({}, {}.abs() + 1)", "torch.fmod({}, {}.abs() + 1)",
    "torch.floor_divide({}, {}.abs() + 1)", "torch.pow({}.abs() + 0.1, {}.tanh())",
    "{}.masked_fill({} > 0, -1.0)", "torch.addcmul({}, {}, {}, value=0.5)",
    "torch.addcdiv({}, {}, {}.abs() + 1)", "torch.lerp({}, {}, 0.3)", "torch.lerp({}, {}, {})",
    "({} > {}).double()", "({} <= {}).double()", "({} >= {}).double()", "({} < {}).double()",
    "torch.eq({}, {}).double()", "torch.ne({}, {}).double()",
    "torch.logical_and({} > 0, {} > 0).double()", "torch.logical_or({} > 0, {} > 0).double()",
    "(({} > 0) | ({} > 0)).double()", "(({} > 0) ^ ({} > 0)).double()",
    "torch.xlogy({}, {}.abs() + 1)", "torch.float_power({}.abs() + 0.1, {}.tanh()).to({}.dtype)",
    "torch.logaddexp({}, {})", "torch.polar({}.abs() + 1, {}).abs()",
    "torch.complex({}, {}).abs()", "{}.type_as({})", "{}.to({})", "torch.sigmoid({}) * {}",
    "{}.clamp_min({})", "{}.clamp_max({})",
)  # fmt: skip


def is_zero(act: str) -> bool:
    """Whether an activation maps zero to zero."""
    return act not in CONSTANT


def applied(act: str, value: str) -> str:
    """The activation of an expression."""
    return act.replace("{}", value)
