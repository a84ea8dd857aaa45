"""ATen operators without an axis rule of their own: capture writes them as others, or they freeze.

An operator that is neither here nor in `RULES` is refused, at capture and where a saved program is
read; `tests/axes/test_operators.py` lists all of those with the reason.
"""

from __future__ import annotations

# An operator belongs here if its decomposition has a rule for every call, and ONNX loses nothing
# by it: not pixel_shuffle, which is one operator there, nor upsampling, which becomes lookups.
_SPELLINGS = {
    "element by element": """
        absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh conj_physical divide fix
        imag isclose isreal ldexp multiply mvlgamma negative real resolve_conj resolve_neg subtract
        special_digamma special_entr special_erf special_erfc special_erfinv special_exp2
        special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0
        special_log1p special_log_softmax special_logit special_logsumexp special_multigammaln
        special_ndtr special_polygamma special_psi special_round special_sinc special_softmax
        special_xlog1py special_xlogy""",
    "shapes": """
        alias_copy atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod
        channel_shuffle column_stack diag diag_embed diagflat dsplit dstack expand_copy fliplr
        flipud hsplit hstack meshgrid moveaxis narrow_copy pad_sequence permute_copy ravel rot90
        row_stack squeeze_copy t_copy take transpose_copy unsafe_split_with_sizes unsqueeze_copy
        view_copy vsplit vstack""",
    "products and norms": """
        addmv addr chain_matmul ger inner kron linalg_matmul linalg_matrix_norm linalg_matrix_power
        linalg_multi_dot linalg_norm linalg_vecdot matrix_power norm_except_dim outer tensordot
        vdot _weight_norm""",
    "steps of recurrent layers": """
        gru_cell lstm_cell rnn_relu_cell rnn_tanh_cell""",
    "reductions": """
        aminmax cosine_similarity cumulative_trapezoid diff dist msort nanmean nansum
        pairwise_distance sum_to_size trapezoid trapz""",
    "losses": """
        binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss
        hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss
        poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss""",
}

# They freeze what they touch. What takes places from tensors is here only if torch compares them
# with the sizes as it runs: `_unsafe_index`, `segment_reduce`, `ctc_loss` and solvers that take
# pivots do not.
_FROZEN = {
    "recurrent layers": """
        _pack_padded_sequence _pad_packed_sequence""",
    "matrices": """
        addbmm cholesky_inverse cholesky_solve corrcoef cov cross frobenius_norm geqrf
        linalg_cholesky_ex linalg_cond linalg_cross linalg_diagonal linalg_eig linalg_eigh
        linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv_ex
        linalg_ldl_factor linalg_ldl_factor_ex linalg_lstsq linalg_lu linalg_lu_factor
        linalg_lu_factor_ex linalg_matrix_rank linalg_qr linalg_slogdet linalg_solve
        linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv
        linalg_tensorsolve linalg_vander nuclear_norm orgqr pdist qr slogdet svd
        triangular_solve vander""",
    "frequencies and complex numbers": """
        bartlett_window blackman_window fft_fftfreq fft_rfftfreq hamming_window
        kaiser_window""",
    "random numbers": """
        binomial multinomial native_dropout normal randint randperm""",
    "choices by value": """
        allclose argwhere combinations equal isin item _local_scalar_dense masked_select
        nanmedian nonzero nonzero_static _unique _unique2 unique_consecutive unique_dim
        unique_dim_consecutive""",
    "places": """
        as_strided as_strided_copy as_strided_scatter conv_tbc detach_copy diagonal_copy
        diagonal_scatter frexp gradient logspace put range renorm select_copy
        _shape_as_tensor slice_copy split_copy split_with_sizes_copy unbind_copy unfold_copy""",
    "losses": """
        cross_entropy_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d
        nll_loss_forward nll_loss_nd""",
    "parts of layers": """
        fake_quantize_per_channel_affine fake_quantize_per_tensor_affine log_sigmoid_forward
        native_group_norm native_layer_norm""",
}

SPELLINGS = frozenset(name for names in _SPELLINGS.values() for name in names.split())
WITHOUT_RULE = frozenset(name for names in _FROZEN.values() for name in names.split())
