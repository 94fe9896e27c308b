r"""An adapted layer: the equation, and the ways to compute it.

.. math:: y = x W + \alpha\, D(C(x) M) = x\,(W + \alpha\, C M D)

There are three ways, which give the same numbers up to rounding:

- "activation" is the equation as it stands. It reads the input and the output once
  more.
- "fold" computes the right-hand side (see `fold`). It reads the kernel once more, so it
  pays where an input has many rows.
- "fused" is for meshes (see `fused`). Each device adds its parts of both terms before
  the devices sum them, so that there is one sum and not two.

`choose` names one. Which is fastest may depend on the platform, and a program may be
compiled for another than it is traced on. Then `choose` gives one way for each, and the
program takes its platform's.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._compute.delta import Delta, add_delta
from mora_jax._compute.fold import FoldedMap
from mora_jax._compute.fused import FusedMap
from mora_jax._compute.maps import ActivationMap, ByPlatform
from mora_jax._interception import intercepted
from mora_jax._linear_map import LinearMap, Static
from mora_jax._mesh.layout import explicit_sharding
from mora_jax._spec import AdapterSpec
from mora_jax._tuning import TUNING, Tuning
from mora_jax._types import ArrayLike
from mora_jax.operators import Sharing
from mora_jax.products import Contraction, Product

Way = Literal["activation", "fold", "fused"]


def choose(
    spec: AdapterSpec,
    product: Product,
    x: Any,
    dtype: DTypeLike | None,
    *,
    dropout: bool = False,
) -> Mapping[str, Way]:
    """How to compute an adapted product, on each platform.

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

    Returns:
      {platform: "activation", "fold" or "fused"}; see the head of this file.
    """
    shape, axes = spec.seen_by(len(product.axes))
    joined = isinstance(product, Contraction) and "s" not in axes
    if not joined or product.axes != axes or dtype is None or dropout or intercepted():
        return dict.fromkeys(TUNING, "activation")
    if explicit_sharding(x) is not None:  # the steps of the others have no such type
        return dict.fromkeys(TUNING, "activation")
    layout = spec.layout if spec.operator.block else None
    split = layout is not None and layout.for_activations(axes, shape).splits
    other: Way = "fused" if split else "activation"
    return {
        name: "fold" if _should_fold(spec, x, dtype, tuning) else other
        for name, tuning in TUNING.items()
    }


def _should_fold(spec: AdapterSpec, x: Any, dtype: DTypeLike, tuning: Tuning) -> bool:
    if spec.execution != "auto":
        return spec.execution == "fold"
    if jnp.finfo(dtype).bits < 32 and not tuning.folds_16_bits:
        return False
    if spec.layout is not None and spec.layout.gathers:
        return False  # a fold in the backward pass would gather the kernel once more
    ins, outs = spec.in_features, spec.out_features
    fold_from = tuning.fold_from
    if spec.operator.block:
        fold_from = tuning.fold_blocks_from
    elif isinstance(spec.operator, Sharing):
        fold_from = tuning.fold_sharing_from
    return math.prod(x.shape) / ins >= fold_from * ins * outs / (ins + outs)


def adapted_product(
    spec: AdapterSpec,
    m: ArrayLike,
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
      m: M, (*stack, q, q), with the stack axes of `product`.
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
    ways = choose(
        spec, product, x, _floating_dtype(kernel), dropout=dropout_key is not None
    )
    if set(ways.values()) == {"activation"}:
        y = multiply(x, kernel)
        return add_delta(y, spec, m, x, product, dropout_key, precision)
    kernel, ndim = jnp.asarray(kernel), len(product.axes)
    _check_kernel_shape(spec, kernel, ndim)
    delta = Delta.of(spec, m, ndim=ndim, precision=precision, x=x)
    arguments = delta, x, kernel, product, multiply
    maps = {way: _MAPS[way](*arguments) for way in set(ways.values())}
    adapted = maps[ways["cpu"]]
    if len(maps) > 1:
        adapted = ByPlatform(tuple((name, maps[way]) for name, way in ways.items()))
    return adapted((delta.operator, delta.m, kernel), x)


_MAPS: Mapping[Way, Callable[..., LinearMap]] = {
    "activation": ActivationMap.of,
    "fold": FoldedMap.of,
    "fused": FusedMap.of,
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
