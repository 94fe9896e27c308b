"""Adapted products: a layer's own product, and the delta that its adapter adds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import Static
from mora_jax._jax.qwix_guard import intercepted, undisturbed
from mora_jax._layer.equation import Delta, adapted
from mora_jax._layer.per_row import by_row
from mora_jax._layer.slots import Selected
from mora_jax._layer.ways import Adapted
from mora_jax._mesh.placement import explicit_layout, explicit_sharding, with_auto_axes
from mora_jax._plan.spec import AdapterSpec
from mora_jax.products import Product


def adapted_product(
    spec: AdapterSpec,
    m: ArrayLike | Selected,
    x: ArrayLike,
    kernel: Any,
    product: Product,
    multiply: Static,
    *,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""A layer's product with its adapter: :math:`x W + \alpha\, D(C(x) M)`.

    Args:
      spec: The adapter.
      m: M, (*stack, *m_shape), with the stack axes of `product`; or one for each row of
        a batch.
      x: The layer's input.
      kernel: W, of the same dtype; or the stand-in of a quantized one, which `multiply`
        understands.
      product: The product that `multiply` computes.
      multiply: The layer's own product of x and W, linear in both.
      dropout_key: A key to drop some of what the adapter sees of `x`; None for nothing.
      precision: The precision of the product with M.

    Returns:
      An array of the shape and dtype of the layer's output.

    Raises:
      ValueError: The plan reads the kernel's axes otherwise than the layer, or the
        layer's kernel has another shape than the plan's.
    """
    check_product(spec, product)
    x = jnp.asarray(x)
    dtype, dropout = _floating_dtype(kernel), dropout_key is not None
    explicit = any(explicit_sharding(array) is not None for array in (x, kernel))
    shape, axes = spec.seen_by(len(product.axes))
    if isinstance(m, Selected) or not joins(product, axes, x, dtype, dropout, explicit):
        return add_delta(
            multiply(x, kernel), spec, m, x, product, dropout_key, precision
        )
    kernel = jnp.asarray(kernel)
    if kernel.shape != shape:
        raise ValueError(
            f"{spec.name}: the layer multiplies by a kernel of shape {kernel.shape}, "
            f"the plan's has {shape}; say execution='activation' in overrides for it"
        )
    # The residuals are arrays, and all else is static: layers of one shape share a
    # trace.
    delta = Delta.of(spec, m, ndim=len(product.axes), precision=precision, x=x)
    layer = Adapted.of(spec, product, multiply, x, kernel, precision)
    return layer((delta.operator, delta.m, kernel), x)


def joins(
    product: Product,
    axes: str,
    x: Any,
    dtype: DTypeLike | None,
    dropout: bool = False,
    explicit: bool = False,
) -> bool:
    """True if product and delta can be one map of the layer's input `x`, or its shape.

    `axes` are the kernel's in the plan, without those taken off, and `dtype` is the
    kernel's; None for one that is not floating-point, such as a quantized kernel.
    """
    if not product.joins or product.axes != axes or dtype is None:
        return False
    # The adapter sees another input than the layer under dropout. Steps of the ways
    # lack explicit shardings. A library that computes the layer's product would be
    # given, instead of the kernel that it knows, one with a delta, and round it.
    known = all(isinstance(size, int) for size in x.shape)  # unlike some of jax.export
    return known and not (dropout or explicit or intercepted())


def add_delta(
    y: jax.Array,
    spec: AdapterSpec,
    m: ArrayLike | Selected,
    x: ArrayLike,
    product: Product,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
    factor: jax.Array | None = None,
) -> jax.Array:
    """A layer's output `y` with its delta, times `factor` if there is one.

    The layer multiplies its output by that factor, instead of its kernel. The other
    arguments are as for `adapted_product`.
    """
    if (sharding := explicit_sharding(y)) is not None:
        labels = product.einsum_labels
        layout = None if labels is None else explicit_layout(labels, x, sharding)
        spec = dataclasses.replace(spec, layout=layout)

        def add(y: jax.Array, m: Any, x: ArrayLike, key: Any) -> jax.Array:
            return add_delta(y, spec, m, x, product, key, precision, factor)

        return with_auto_axes(add, sharding, y, m, x, dropout_key)
    x, drop = jnp.asarray(x), (dropout_key, spec.dropout)

    def delta(m: ArrayLike, x: jax.Array) -> jax.Array:
        settings = {"dtype": y.dtype, "ndim": len(product.axes), "precision": precision}
        return product.delta(Delta.of(spec, m, x=x, **settings), x)

    def added(x: jax.Array) -> jax.Array:
        if isinstance(m, Selected):
            rows = undisturbed(by_row)(spec, product, delta, precision, m, x)
        else:
            rows = undisturbed(delta)(m, x)
        return product.dropped_after(rows, x, *drop)

    return adapted(y, added, product.dropped(x, y.dtype, *drop), factor)


def check_product(spec: AdapterSpec, product: Product) -> None:
    """Raise unless the layer reads the kernel's axes as the plan does.

    Leading stack axes of the plan may be ones that a lifted transformation takes off.
    """
    lead = len(spec.axes) - len(product.axes)
    if set(spec.axes[:lead]) - {"s"} or not product.fits(spec.axes[lead:]):
        raise ValueError(
            f"{spec.name}: the plan reads its axes as {spec.axes!r}, the layer "
            f"computes {product.axes!r}; plan with mora_jax.linen.plan or "
            f"mora_jax.nnx.plan, or say overrides={{{spec.name!r}: "
            f"{{'axes': {product.axes!r}}}}}"
        )


def _floating_dtype(kernel: Any) -> DTypeLike | None:
    """The dtype of a kernel that a delta can be added to; None for others."""
    is_array = isinstance(kernel, jax.Array | np.ndarray)
    floating = is_array and jnp.issubdtype(kernel.dtype, jnp.floating)
    return kernel.dtype if floating else None
