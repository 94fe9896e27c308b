"""optax on a combined tree: train the M's, leave the base bitwise as it is."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mora_jax._paths import is_boxed, located_leaves, suggestion
from mora_jax._settings import patterns_of
from mora_jax._spec import SUFFIX


def trainable_mask(params: Any, base: str | Iterable[str] = ()) -> Any:
    """True for each M of a combined tree, False for the frozen leaves.

    Beware of `optax.masked` alone: it lets the gradients of masked leaves *through*.
    Use `optimizer`.

    Args:
      params: a tree as `combine` makes it, or the state of a model with adapters.
      base: patterns of base leaves to train as well, such as `.*/norm/scale`; ".*" for
        all (AiDotNet's freezeBaseLayer=false).

    Returns:
      A tree of bools, one for each array; metadata around arrays has one, too.

    Raises:
      TypeError: a model in place of its params.
      ValueError: no M in the tree, or a pattern that matches nothing.

    Example::

      >>> from mora_jax import trainable_mask
      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> trainable_mask(params)
      {'kernel': False, 'kernel_mora': True}
    """
    patterns = patterns_of("base", base)
    names = ["/".join(path) for path in located_leaves(params)]
    structure = jax.tree.structure(params, is_leaf=is_boxed)
    adapters = {name for name in names if name.endswith(SUFFIX)}
    if not adapters:
        raise ValueError(
            f"params hold no '*{SUFFIX}' leaf: pass combine(params, adapters)"
        )
    trained, leaves = set(adapters), [name for name in names if name not in adapters]
    for pattern in patterns:
        matched = {name for name in leaves if re.fullmatch(pattern, name)}
        if not matched:
            raise ValueError(
                f"base: {pattern!r} matches no base leaf" + suggestion(pattern, leaves)
            )
        trained |= matched
    return jax.tree.unflatten(structure, [name in trained for name in names])


def trainable_labels(params: Any, base: str | Iterable[str] = ()) -> Any:
    """`trainable_mask` as labels "trainable" and "frozen", as optax's partition wants.

    Example::

      >>> from mora_jax import trainable_labels
      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> trainable_labels(params)
      {'kernel': 'frozen', 'kernel_mora': 'trainable'}
    """
    mask = trainable_mask(params, base)
    return jax.tree.map(lambda train: "trainable" if train else "frozen", mask)


def optimizer(
    tx: optax.GradientTransformation, params: Any, base: str | Iterable[str] = ()
) -> optax.GradientTransformation:
    """`tx` on the M's of a combined tree; every other leaf stays bitwise what it is.

    The state holds arrays for the trained leaves only, and what `tx` computes over the
    whole tree, such as the norm to clip by, sees those alone. Adapters that are a tree
    of their own need none of this: there `tx` itself will do, and no gradient of the
    base is computed at all.

    Args:
      tx: any optax transformation.
      params: a tree as `combine` makes it.
      base: patterns of base leaves to train as well.

    Raises:
      TypeError, ValueError: as `trainable_mask`; `tx` is no transformation.

    Example::

      >>> import optax
      >>> from mora_jax import optimizer
      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> tx = optimizer(optax.adamw(1e-3), params)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)
      >>> bool((moved["kernel"] == params["kernel"]).all())
      True
    """
    check_transformation(tx)
    labels = trainable_labels(params, base)
    return optax.transforms.partition({"trainable": tx, "frozen": _freeze()}, labels)


def check_transformation(tx: Any) -> None:
    """Raise unless `tx` is a transformation of optax."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "tx must be an optax transformation, such as optax.adamw(1e-3), "
            f"got {type(tx).__name__}"
        )


def _freeze() -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # -0.0 and not 0.0: x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0.
        zeros = jax.tree.map(lambda g: -jnp.zeros_like(g), updates)
        return zeros, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
