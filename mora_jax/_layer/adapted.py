r"""An adapted layer: the equation, and the ways to compute it.

.. math:: y = x W + \alpha\, D(C(x) M) = x\,(W + \alpha\, C M D)

There are three ways, which give the same numbers up to rounding:

- "activation" is the equation as it stands. It reads the input and the output once
  more.
- "fold" computes the right-hand side (see `fold`). It reads the kernel once more, so it
  pays where an input has many rows.
- "fused" is for meshes (see `fused`). Each device adds its parts of both terms before
  the devices sum them, so that there is one sum and not two.

`choose` names one for a platform. A program may be compiled for another platform than
it is traced on, or for several: where they differ, it holds two ways and takes one when
it is compiled.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import Static, static
from mora_jax._jax.qwix_guard import intercepted
from mora_jax._layer.delta import Delta, add_delta
from mora_jax._layer.fold import FoldedMap
from mora_jax._layer.fused import FusedMap
from mora_jax._layer.maps import ActivationMap, ByPlatform
from mora_jax._layer.slots import Selected
from mora_jax._layer.tuning import TUNING, Tuning, current_tuning
from mora_jax._mesh.placement import explicit_sharding
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators import Sharing, Truncation
from mora_jax.products import Contraction, Product

Way = Literal["activation", "fold", "fused"]


def choose(
    spec: AdapterSpec,
    product: Product,
    x: Any,
    dtype: DTypeLike | None,
    *,
    dropout: bool = False,
    explicit: bool = False,
    tuning: Tuning | None = None,
) -> Way:
    """How a platform is to compute an adapted product.

    Shapes and dtypes alone decide, and whether another library computes the layer's
    product: it would be given, in place of the kernel that it knows, one with a delta,
    and round it.

    Args:
      spec: The adapter.
      product: What the layer computes.
      x: The layer's input, or its shape.
      dtype: The kernel's dtype in the computation; None for a kernel that is not an
        array of floating-point numbers, such as a quantized one.
      dropout: Whether the adapter drops some of its input, which the layer does not.
      explicit: Whether the type of the input or the kernel says how it is sharded.
      tuning: The constants of the platform; None for the one JAX computes on.

    Returns:
      "activation", "fold" or "fused"; see the head of this file.
    """
    shape, axes = spec.seen_by(len(product.axes))
    joined = isinstance(product, Contraction) and "s" not in axes
    if not joined or product.axes != axes or dtype is None or dropout or intercepted():
        return "activation"
    if explicit:  # the steps of the others have no such types
        return "activation"
    if not all(isinstance(size, int) for size in x.shape):  # of jax.export
        return "activation"
    if _should_fold(spec, math.prod(x.shape), dtype, tuning or current_tuning()):
        return "fold"
    if spec.layout is None:
        return "activation"
    return "fused" if spec.layout.for_activations(axes, shape).splits else "activation"


def _should_fold(
    spec: AdapterSpec, inputs: int, dtype: DTypeLike, tuning: Tuning
) -> bool:
    if spec.execution != "auto":
        return spec.execution == "fold"
    bits = jnp.finfo(dtype).bits
    if bits < 16 or (bits == 16 and not tuning.folds_16_bits):
        return False
    gathers = spec.layout is not None and spec.layout.gathers
    if gathers and not tuning.folds_gathered:
        return False
    ins, outs = spec.in_features, spec.out_features
    fold_from = tuning.fold_from
    if spec.operator.block:
        fold_from = tuning.fold_blocks_from
    elif isinstance(spec.operator, Sharing | Truncation):
        fold_from = tuning.fold_cheap_from
    return inputs / ins >= fold_from * ins * outs / (ins + outs)


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
      m: M, (*stack, q, q), with the stack axes of `product`; or one for each row of a
        batch.
      x: The layer's input.
      kernel: W, of the same dtype; or what stands for a quantized one, which `multiply`
        understands.
      product: What `multiply` computes.
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
    settings = {"dropout": dropout, "explicit": explicit}
    ways = {
        choose(spec, product, x, dtype, **settings, tuning=tuning)
        for tuning in TUNING.values()
    }
    if isinstance(m, Selected) or ways == {"activation"}:
        y = multiply(x, kernel)
        return add_delta(y, spec, m, x, product, dropout_key, precision)
    kernel, ndim = jnp.asarray(kernel), len(product.axes)
    _check_kernel_shape(spec, kernel, ndim)
    delta = Delta.of(spec, m, ndim=ndim, precision=precision, x=x)
    delta = dataclasses.replace(delta, in_parts=True)
    maps = [_MAPS[way].of(delta, x, kernel, product, multiply) for way in ways]
    if len(maps) == 1:
        adapted = maps[0]
    else:  # a fold on some platforms, and one other way on the rest
        first, second = sorted(maps, key=lambda each: not isinstance(each, FoldedMap))
        # Without its path, so that layers of one shape are traced once.
        wanted = static(_should_fold, dataclasses.replace(spec, path=()), x.size, dtype)
        adapted = ByPlatform(wanted, first, second)
    return adapted((delta.operator, delta.m, kernel), x)


_MAPS: Mapping[str, Any] = {
    "activation": ActivationMap,
    "fold": FoldedMap,
    "fused": FusedMap,
}


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


def _check_kernel_shape(spec: AdapterSpec, kernel: jax.Array, ndim: int) -> None:
    shape, _ = spec.seen_by(ndim)
    if kernel.shape != shape:
        raise ValueError(
            f"{spec.name}: the layer multiplies by a kernel of shape {kernel.shape}, "
            f"the plan's has {shape}; say execution='activation' in overrides for it"
        )


def _floating_dtype(kernel: Any) -> DTypeLike | None:
    """The dtype of a kernel that a delta can be added to; None for others."""
    is_array = isinstance(kernel, jax.Array | np.ndarray)
    floating = is_array and jnp.issubdtype(kernel.dtype, jnp.floating)
    return kernel.dtype if floating else None
