"""What a model's output depends on, seen from a trace of one call.

Both Flax shells trace the model with the outputs of all known layers replaced by what
`blank` gives. A kernel that the model's output still depends on is read somewhere else,
where an adapter would have no effect.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from mora_jax.layers import LayerRule, first_rules
from mora_jax.planning import Plan
from mora_jax.products import Lookup, Product


def blank(y: jax.Array, x: Any) -> jax.Array:
    """Zeros like the layer's output `y`, which depend on its input `x` and no more."""
    return jnp.zeros_like(y) + 0 * jnp.sum(jnp.asarray(x)).astype(y.dtype)


def note(
    products: dict[str, Product],
    name: str,
    rule: LayerRule,
    module: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    """Add to `products` what a call tells of the kernel at `name`; return its input."""
    product, x = rule.read(module, args, kwargs)
    first = first_rules(module)[rule.name(module)]
    planned = product if rule is first else first.product(module)
    if planned is None:
        products.setdefault(name, product)
    else:
        products[name] = planned
    return x


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
) -> Plan:
    """`plan`, if no adapted embedding is also read outside of its layer's methods."""
    for spec in plan.specs:
        product = products.get(spec.name)
        if isinstance(product, Lookup) and spec.name in read_elsewhere:
            raise ValueError(
                f"{spec.name}: the model also reads this embedding outside of its "
                "layer's methods (a tied head?), where the adapter would have no "
                "effect; exclude it"
            )
    return dataclasses.replace(plan, traced=True)


def refuse_untraced(name: str, product: Product | None) -> None:
    """Raise for an embedding in a plan that no trace has checked."""
    if isinstance(product, Lookup):
        raise ValueError(
            f"{name}: only a call shows whether the model also reads this embedding "
            "elsewhere (a tied head); plan with mora_jax.linen.plan or "
            "mora_jax.nnx.plan(model, config, *inputs)"
        )
