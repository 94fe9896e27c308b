"""The way in which a platform computes an adapted product, without computing it."""

from typing import Any

import jax
import jax.numpy as jnp

from mora_jax import AdapterSpec
from mora_jax._jax.linear_map import static
from mora_jax._layer.tuning import Tuning, current_tuning
from mora_jax._layer.ways import Layer, Way, joins
from mora_jax.products import Contraction, Product


def choose(
    spec: AdapterSpec,
    product: Product,
    x: Any,
    dtype: Any,
    *,
    dropout: bool = False,
    tuning: Tuning | None = None,
) -> Way:
    """The way of a layer.

    Args:
      spec: The adapter.
      product: The layer's product.
      x: The shape of the layer's input.
      dtype: The kernel's dtype; None for a kernel that is no array of such numbers.
      dropout: True if the adapter drops some of its input.
      tuning: The constants of the platform; None for the one JAX computes on.
    """
    more = len(spec.axes) - len(product.axes)
    spec = spec.one_of(next(spec.stacks(more)))  # as a layer of a stack has it
    shape, axes = spec.kernel_shape, spec.axes
    if dtype is None or not joins(product, axes, x, dropout):
        return "activation"
    assert isinstance(product, Contraction)  # or it would not join
    settings = axes, None, spec.layout, spec.execution
    layer = Layer(product, static(jnp.matmul), *settings, tuple(x.shape), x.dtype)
    kernel = jax.ShapeDtypeStruct(shape, dtype)
    return layer.way(kernel, spec.operator.work, tuning or current_tuning())
