"""One device's part of a kernel plus its part of the delta."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._layer.delta_matrix import delta_matrix, turned_m
from mora_jax._layer.rounding import add_rounded
from mora_jax._layer.tuning import Tuning, by_platform
from mora_jax._mesh.parts import BlockPart, OperatorPart


@functools.singledispatch
def add_part(part: OperatorPart, m: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel plus the delta, for the features that are here, as `add_matrix`.

    Args:
      part: One device's part of an operator.
      m: M, (q, q), in float32 or float64.
      kernel: Its part of the kernel, (in_features, out_features).
    """
    delta, start = delta_matrix(part, m), (part.in_start, part.out_start)
    return add_rounded(kernel, delta, "io", kernel.dtype, "dither", start)


@add_part.register
def _(part: BlockPart, m: jax.Array, kernel: jax.Array) -> jax.Array:
    whole = functools.partial(add_part.dispatch(OperatorPart), part)
    if not _is_cut_evenly(part):
        return whole(m, kernel)
    return by_platform(_slices, functools.partial(_add_copies, part), whole, m, kernel)


def _slices(tuning: Tuning) -> bool:
    return tuning.slices_blocks


def _is_cut_evenly(part: BlockPart) -> bool:
    """Whether a device has whole blocks of features, or blocks are on whole devices."""
    q = part.operator.square_rank
    sizes = part.in_features, part.out_features
    return part.operator.aligned and all(n % q == 0 or q % n == 0 for n in sizes)


def _add_copies(part: BlockPart, m: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel with the copies of M that are here added in place.

    A device may have whole blocks, or a part of one block. It goes through its blocks
    of that side which has more of them in the whole kernel: each of those meets one
    block of the other side. If that block is elsewhere, zeros are added.
    """
    op, q = part.operator, part.operator.square_rank
    n, p = op.compressed_shape[0], op.num_out_blocks
    ins, outs = min(q, part.in_features), min(q, part.out_features)
    in_start, out_start = (
        s.astype(jnp.uint32) for s in (part.in_start, part.out_start)
    )
    first_in, first_out = in_start // np.uint32(q), out_start // np.uint32(q)
    turned = jax.lax.dynamic_slice_in_dim(
        turned_m(op, m), in_start % np.uint32(q), ins, axis=1
    )
    turned = jax.lax.dynamic_slice_in_dim(
        turned, out_start % np.uint32(q), outs, axis=2
    )
    here_in, here_out = part.in_features // ins, part.out_features // outs

    def add_copy(k: jax.Array, folded: jax.Array) -> jax.Array:
        k = k.astype(jnp.uint32)
        if n >= p:
            block_in = first_in + k
            block_out = block_in % np.uint32(p)
        else:
            block_out = first_out + k
            block_in = block_out % np.uint32(n)
        row, column = block_in - first_in, block_out - first_out  # wrap if before
        is_here = (row < here_in) & (column < here_out) & (block_in < op.num_feeding)
        row = jnp.minimum(row, np.uint32(here_in - 1)) * np.uint32(ins)
        column = jnp.minimum(column, np.uint32(here_out - 1)) * np.uint32(outs)
        block = jax.lax.dynamic_slice(folded, (row, column), (ins, outs))
        copy = jax.lax.dynamic_index_in_dim(turned, block_in, keepdims=False)
        start = in_start + row, out_start + column
        block = add_rounded(
            block, jnp.where(is_here, copy, 0), "io", kernel.dtype, "dither", start
        )
        return jax.lax.dynamic_update_slice(folded, block, (row, column))

    return jax.lax.fori_loop(0, here_in if n >= p else here_out, add_copy, kernel)
