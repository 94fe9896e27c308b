"""What a model's output depends on, seen from a trace of one call.

Both Flax shells trace the model with the outputs of all known layers replaced by what
`blank` gives. A kernel that the model's output still depends on is read somewhere else,
where an adapter would have no effect.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from mora_jax.planning import Plan
from mora_jax.products import Lookup, Product


def blank(y: jax.Array, x: Any) -> jax.Array:
    """Zeros like the layer's output `y`, which depend on its input `x` and no more."""
    return jnp.zeros_like(y) + 0 * jnp.sum(jnp.asarray(x)).astype(y.dtype)


def dependencies(
    function: Callable[..., Any], names: Iterable[str], tree: Any, *args: Any
) -> set[str]:
    """Which leaves of `tree`, called `names` in order, `function(tree, *args)` needs.

    Only the arrays and shapes in `args` are traced; whatever else is there is static.
    """
    inputs, structure = jax.tree.flatten(args)
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in inputs]

    def call(tree: Any, arrays: list[Any]) -> list[Any]:
        left = iter(arrays)
        merged = [
            next(left) if is_array else leaf
            for leaf, is_array in zip(inputs, traced, strict=True)
        ]
        return jax.tree.leaves(function(tree, *jax.tree.unflatten(structure, merged)))

    arrays = [leaf for leaf, is_array in zip(inputs, traced, strict=True) if is_array]
    jaxpr = jax.make_jaxpr(call)(tree, arrays).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return {name for name, use in zip(names, used, strict=False) if use}


def refuse_half_adapted(
    plan: Plan, products: Mapping[str, Product], read_elsewhere: set[str]
) -> None:
    """Raise if an adapted embedding is also read outside of its layer's methods."""
    for spec in plan:
        product = products.get(spec.name)
        if isinstance(product, Lookup) and spec.name in read_elsewhere:
            raise ValueError(
                f"{spec.name}: the model also reads this embedding outside of its "
                "layer's methods (a tied head?), where the adapter would have no "
                "effect; exclude it"
            )
