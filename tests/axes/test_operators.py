"""Every functional ATen operator: has a rule, is written as others, freezes, or is refused."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.axes import axis_groups
from graphprune.axes.ruleless import SPELLINGS, WITHOUT_RULE
from graphprune.axes.rules import RULES
from graphprune.capture.capture import capture
from graphprune.errors import ArtifactError, CaptureError
from graphprune.ir.graph import op_name
from graphprune.ir.module import graph_module
from graphprune.ir.program import Program
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.storage.allowlist import allowed, on_tensors, resolve
from graphprune.storage.program import load, save
from graphprune.verify.equivalence import verify_rewrite

aten = torch.ops.aten
untyped: Any = torch  # some functions of torch have no types

# What no program may call, by the reason. A star stands for any letters.
REFUSED = {
    "of a backward pass": "*_backward *_backward_* *_jvp _dirichlet_grad _standard_gamma_grad",
    "of forward-mode gradients": "_fw_primal* _make_dual* _unpack_dual get_gradients",
    "of an optimizer": "_amp_* _fused_ada* _fused_sgd _foreach_*",
    "on sparse tensors": "*sparse* *_indices *_indices_copy _coalesce* coalesce _dimI _dimV "
    "_indices* indices indices_copy _nnz _values* values values_copy dense_dim hspmm smm sspaddmm "
    "_spdiags _spsolve to_dense _to_dense _cslt_compress",
    "on nested tensors": "*nested* _jagged_to_padded* _padded_dense* to_padded_tensor",
    "on quantized tensors": "*quantize* q_* fbgemm_* _fused_moving_avg* int_repr qscheme "
    "choose_qparams_optimized _choose_qparams* _saturate_weight* _wrapped_linear*",
    "of one backend": "cudnn_* _cudnn_* _use_cudnn* miopen_* _use_miopen* mkldnn_* _mkldnn_* *_mps "
    "_mps_* *_triton_* _nnpack* to_mkldnn _propagate_xla_data",
    "a kernel behind a public operator": "_adaptive_avg_pool* _addmm_activation _add_relu _aminmax "
    "_batch_norm_* batch_norm_* _cdist_forward _cholesky_solve_helper _chunk_cat "
    "_compute_linear_combination _conj_copy _conj_physical _conv_depthwise2d _convolution "
    "_convolution_mode conv_depthwise3d convolution_overrideable _ctc_loss _dim_arange "
    "_efficient_attention* _embedding_bag* _euclidean_dist _fft_c2c _fft_c2r _fft_r2c "
    "_flash_attention* _fused_dropout _fused_rms_norm _fused_sdp_choice _grid_sampler* _grouped_mm "
    "_histogramdd* _linalg_* linalg__powsum _logcumsumexp _lu_with_info _masked_scale "
    "_masked_softmax multilabel_margin_loss_forward _native_* native_norm _neg_view* "
    "nll_loss2d_forward _pad_circular _pad_enum _pdist_forward _reshape_* "
    "rrelu_with_noise_functional _scaled_dot_product_* _slow_conv2d_forward slow_conv* "
    "thnn_conv2d _stack _thnn_* _transform_bias* _transformer_encoder_layer_fwd _trilinear "
    "_weight_norm_interface flatten_dense_tensors unflatten_dense_tensors",
    "of integer matrices": "_int_mm _scaled_mm* _scaled_grouped_mm* _mixed_dtypes_linear "
    "_dyn_quant* _convert_weight_to_int4pack* _weight_int*",
    "places from tensors, not compared with sizes": "_convert_indices_* _index_put_impl "
    "_unsafe_index _unsafe_index_put _unsafe_masked_index* segment_reduce ctc_loss lu_solve "
    "linalg_lu_solve linalg_ldl_solve lu_unpack ormqr fractional_max_pool* histogram histogramdd",
    "files, memory and storage": "from_file _copy_from* _debug_has* _has_* _lazy_clone data "
    "_efficientzerotensor embedding_renorm get_device is_* _is_zerotensor output_nr pin_memory "
    "_pin_memory resize resize_as _resize_output retains_grad set size slice_inverse "
    "storage_offset stride sym_is_contiguous dim result_type _version _to_cpu chalf "
    "_new_zeros_with_same* hash_tensor",
    "checks and casts that capture takes out": "_assert_* _functional_* _make_dep_token "
    "_autocast_* _cast_* _linalg_check_errors _is_all_true _is_any_true",
    "written with sizes by capture": "view_as reshape_as",
    "of torch.vmap": "_add_batch_dim _remove_batch_dim",
    "of torch's own tests and tools": "_test_* _foobar _backward _rowwise_prune _sobol* "
    "nonzero_numpy",
    "random, on a generator as tensor": "_philox* _sample_dirichlet _standard_gamma",
}
PATTERNS = [pattern for patterns in REFUSED.values() for pattern in patterns.split()]


def functional_operators() -> set[str]:
    """Base names of the ATen operators on tensors that write to none."""
    found = set()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace == "aten":
            target = getattr(getattr(aten, base), overload or "default")
            if not target._schema.is_mutable and on_tensors(target):
                found.add(base)
    return found


def test_every_operator_without_a_rule_is_listed() -> None:
    """A new operator of torch needs a rule, a line in graphprune/axes/ruleless.py, or one above."""
    left = functional_operators() - RULES.keys() - SPELLINGS - WITHOUT_RULE
    assert {n for n in left if not any(fnmatch.fnmatch(n, p) for p in PATTERNS)} == set()
    unused = [p for p in PATTERNS if not any(fnmatch.fnmatch(n, p) for n in left)]
    assert unused == []


def test_no_operator_is_listed_twice() -> None:
    """One that gains a rule leaves the lists."""
    assert not SPELLINGS & RULES.keys()
    assert not WITHOUT_RULE & RULES.keys()
    assert not SPELLINGS & WITHOUT_RULE
    assert (SPELLINGS | WITHOUT_RULE) - functional_operators() == set()


# A weight of its own for each example: a shared one would tie their axes.
W = [torch.linspace(-1, 1 + i, 24).reshape(4, 6) for i in range(10)]
SQUARES = [torch.linspace(-1, 1 + i, 36).reshape(6, 6).cos() for i in range(2)]


def _cell(cell: Callable[..., Any], gates: int) -> Callable[[Tensor], Tensor]:
    weight = torch.linspace(-1, 1, 36 * gates).reshape(gates * 6, 6).sin()
    state: Callable[[Tensor], Any] = lambda h: (h, h) if gates == 4 else h  # noqa: E731
    return lambda h: first(cell(h[:, 0], state(h[:, 1]), weight, weight))


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _scaled(loss: Callable[..., Tensor], *fixed: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda h: loss(h.sigmoid(), *(x(h) for x in fixed), reduction="none", **options)


Function = Callable[[Tensor], Tensor]

# Of h [batch, 4, 6], the last dimension being neurons; they stay free.
FREE: dict[str, Function] = {
    "absolute": torch.absolute,
    "arccos": lambda h: torch.arccos(h.tanh() / 2),
    "arccosh": lambda h: torch.arccosh(h.abs() + 1.5),
    "arcsin": lambda h: torch.arcsin(h.tanh() / 2),
    "arcsinh": torch.arcsinh,
    "arctan": torch.arctan,
    "arctan2": lambda h: torch.arctan2(h, h.abs() + 1),
    "arctanh": lambda h: torch.arctanh(h.tanh() / 2),
    "conj_physical": torch.conj_physical,
    "imag": lambda h: aten.imag(torch.complex(h, h.tanh())),
    "divide": lambda h: torch.divide(h, 2, rounding_mode="floor") + torch.divide(h, h.abs() + 1),
    "fix": lambda h: torch.fix(3 * h),
    "isclose": lambda h: torch.isclose(h, h.abs()).float(),
    "isreal": lambda h: torch.isreal(h) * h,
    "ldexp": lambda h: torch.ldexp(h, h.tanh()),
    "multiply": lambda h: (
        torch.multiply(h, h) + torch.multiply(h, 2.0) + torch.multiply(h.int(), h)
    ),
    "mvlgamma": lambda h: torch.mvlgamma(h.abs() + 3, 2),
    "negative": torch.negative,
    "real": lambda h: aten.real(h),
    "resolve_conj": torch.resolve_conj,
    "resolve_neg": torch.resolve_neg,
    "subtract": lambda h: torch.subtract(h, h.tanh(), alpha=2),
    "special_digamma": lambda h: torch.special.digamma(h.abs() + 1),
    "special_entr": lambda h: torch.special.entr(h.abs()),
    "special_erf": torch.special.erf,
    "special_erfc": torch.special.erfc,
    "special_erfinv": lambda h: torch.special.erfinv(h.tanh() / 2),
    "special_exp2": lambda h: torch.special.exp2(h.tanh()),
    "special_expit": torch.special.expit,
    "special_expm1": lambda h: torch.special.expm1(h.tanh()),
    "special_gammainc": lambda h: torch.special.gammainc(torch.ones_like(h), h.abs()),
    "special_gammaincc": lambda h: torch.special.gammaincc(torch.ones_like(h), h.abs()),
    "special_gammaln": lambda h: torch.special.gammaln(h.abs() + 1.5),
    "special_i0": lambda h: torch.special.i0(h.tanh()),
    "special_log1p": lambda h: torch.special.log1p(h.abs()),
    "special_log_softmax": lambda h: torch.special.log_softmax(h, 1),
    "special_logit": lambda h: torch.special.logit(h.sigmoid(), 0.01),
    "special_logsumexp": lambda h: torch.special.logsumexp(h, 1),
    "special_multigammaln": lambda h: torch.special.multigammaln(h.abs() + 3, 2),
    "special_ndtr": torch.special.ndtr,
    "special_polygamma": lambda h: torch.special.polygamma(1, h.abs() + 1),
    "special_psi": lambda h: torch.special.psi(h.abs() + 1),
    "special_round": lambda h: torch.special.round(3 * h),
    "special_sinc": torch.special.sinc,
    "special_softmax": lambda h: torch.special.softmax(h, 1),
    "special_xlog1py": lambda h: torch.special.xlog1py(h, h.abs()),
    "special_xlogy": lambda h: torch.special.xlogy(h, h.abs() + 1),
    "alias_copy": lambda h: aten.alias_copy(h),
    "atleast_1d": torch.atleast_1d,
    "atleast_2d": torch.atleast_2d,
    "atleast_3d": torch.atleast_3d,
    "broadcast_tensors": lambda h: untyped.broadcast_tensors(h[:, :1], h)[0],
    "channel_shuffle": lambda h: F.channel_shuffle(h.transpose(1, 2), 2).transpose(1, 2),
    "column_stack": lambda h: torch.column_stack([h, h.tanh()]),
    "dsplit": lambda h: torch.dsplit(h, 2)[1],
    "dstack": lambda h: torch.dstack([h, h.tanh()]),
    "expand_copy": lambda h: aten.expand_copy(h, [3, -1, -1, -1]),
    "fliplr": torch.fliplr,
    "flipud": torch.flipud,
    "hsplit": lambda h: torch.hsplit(h, 2)[1],
    "hstack": lambda h: torch.hstack([h, h.tanh()]),
    "moveaxis": lambda h: torch.moveaxis(h, 1, 0) + torch.moveaxis(h, (0, 1), (1, 0)),
    "narrow_copy": lambda h: aten.narrow_copy(h, 1, 0, 2),
    "pad_sequence": lambda h: nn.utils.rnn.pad_sequence([h[0], h[1, :2]]),
    "permute_copy": lambda h: aten.permute_copy(h, [1, 0, 2]),
    "ravel": lambda h: torch.ravel(h).reshape(-1, 4, 6),
    "rot90": lambda h: torch.rot90(h, 1, (0, 1)),
    "row_stack": lambda h: torch.row_stack([h, h.tanh()]),
    "squeeze_copy": lambda h: aten.squeeze_copy(h[:, :1]),
    "t_copy": lambda h: aten.t_copy(h[:, 0]).t(),
    "transpose_copy": lambda h: aten.transpose_copy(h, 0, 1),
    "unsafe_split_with_sizes": lambda h: aten.unsafe_split_with_sizes(h, [1, 3], 1)[1],
    "unsqueeze_copy": lambda h: aten.unsqueeze_copy(h, 0),
    "view_copy": lambda h: aten.view_copy(h, [-1, 6]),
    "vsplit": lambda h: torch.vsplit(h.transpose(0, 1), 2)[1],
    "vstack": lambda h: torch.vstack([h, h.tanh()]),
    "addmv": lambda h: torch.addmv(W[0].sum(1), W[0], h[0, 0]),
    "addr": lambda h: torch.addr(h[0], h[0].sum(1), h[1, 0]),
    "chain_matmul": lambda h: untyped.chain_matmul(h[0], W[1].t(), W[1]),
    "ger": lambda h: torch.ger(W[2][:, 0], h[0, 0]),
    "inner": lambda h: torch.inner(h, W[3]),
    "linalg_matmul": lambda h: torch.linalg.matmul(h, W[4].t()),
    "linalg_matrix_norm": lambda h: torch.linalg.matrix_norm(h),
    "linalg_matrix_power": lambda h: h @ torch.linalg.matrix_power(SQUARES[0], 3),
    "linalg_multi_dot": lambda h: torch.linalg.multi_dot([h[0], W[5].t(), W[5]]) / 16,
    "linalg_norm": lambda h: torch.linalg.norm(h, dim=-1),
    "linalg_vecdot": lambda h: torch.linalg.vecdot(h, h.tanh()),
    "matrix_power": lambda h: h @ torch.matrix_power(SQUARES[1], 2),
    "norm_except_dim": lambda h: h * torch.norm_except_dim(W[6], 2, 0).sum(),
    "outer": lambda h: torch.outer(W[7][:, 0], h[0, 0]),
    "tensordot": lambda h: torch.tensordot(h, W[8], dims=([2], [1])),
    "vdot": lambda h: torch.vdot(h[0, 0], h[0, 1]),
    "gru_cell": _cell(torch.gru_cell, 3),
    "lstm_cell": _cell(torch.lstm_cell, 4),
    "rnn_relu_cell": _cell(torch.rnn_relu_cell, 1),
    "rnn_tanh_cell": _cell(torch.rnn_tanh_cell, 1),
    "aminmax": lambda h: torch.aminmax(h, dim=1)[0],
    "cosine_similarity": lambda h: F.cosine_similarity(h, h.tanh() + 1, -1),
    "cumulative_trapezoid": lambda h: torch.cumulative_trapezoid(h, dim=1),
    "diff": lambda h: torch.diff(h, dim=1),
    "dist": lambda h: torch.dist(h, h.tanh()),
    "msort": torch.msort,
    "nanmean": lambda h: torch.nanmean(h, 1),
    "nansum": lambda h: torch.nansum(h, -1),
    "pairwise_distance": lambda h: F.pairwise_distance(h, h.tanh()),
    "sum_to_size": lambda h: h.sum_to_size(1, 6),
    "trapezoid": lambda h: torch.trapezoid(h, dim=1),
    "trapz": lambda h: torch.trapz(h, dim=1),
    "binary_cross_entropy": _scaled(F.binary_cross_entropy, lambda h: h.tanh() ** 2),
    "binary_cross_entropy_with_logits": _scaled(
        F.binary_cross_entropy_with_logits, lambda h: h.tanh() ** 2
    ),
    "hinge_embedding_loss": _scaled(F.hinge_embedding_loss, lambda h: h.detach().sign()),
    "huber_loss": _scaled(F.huber_loss, torch.tanh),
    "kl_div": _scaled(F.kl_div, torch.sigmoid),
    "l1_loss": _scaled(F.l1_loss, torch.tanh),
    "margin_ranking_loss": _scaled(F.margin_ranking_loss, torch.tanh, lambda h: h.detach().sign()),
    "mse_loss": _scaled(F.mse_loss, torch.tanh),
    "poisson_nll_loss": _scaled(F.poisson_nll_loss, torch.abs),
    "smooth_l1_loss": _scaled(F.smooth_l1_loss, torch.tanh),
    "soft_margin_loss": _scaled(F.soft_margin_loss, lambda h: h.detach().sign()),
    "triplet_margin_loss": _scaled(F.triplet_margin_loss, torch.tanh, lambda h: 2 * h),
}


def _special(name: str, *rest: int) -> Function:
    function = getattr(torch.special, name)
    return lambda h: function(0.1 + 0.8 * h.detach().tanh().abs(), *rest)  # few have gradients


# Rare operators with a rule, which the fuzzer does not draw.
RARE: dict[str, Function] = {
    "angle": torch.angle,
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.5, False),
    "gcd": lambda h: torch.gcd((9 * h.detach()).int(), torch.tensor(6, dtype=torch.int32)).float(),
    "heaviside": lambda h: torch.heaviside(h.detach(), h.detach()),
    "isneginf": lambda h: torch.isneginf(h) + h,
    "isposinf": lambda h: torch.isposinf(h) + h,
    "lcm": lambda h: torch.lcm((9 * h.detach()).int(), torch.tensor(6, dtype=torch.int32)).float(),
    "logaddexp2": lambda h: torch.logaddexp2(h, h.tanh()),
    "nextafter": lambda h: torch.nextafter(h.detach(), h.detach() + 1),
    "special_zeta": lambda h: torch.special.zeta(2.5, h.abs() + 1),
    "zero": lambda h: h + torch.empty_like(h).zero_(),
    **{
        f"special_{name}": _special(name)
        for name in (
            "airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "erfcx", "i0e", "i1",
            "i1e", "log_ndtr", "modified_bessel_i0", "modified_bessel_i1", "modified_bessel_k0",
            "modified_bessel_k1", "ndtri", "scaled_modified_bessel_k0",
            "scaled_modified_bessel_k1", "spherical_bessel_j0",
        )
    },
    **{
        f"special_{name}": _special(name, 2)
        for name in (
            "chebyshev_polynomial_t", "chebyshev_polynomial_u", "chebyshev_polynomial_v",
            "chebyshev_polynomial_w", "hermite_polynomial_h", "hermite_polynomial_he",
            "laguerre_polynomial_l", "legendre_polynomial_p", "shifted_chebyshev_polynomial_t",
            "shifted_chebyshev_polynomial_u", "shifted_chebyshev_polynomial_v",
            "shifted_chebyshev_polynomial_w",
        )
    },
    # Channels first: [batch, 6, 4].
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h.mT, 2).mT,
    "im2col": lambda h: F.unfold(h.mT[..., None], (2, 1)).mT,
    "max_pool1d_with_indices": lambda h: F.max_pool1d(h.mT, 2, return_indices=True)[0].mT,
    "max_pool2d_with_indices": lambda h: F.max_pool2d(
        h.mT[..., None], (2, 1), return_indices=True
    )[0].flatten(2).mT,
    "replication_pad1d": lambda h: aten.replication_pad1d(h.mT, [1, 2]).mT,
    "upsample_nearest3d": lambda h: F.interpolate(
        h.mT[..., None, None], scale_factor=2.0
    ).flatten(2).mT,
    "_upsample_nearest_exact1d": lambda h: F.interpolate(h.mT, 8, mode="nearest-exact").mT,
    "_upsample_bilinear2d_aa": lambda h: F.interpolate(
        h.mT[..., None], (8, 1), mode="bilinear", antialias=True
    ).flatten(2).mT,
}  # fmt: skip

# A unit's number matters, or which other units there are.
BOUND: dict[str, Function] = {
    "block_diag": lambda h: untyped.block_diag(h[0], h[1]),
    "cartesian_prod": lambda h: torch.cartesian_prod(h[0, 0], h[0, 1]),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(
        h[:, 0], h[:, 1], torch.ones_like(h[:, 0, 0])
    ),
    "diag": lambda h: torch.diag(h[0, 0]),
    "diag_embed": torch.diag_embed,
    "diagflat": lambda h: torch.diagflat(h[0, 0]),
    "kron": lambda h: torch.kron(h[0, 0], h[0, 1]),
    "meshgrid": lambda h: torch.meshgrid(h[0, 0], h[0, 1], indexing="ij")[0],
    "take": lambda h: torch.take(h, torch.tensor([0, 3])),
    "_weight_norm": lambda h: h @ torch._weight_norm(W[9], W[9][:, :1].abs() + 1, 0).t(),
}


class Branches(nn.Module):
    """x [batch, 4, 8] through a weight, an operator and, where neurons are left, a weight."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.functions = functions
        self.into = nn.ModuleDict({name: nn.Linear(8, 6) for name in functions})
        sizes = {n: f(torch.randn(4, 4, 6)).shape[-1:] for n, f in functions.items()}
        self.out = nn.ModuleDict({n: nn.Linear(s[0], 3) for n, s in sizes.items() if s})
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = {name: f(self.into[name](x)) for name, f in self.functions.items()}
        return tuple(self.out[n](y) if n in self.out else y for n, y in found.items())


COMMON = (
    "absolute", "broadcast_tensors", "divide", "hstack", "lstm_cell", "moveaxis", "multiply",
    "nansum", "negative", "ravel", "subtract", "tensordot",
)  # fmt: skip


@pytest.fixture(scope="module", params=["common", pytest.param("all", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Branches:
    functions = FREE | RARE | BOUND
    if request.param == "common":
        functions = {name: functions[name] for name in COMMON}
    return Branches(functions)


@pytest.fixture(scope="module")
def example() -> Tensor:
    return torch.linspace(-2, 2, 4 * 4 * 8).reshape(4, 4, 8).mul(7).sin()


@pytest.fixture(scope="module")
def program(model: Branches, example: Tensor) -> Program:
    return capture(model, (example,), dynamic_shapes=None)


def test_every_spelling_has_an_example() -> None:
    assert FREE.keys() | BOUND.keys() == SPELLINGS


def test_examples_are_what_torch_exports(model: Branches, example: Tensor) -> None:
    exported = torch.export.export(model, (example,), strict=False).module().graph
    called = {op_name(node) for node in exported.nodes if node.op == "call_function"}
    assert model.functions.keys() - called <= {"zero"}  # written in place


def test_spellings_become_operators_with_a_rule(program: Program) -> None:
    called = {op_name(n) for n in program.forward.graph.nodes if n.op == "call_function"}
    assert called - RULES.keys() == set()


def test_values_are_those_of_the_model(model: Branches, program: Program, example: Tensor) -> None:
    for name, got, want in zip(
        model.functions, program.run([example]), model(example), strict=True
    ):
        torch.testing.assert_close(got, want, equal_nan=True, msg=name)


def test_gradients_are_those_of_the_model(
    model: Branches, program: Program, example: Tensor
) -> None:
    names = sorted(program.parameters)
    found, wanted = (
        _gradients(module, names, example) for module in (graph_module(program), model)
    )
    for name, got, want in zip(names, found, wanted, strict=True):
        if got is None or want is None:
            assert not any(g is not None and g.any() for g in (got, want)), name
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
    assert sum(got is not None and bool(got.any()) for got in found) > len(model.functions)


def _gradients(module: nn.Module, names: list[str], example: Tensor) -> tuple[Tensor | None, ...]:
    values = [y.nan_to_num().sin().sum() for y in module(example)]
    parameters = dict(module.named_parameters())
    return torch.autograd.grad(
        torch.stack(values).sum(), [parameters[n] for n in names], allow_unused=True
    )


def test_neurons_before_an_operator_are_free_and_can_go(model: Branches, program: Program) -> None:
    groups = axis_groups(program)
    names = (FREE | RARE).keys() & model.functions.keys()
    before = {f"into.{name}.weight": name for name in names}
    found = {
        before[place.tensor]: group
        for group in groups
        for place in group.occurrences
        if place.tensor in before and place.dim == 0
    }
    assert found.keys() == names
    assert {name: group.frozen for name, group in found.items() if group.frozen} == {}
    kept = {g.id: list(range(0, g.size, 2)) for g in found.values() if not g.normalized}
    verify_rewrite(mask(program, kept), shrink(program, kept))


class Calls(nn.Module):
    """One function of x."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def called(program: Program) -> set[str]:
    return {op_name(n) for n in program.forward.graph.nodes if n.op == "call_function"}


def test_sizes_stay_dynamic() -> None:
    weight = torch.randn(5, 6)

    def function(x: Tensor) -> Tensor:
        left, right = untyped.broadcast_tensors(
            torch.tensordot(x, weight, dims=([2], [1])), x[..., :1]
        )
        left = torch.subtract(left, x.sum_to_size(1, x.shape[1], 6).sum())
        product = torch.multiply(left, right * x.shape[1])
        return torch.hstack([torch.multiply(product, x.shape[1]), torch.diff(left, dim=1)])

    program = capture(Calls(function), (torch.randn(2, 4, 6),))
    assert called(program) & SPELLINGS == set()
    assert program.forward.dynamic == {"x": {0: "batch", 1: "sequence"}}
    other = torch.randn(3, 7, 6)
    torch.testing.assert_close(program.run([other])[0], function(other))


def test_a_write_in_place_is_spelled_too() -> None:
    program = capture(Calls(lambda x: (x * 2).multiply_(x).absolute_()), (torch.randn(2, 6),))
    assert called(program) == {"mul", "abs"}


def test_what_needs_an_operator_without_a_rule_stays(tmp_path: Path) -> None:
    """A nuclear norm is a sum of singular values."""

    def function(x: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(x, "nuc")

    program = capture(Calls(function), (torch.randn(2, 3, 3),))
    assert called(program) & SPELLINGS == {"linalg_matrix_norm"}
    save(program, tmp_path / "p")
    x = torch.randn(4, 3, 3)
    torch.testing.assert_close(load(tmp_path / "p").run([x])[0], function(x))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("to_sparse", lambda x: x.to_sparse().to_dense()),
        ("_unsafe_index", lambda x: aten._unsafe_index(x, [torch.tensor([0, 1])])),
        ("histogram", lambda x: torch.histogram(x, 5)[0]),
    ],
)
def test_refused_operators_are_named_at_capture(name: str, function: Function) -> None:
    with pytest.raises(CaptureError, match=f"calls '{name}' at .*, an operator that no saved"):
        capture(Calls(function), (torch.randn(2, 6),), dynamic_shapes=None)


# torch.onnx has a translation, and yet no program may call them: kernels, and unchecked places.
ONNX_KNOWS = {
    "_embedding_bag", "_embedding_bag_forward_only", "_fft_c2c", "_fft_c2r", "_fft_r2c",
    "_grouped_mm", "_linalg_det", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_unsafe_index", "_unsafe_index_put", "embedding_renorm", "hardtanh_backward", "is_nonzero",
    "view_as",
}  # fmt: skip


def test_what_onnx_has_a_translation_for_is_allowed() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    keys = [key for key in ONNXRegistry.from_torchlib().functions if isinstance(key, str)]
    names = {key.removeprefix("aten::").partition(".")[0] for key in keys if "aten::" in key}
    names &= functional_operators()
    assert len(names) > 200
    assert names - RULES.keys() - SPELLINGS - WITHOUT_RULE == ONNX_KNOWS


def test_refused_operators_are_refused_in_files() -> None:
    for name in functional_operators() - RULES.keys() - SPELLINGS - WITHOUT_RULE:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            target = getattr(packet, overload)
            assert not allowed(target), target
            with pytest.raises(ArtifactError, match="not one that a saved graph may call"):
                resolve(f"aten::{name}.{overload}")
