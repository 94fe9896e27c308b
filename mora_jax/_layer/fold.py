r"""A dense product with the delta in the kernel: x (W + alpha C M D).

The kernel is folded again in the backward pass, so that no folded kernel is kept. The
gradient of M is taken from x and y, so that no gradient of a kernel's shape is formed.

On a mesh each device folds the part of the kernel that it holds. If the kernel is split
over batches (FSDP), it is folded before it is gathered: each device does its share of
the work, and the gather that the layer needs anyway brings the folded kernel. The layer
alone would gather its kernel once for each pass, and so does the fold, whether or not
layers are rematerialised.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike
from mora_jax._jax.qwix_guard import undisturbed
from mora_jax._layer.delta import Delta
from mora_jax._layer.delta_matrix import folds_in_place
from mora_jax._layer.maps import AdaptedMap
from mora_jax._layer.rounding import add_rounded
from mora_jax._layer.slots import Selected
from mora_jax._layer.tuning import Tuning, by_platform
from mora_jax._mesh.placement import explicit_sharding, with_auto_axes
from mora_jax._plan.spec import AdapterSpec


@dataclasses.dataclass(frozen=True)
class FoldedMap(AdaptedMap):
    """x times the folded kernel."""

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        return self.multiply(operand, self._fold(residuals, operand))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        kernel = self._fold(residuals, cotangent)
        return self.transposed(lambda x: self.multiply(x, kernel), cotangent)

    def _fold(self, residuals: Any, after: jax.Array) -> jax.Array:
        """W + alpha C M D, summed in float32 at least, rounded to W's dtype."""
        operator, m, kernel = residuals
        dtype = jnp.promote_types(jnp.result_type(m, kernel), jnp.float32)
        delta = Delta(operator, m.astype(dtype), *self.by_m.settings)
        layout = delta.layout
        if layout is not None and layout.gathers:
            # The fold does not wait for `after`: it is the same in the rematerialised
            # forward pass and in the backward pass, which can share it and its gather.
            folded = delta.added_to(kernel)
            gathered = layout.gathered_sharding(kernel.ndim)
            folded = jax.lax.with_sharding_constraint(folded, gathered)
        else:
            m = _schedule_after(after, delta.m)
            folded = dataclasses.replace(delta, m=m).added_to(kernel)
            if folds_in_place(operator):
                return folded
        return by_platform(_stores, _barrier, _second, after, folded)


def folded_kernel(
    spec: AdapterSpec, m: ArrayLike | Selected, kernel: jax.Array
) -> jax.Array:
    """W + alpha C M D, for a layer of which it is not known what it does with W.

    The sum is the one that `merge` makes. It is kept for the backward pass, and M's
    gradient is taken from that of the sum.

    Args:
      spec: The adapter.
      m: M, (*stack, q, q).
      kernel: W, with the stack axes of M.

    Raises:
      ValueError: Each row of a batch has an M of its own.
    """
    if isinstance(m, Selected):
        raise ValueError(
            f"{spec.name}: the layer reads its kernel with the delta in it "
            "(products.Folded), so that all rows of a batch share one adapter; leave "
            "it out of the plan to serve a different adapter for each row"
        )
    if (sharding := explicit_sharding(kernel)) is not None:
        spec = dataclasses.replace(spec, layout=None)
        return with_auto_axes(functools.partial(_fold, spec), sharding, m, kernel)
    return _fold(spec, m, kernel)


def _fold(spec: AdapterSpec, m: ArrayLike, kernel: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(jnp.result_type(m, kernel), jnp.float32)
    delta = Delta.of(spec, m, dtype=dtype, ndim=kernel.ndim, x=kernel)
    return _rounded_sum(delta.axes, kernel, undisturbed(delta.kernel)())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_sum(axes: str, kernel: jax.Array, delta: jax.Array) -> jax.Array:
    """The rounded sum, whose derivatives are those of the sum itself."""
    return add_rounded(kernel, delta, axes, kernel.dtype, "dither")


@_rounded_sum.defjvp
def _(axes: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    y = _rounded_sum(axes, *primals)
    kernel, delta = tangents
    return y, kernel + delta.astype(y.dtype)


def _schedule_after(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m` with a dependency on `x`.

    Without it nothing that a fold needs depends on the layers before it, so XLA would
    fold every kernel of a model at its start and keep them all in memory.
    """
    if x.size == 0:
        return m
    # An optimization barrier says just this, but XLA's CPU compiler drops barriers
    # before it decides the order of the program.
    return jax.lax.platform_dependent(x, m, cpu=_add_zero, default=_barrier)


def _add_zero(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m` plus a zero that is computed from `x`.

    The zero is the sign bit of a number of x, shifted down to the last place, and then
    out: 0 or 1, and so 0. A product with 0 would be NaN where x is infinite. One shift
    by all bits, or a subtraction of a number from itself, XLA simplifies to the
    constant 0, and the dependency is gone; two shifts it leaves alone.
    """
    bits = jnp.finfo(x.dtype).bits
    first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim], f"uint{bits}")
    one = jnp.ones((), first.dtype)
    zero = (first >> (bits - 1) * one) >> one
    return m + zero.astype(m.dtype)


def _barrier(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m`, which is computed as it stands and after `x`."""
    return jax.lax.optimization_barrier((x, m))[1]


def _second(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return kernel


def _stores(tuning: Tuning) -> bool:
    return tuning.stores_folds
