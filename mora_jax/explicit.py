"""Explicit sharding: where the type of an array says how a mesh splits it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from mora_jax._mesh import axes_of
from mora_jax.layout import Layout
from mora_jax.products import Contraction, Product


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, if JAX holds programs to it."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def layout_of(product: Product, x: Any, y: NamedSharding) -> Layout | None:
    """Where the features of a layer are, by the types of its input and output."""
    if not isinstance(product, Contraction):
        return None
    split: dict[str, tuple[str, ...]] = {}
    for labels, spec in (
        (product.inputs, jax.typeof(x).sharding.spec),
        (product.outputs, y.spec),
    ):
        split |= dict(zip(labels, map(axes_of, spec), strict=False))
    axes = tuple(split.get(label, ()) for label in reversed(product.kernel))
    return Layout(y.mesh, axes)


def left_to_xla(
    function: Callable[..., jax.Array], y: NamedSharding, *args: Any
) -> jax.Array:
    """`function(*args)`, of the sharding `y`, whatever that of its steps is."""
    free: Any = jax.sharding.auto_axes(function, out_sharding=y)
    return free(*args)
