"""Table of JAX's primitives: how the outputs of each depend on its operands.

A walk through a program must not guess. A primitive that is in no class here, such as
one of another library or of a later JAX, is `UNSEEN`: nothing is known of its outputs.
`tests/models/test_primitives.py` compares the table with what JAX has.
"""

import enum


class Kind(enum.Enum):
    """A way in which the outputs of a primitive depend on its operands."""

    IDENTITY = "each output is an operand, number by number"
    KNOWN = "all outputs depend on all operands, and on nothing else"
    CONTROL = "its programs are walked, and an operand or a program chooses among them"
    CALL = "its one program is walked with its operands"
    OWN_DERIVATIVE = "the same, but its derivative is not the program's"
    PRINTS = "it has no outputs and shows operands to a person"
    UNSEEN = "a trace cannot look into it, or does not know it"


IDENTITIES = frozenset(
    "copy copy_p device_put layout_constraint mesh_cast name optimization_barrier "
    "pvary relayout reshard sharding_constraint xla_metadata_value".split()
)
"""Primitives that leave numbers as they are."""

OWN_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Primitives whose derivatives are not what their programs have."""

_CONTROL = frozenset({"cond", "scan", "while"})

_CALLS = frozenset(  # those that run the program; of `shard_map` if shapes are the same
    "call checkpoint closed_call composite core_call jit pjit remat remat2 "
    "shard_map xla_metadata_call".split()
)

_PRINTS = frozenset("debug_callback debug_print inspect_sharding print_layout".split())

# Each number of the outputs is made of numbers in the same place. What only steers, as
# the first operand of `select_n` or the bounds of `clamp`, counts like all others.
_OF_NUMBERS = """
    abs acos acosh acospi add add_any and asin asinh asinpi atan atan2 atan2pi atanh
    atanpi bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp clz complex
    conj convert_element_type cos cosh cospi digamma div eq eq_to erf erf_inv erfc
    exp exp2 exp2m1 expm1 floor fma fmuladd from_edtype ge gt igamma igamma_grad_a
    igammac imag integer_pow is_finite le le_to lgamma log log1p log2 log2p1
    logistic lt lt_to max min mul mulhi ne neg nextafter not one_minus_square or
    polygamma polynomial population_count pow real reciprocal reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sinpi sqrt square
    stop_gradient sub tan tanh tanpi tie to_edtype xor zeta
"""

# These move, join or choose along axes, by indices, keys or masks that count as well.
_OF_AXES = """
    approx_top_k argmax argmin bcoo_extract bcoo_fromdense bcoo_sort_indices
    bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_extract bcsr_fromdense
    bcsr_todense broadcast_in_dim concatenate coo_fromdense coo_todense
    csr_fromdense csr_todense dynamic_slice dynamic_update_slice expand_dims gather
    pad reshape rev scatter scatter-add scatter-max scatter-min scatter-mul
    scatter-sub scatter_add scatter_max scatter_min scatter_mul scatter_sub slice
    sort split squeeze stack tile todense top_k transpose unstack
"""

# Sums and products. Those of `reduce` have a program of single numbers, and JAX lets it
# read no other array.
_OF_SUMS = """
    bcoo_dot_general bcoo_dot_general_sampled bcoo_spdot_general bcsr_dot_general
    conv_general_dilated coo_matmat coo_matvec coo_spmm coo_spmv csr_matmat
    csr_matvec csr_spmm csr_spmv cumlogsumexp cummax cummin cumprod cumsum
    dot_general dot_product_attention_bwd dot_product_attention_bwd_wrapper
    dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper
    dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
    dot_product_attention_fwd dot_product_attention_fwd_wrapper fft
    ragged_dot_general reduce reduce_and reduce_max reduce_min reduce_or reduce_prod
    reduce_sum reduce_window reduce_window_max reduce_window_min reduce_window_sum
    reduce_xor scaled_dot scaled_matmul scaled_matmul_wrapper select_and_gather_add
    select_and_scatter select_and_scatter_add
"""

# Functions of matrices.
_OF_MATRICES = """
    cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu
    lu_pivots_to_permutation ormqr qr schur spsolve svd symmetric_product
    triangular_solve tridiagonal tridiagonal_solve
"""

# Random numbers, which are functions of a key.
_OF_RANDOM_NUMBERS = """
    iota_2x32_shape philox2x32 philox4x32 random_bits random_clone random_fold_in
    random_gamma random_gamma_grad random_poisson random_seed random_split
    random_unwrap random_wrap raw_bits rng_bit_generator rng_uniform threefry2x32
    threefry4x32
"""

# Exchanges between devices that run the same program.
_OF_DEVICES = """
    all_gather all_gather_invariant all_gather_reduced all_to_all pbroadcast
    pbroadcast_dynamic pgather pmax pmax_scatter pmin pmin_scatter ppermute psum
    psum_invariant pxor ragged_all_to_all reduce_scatter unreduced_pmax
    unreduced_pmin unreduced_psum unreduced_reduce_scatter
"""

# Constants, and what depends on no more than a shape.
_OF_SHAPES = """
    after_all axis_index create_token dim_as_value dimension_size empty empty2 iota
    platform_index zeros_like
"""

# Programs whose place another one may take, by a rule that no trace shows.
_OF_PROGRAMS = """
    call_exported call_hi_primitive call_hi_primitive_linearized core_map
    cudnn_fusion custom_fusion custom_jvp_call_jaxpr custom_lin custom_linear_solve
    custom_partitioning custom_transpose_call custom_vmap_call eval_jaxpr ffi_call
    full_to_shard fused_call jaxpr_call linear_call mpmd_map pallas_call remat_opt
    shard_to_full stage xla_pmap
"""

# Code on the host, which may keep what it gets.
_OF_THE_HOST = """
    buffer_callback check io_callback pure_callback shape_assertion unreachable
"""

# Arrays that are written to, and others that hold them.
_OF_MEMORY = """
    accum_grad_in_ref addupdate atomic_cas atomic_rmw box_get box_set broadcast_to
    create_linear empty_ref free_ref freeze get get_global load log_extend log_read
    masked_load masked_swap new_box new_log new_ref pin run_scoped run_state swap
    unpin
"""

# Exchanges between devices that have begun and not ended.
_OF_TRANSFERS = """
    all_gather_done all_gather_reduced_start all_gather_start all_to_all_done
    all_to_all_start pbroadcast_done pbroadcast_start ppermute_done ppermute_start
    precv psend psum_done psum_invariant_start psum_start reduce_scatter_done
    reduce_scatter_start unreduced_psum_start unreduced_reduce_scatter_start
"""

# Changes of how an array is spread over devices, by which a sum may become due.
_OF_CASTS = """
    global_array_to_host_local_array host_local_array_to_global_array preduced
    reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast
    vary_unreduced_cast_p
"""

# Steps inside of kernels for chips.
_OF_CHIPS = """
    _copysign add_dependency async_copy_scales_to_tmem async_copy_smem_to_tmem
    async_copy_sparse_metadata_to_tmem async_load async_prefetch async_store_smem
    async_store_tmem barrier_arrive barrier_arrive_and_wait barrier_test
    barrier_wait bitcast commit_group commit_smem commit_tmem conv copy_gmem_to_smem
    copy_smem_to_gmem dce_sink debug_barrier debug_barrier_p delay dma_start
    dma_wait einshape_lo elementwise_inline_asm elementwise_inline_asm_p
    emit_pipeline get_barrier_semaphore griddepcontrol_launch_dependents
    griddepcontrol_wait has_memory_space inline_mgpu inline_mgpu_p layout_cast
    matmul_acc_lhs matmul_lhs_fifo matmul_pop matmul_pop_fifo matmul_push_rhs
    max_contiguous mgpu_atomic_store mma mosaic_gpu_p mosaic_gpu_reduce_max
    mosaic_gpu_reduce_min mosaic_gpu_reduce_prod mosaic_gpu_reduce_sum
    multimem_load_reduce multimem_store multiple_of num_programs pack_dtype
    pack_elementwise pipeline_body prng_join prng_random_bits prng_seed prng_split
    program_id query_cluster_cancel remove_memory_space repeat request_p_state roll
    semaphore_read semaphore_signal semaphore_signal_multicast
    semaphore_signal_parallel semaphore_wait set_max_registers set_max_registers_p
    stochastic_round store tcgen05_commit_arrive tcgen05_mma tpu_custom_call
    trace_value try_cluster_cancel unpack_dtype unpack_elementwise wait_gmem_to_smem
    wait_load_tmem wait_smem_to_gmem wgmma wgmma_accumulator_deref
    wgmma_accumulator_deref_p wgmma_accumulator_store wgmma_accumulator_store_p
    wgmma_ref wgmma_wait with_memory_space_constraint
"""

_KNOWN = (
    _OF_NUMBERS
    + _OF_AXES
    + _OF_SUMS
    + _OF_MATRICES
    + _OF_RANDOM_NUMBERS
    + _OF_DEVICES
    + _OF_SHAPES
)

_UNSEEN = (
    _OF_PROGRAMS + _OF_THE_HOST + _OF_MEMORY + _OF_TRANSFERS + _OF_CASTS + _OF_CHIPS
)

_TABLE = {
    Kind.IDENTITY: IDENTITIES,
    Kind.KNOWN: _KNOWN.split(),
    Kind.CONTROL: _CONTROL,
    Kind.CALL: _CALLS,
    Kind.OWN_DERIVATIVE: OWN_DERIVATIVE,
    Kind.PRINTS: _PRINTS,
    Kind.UNSEEN: _UNSEEN.split(),
}

KINDS = {name: kind for kind, names in _TABLE.items() for name in names}
"""The kind of each primitive of JAX, by its name."""


def kind_of(name: str) -> Kind:
    """The kind of the primitive called `name`; `UNSEEN` if the table lacks it."""
    return KINDS.get(name, Kind.UNSEEN)
