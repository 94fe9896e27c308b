"""Optax on a combined tree, and an optimizer's state in which adapters start again."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, keystr
from optax import GradientTransformation

from mora_jax._common import trees
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.adapters import combine


def trainable_mask(params: Any) -> Any:
    """True for each adapter of a combined tree, False for the frozen leaves.

    Freeze by `optimizer`: `optax.masked` lets the gradients of masked leaves *through*.

    Args:
      params: A tree as `combine` makes it, or the state of a model with adapters.

    Returns:
      A tree of bools, one for each array or its box: a prefix of `params`, for optax.

    Raises:
      TypeError: A model is given instead of its params.
      ValueError: The tree lacks adapters.

    Example::

      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> trainable_mask(params)
      {'kernel': False, 'kernel_mora': True}
    """
    trained = [
        path[-1].endswith(SUFFIX) or paths.adapter_of(leaf) is not None
        for path, leaf in trees.located_leaves(params).items()
    ]
    if not any(trained):
        hint = "pass combine(params, adapters)"
        raise ValueError(f"params hold no '*{SUFFIX}' leaf: {hint}")
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=trees.is_end), trained)


def trainable_labels(params: Any) -> Any:
    """`trainable_mask` as labels for `optax.transforms.partition`.

    Example::

      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> trainable_labels(params)
      {'kernel': 'frozen', 'kernel_mora': 'trainable'}
    """
    mask = trainable_mask(params)
    return jax.tree.map(lambda train: "trainable" if train else "frozen", mask)


def optimizer(
    tx: GradientTransformation | optax.MultiSteps, params: Any
) -> GradientTransformation:
    """`tx` for the M's of a combined tree; every other leaf stays bitwise the same.

    The state holds arrays for the trained leaves only, and what `tx` computes over the
    whole tree, such as the norm for clipping, covers those leaves alone. A separate
    tree of adapters needs `tx` itself, and no gradient of the base is computed then.

    Args:
      tx: Any optax transformation, or an `optax.MultiSteps`.
      params: As in `trainable_mask`, or a tree of adapters alone.

    Raises:
      TypeError, ValueError: As `trainable_mask`, or `tx` is not one of optax.

    Example::

      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> tx = optimizer(optax.adamw(1e-3), params)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> bool(updates["kernel"].any()), bool(updates["kernel_mora"].all())
      (False, True)
    """
    tx = transformation(tx)
    labels = trainable_labels(params)
    # Updates of -0.0 keep leaves to the bit: x + -0.0 is x, while -0.0 + 0.0 is 0.0.
    freeze = optax.stateless_with_tree_map(lambda g, _: -jnp.zeros_like(g))
    return optax.transforms.partition({"trainable": tx, "frozen": freeze}, labels)


def transformation(tx: Any) -> GradientTransformation:
    """`tx` as a transformation of optax, also if it is an `optax.MultiSteps`."""
    if isinstance(tx, optax.MultiSteps):
        return tx.gradient_transformation()
    if not isinstance(tx, GradientTransformation):
        raise TypeError(
            "tx must be an optax transformation, such as optax.adamw(1e-3), got "
            f"{type(tx).__name__}"
        )
    return tx


def restarted_state(
    opt_state: Any, tx: GradientTransformation, params: Any, adapters: Any
) -> Any:
    """An optimizer's state for adapters that a restart has made."""
    # Their moments start again and mean what they do; the state of others goes on.
    before, structure = jax.tree.flatten(opt_state, is_leaf=trees.is_end)
    for tree_of in (lambda: adapters, lambda: combine(params, adapters)):
        try:  # without memory for the moments of all params
            shapes = jax.eval_shape(tx.init, trained := tree_of())
        except (TypeError, ValueError):  # tx has labels or a mask for the other tree
            continue
        if jax.tree.structure(shapes, is_leaf=trees.is_end) == structure:
            break
    else:
        raise ValueError(
            "opt_state must be a state of tx for the adapters, or for the combined "
            f"tree of params and adapters, got one of {len(before)} arrays for other "
            "ones; an nnx.Optimizer's is for nnx.state(model, MoRAParam)"
        )
    leaves = jax.tree.leaves_with_path(tx.init(trained), is_leaf=trees.is_end)
    owners, after = [_owner(*leaf) for leaf in leaves], []
    for old, (keys, new), (own, starts) in zip(before, leaves, owners, strict=True):
        if starts is None:
            # The count of a named tuple such as Adam's starts again with its trees, if
            # these hold M's alone. Adam would otherwise correct the bias of new moments
            # as if they were old, and its first steps would be large.
            starts = (own, True) in owners and (own, False) not in owners
        # The steps of `optax.MultiSteps` are the steps of a schedule.
        steps = trees.path_of(keys[-1:])
        after.append(_following(old, new, starts and "gradient_step" not in steps))
    return jax.tree.unflatten(structure, after)


def _owner(keys: Any, leaf: Any) -> tuple[str, bool | None]:
    """The named tuple that holds a leaf, and True if the leaf belongs to an M."""
    # An optimizer's state is a tree of named tuples, whose fields are trees like the
    # trained one, or single arrays. Those belong to no leaf, which None stands for.
    fields = [k for k, key in enumerate(keys) if isinstance(key, GetAttrKey)]
    last, adapter = fields[-1] if fields else -1, paths.adapter_of(leaf)
    of_m = adapter is not None and adapter.of_kernel
    return keystr(keys[: max(last, 0)]), of_m if keys[last + 1 :] else None


def _following(old: Any, new: Any, starts: bool) -> Any:
    """The leaf `old` of a state with the meaning of `new`, and its numbers if asked."""
    # An nnx.Optimizer keeps them in variables of another type than the adapters'.
    adapter, had = paths.adapter_of(new), paths.adapter_of(old)
    if adapter is None or had is None:  # of the base, a count, or of plain arrays
        bare = trees.unboxed(new) if adapter is None else adapter.m
        return paths.reboxed(old, bare) if starts else old
    spec = adapter.spec
    if adapter.of_kernel:  # a variable of a model knows one layer of a stack
        spec = spec.with_stack(had.spec.stack_shape)
    return paths.reboxed(old, Adapter(adapter.m if starts else had.m, spec))
