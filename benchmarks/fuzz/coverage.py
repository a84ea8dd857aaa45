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
    "rare; tests/axes/probes.py has an example": "affine_grid_generator bilinear bucketize cdist "
    "col2im cummax cummin diagonal embedding_bag fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft "
    "fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_ihfft2 "
    "fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn grid_sampler "
    "grid_sampler_2d grid_sampler_3d index_reduce istft linalg_inv max_unpool2d max_unpool3d "
    "native_channel_shuffle pixel_shuffle pixel_unshuffle quantile nanquantile scatter_reduce "
    "stft take_along_dim unfold view_as_complex view_as_complex_copy view_as_real "
    "view_as_real_copy",
    "matrices, whose sides are frozen": "inverse cholesky linalg_cholesky matrix_exp "
    "linalg_matrix_exp pinverse linalg_pinv det linalg_det logdet trace",
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
