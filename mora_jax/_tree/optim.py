"""Optax on a combined tree: the M's are trained, the base stays bitwise the same.

Also an optimizer's state, in which the adapters start again.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from mora_jax._common.checks import above_zero, patterns_of
from mora_jax._common.suggestions import matching
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.combined import combine
from mora_jax._tree.paths import Found


def trainable_mask(params: Any, base: str | Iterable[str] = ()) -> Any:
    """True for each adapter of a combined tree, False for the frozen leaves.

    Freeze by `optimizer`: `optax.masked` lets the gradients of masked leaves *through*.

    Args:
      params: A tree as `combine` makes it, or the state of a model with adapters.
      base: Patterns of base leaves to train as well, such as `.*/norm/scale`; ".*" for
        all of them, which AiDotNet calls freezeBaseLayer=false.

    Returns:
      A tree of bools, one for each array, also for an array in a box of metadata; a
      prefix of `params`, as optax takes it.

    Raises:
      TypeError: A model is given instead of its params.
      ValueError: The tree lacks adapters, or a pattern matches nothing.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> mora_jax.trainable_mask(params)
      {'kernel': False, 'kernel_mora': True}
    """
    patterns, trained = patterns_of("base", base), set()
    for path, leaf in (located := paths.located_leaves(params)).items():
        if path[-1].endswith(SUFFIX) or paths.adapter_of(leaf) is not None:
            trained.add("/".join(path))
    if not trained:
        raise ValueError(
            f"params hold no '*{SUFFIX}' leaf: pass combine(params, adapters)"
        )
    names = list(map("/".join, located))
    leaves = [name for name in names if name not in trained]
    trained |= matching("base", patterns, leaves, "base leaf")
    structure = jax.tree.structure(params, is_leaf=paths.is_end)
    return jax.tree.unflatten(structure, [name in trained for name in names])


def trainable_labels(params: Any, base: str | Iterable[str] = ()) -> Any:
    """`trainable_mask` as labels for `optax.transforms.partition`.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> mora_jax.trainable_labels(params)
      {'kernel': 'frozen', 'kernel_mora': 'trainable'}
    """
    mask = trainable_mask(params, base)
    return jax.tree.map(lambda train: "trainable" if train else "frozen", mask)


def optimizer(
    tx: optax.GradientTransformation,
    params: Any,
    base: str | Iterable[str] = (),
    *,
    ratio: float | int | None = None,
) -> optax.GradientTransformation:
    """`tx` for the M's of a combined tree; every other leaf stays bitwise the same.

    The state holds arrays for the trained leaves only, and what `tx` computes over the
    whole tree, such as the norm for clipping, covers those leaves alone. A separate
    tree of adapters needs `tx` itself and not this function, except for a `ratio`; no
    gradient of the base is computed then.

    Args:
      tx: Any optax transformation.
      params: As in `trainable_mask`, or a tree of adapters alone.
      base: As in `trainable_mask`.
      ratio: The factor of the updates of B of a LoRA (`operator="low_rank"`); LoRA+
        takes 16 (https://arxiv.org/abs/2402.12354).

    Raises:
      TypeError, ValueError: As `trainable_mask`, or `tx` is not one of optax.

    Example::

      >>> import mora_jax, optax
      >>> params = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> tx = mora_jax.optimizer(optax.adamw(1e-3), params)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> bool(updates["kernel"].any()), bool(updates["kernel_mora"].all())
      (False, True)
    """
    check_transformation(tx)
    if ratio is not None:
        tx = with_ratio(tx, params, ratio)
    labels = trainable_labels(params, base)
    # Updates of -0.0 leave every leaf as it is, to the bit: x + -0.0 is x for every x,
    # while -0.0 + 0.0 is 0.0.
    freeze = optax.stateless_with_tree_map(lambda g, _: -jnp.zeros_like(g))
    return optax.transforms.partition({"trainable": tx, "frozen": freeze}, labels)


def with_ratio(
    tx: optax.GradientTransformation, params: Any, ratio: float
) -> optax.GradientTransformation:
    """`tx` with updates of each B that are `ratio` times as large; see `optimizer`."""
    factor: float = above_zero("ratio", ratio)
    leaves = paths.located_leaves(params).values()
    if not any(map(_lora_of, leaves)):
        raise ValueError("ratio needs adapters of operator='low_rank'")

    def scaled(leaf: Any) -> Any:
        if (lora := _lora_of(leaf)) is None:
            return leaf
        m = lora.operator.scaled(lora.m, factor)
        return paths.reboxed(leaf, lora.replace(m=m))

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(scaled, updates, is_leaf=paths.is_end)

    return optax.chain(tx, optax.stateless(scale))


def _lora_of(leaf: Any) -> Adapter | None:
    """The adapter at a leaf, if a factor of its array is not one of its delta."""
    adapter = paths.adapter_of(leaf)
    is_lora = adapter and adapter.of_kernel and not adapter.operator.linear
    return adapter if is_lora else None


def check_transformation(tx: Any) -> None:
    """Raise unless `tx` is a transformation of optax."""
    if not isinstance(tx, optax.GradientTransformation):
        rule = "tx must be an optax transformation, such as optax.adamw(1e-3)"
        raise TypeError(f"{rule}, got {type(tx).__name__}")


def with_specs(opt_state: Any, found: Found) -> Any:
    """An optimizer's state whose moments mean what the adapters do, by their paths."""
    placed = found.placed

    def follow(keys: Any, leaf: Any) -> Any:
        if (adapter := paths.adapter_of(leaf)) is None:
            return leaf
        names = tuple(map(paths.key_name, keys))  # they end with the path of the M
        ends = (names[k:] for k in range(len(names)))
        spec = next((placed[end] for end in ends if end in placed), adapter).spec
        # A variable of a model knows one layer of a stack.
        own = getattr(adapter.spec, "stack_shape", None)
        spec = spec if own is None else spec.with_stack(own)
        return paths.reboxed(leaf, adapter.replace(spec=spec))

    return jax.tree.map_with_path(follow, opt_state, is_leaf=paths.is_end)


def with_new_moments(
    opt_state: Any, tx: optax.GradientTransformation, params: Any, adapters: Any
) -> Any:
    """Optimizer state with the moments of the adapters reset and the rest unchanged."""
    bare = _bare(opt_state)
    for trained in (adapters, combine(params, adapters)):
        try:  # without memory for the moments of all params
            shapes = jax.eval_shape(tx.init, trained)
        except (TypeError, ValueError):  # tx has labels or a mask for the other tree
            continue
        if jax.tree.structure(_bare(shapes)) == jax.tree.structure(bare):
            new = _renewed(bare, _bare(tx.init(trained)))
            return jax.tree.unflatten(jax.tree.structure(opt_state), new)
    raise ValueError(
        "opt_state must be a state of tx for the adapters, or for the combined tree of "
        f"params and adapters, got one of {jax.tree.structure(bare).num_leaves} arrays "
        "for other ones; an nnx.Optimizer's is for nnx.state(model, MoRAParam)"
    )


def _bare(opt_state: Any) -> Any:
    # An nnx.Optimizer keeps them in variables of another type than the adapters'.

    def bare(leaf: Any) -> Any:
        return leaf.m if isinstance(leaf, Adapter) else paths.unboxed(leaf)

    return jax.tree.map(bare, opt_state, is_leaf=paths.is_end)


def _renewed(old: Any, new: Any) -> list[Any]:
    """The leaves of `new` that start again, and the other leaves of `old`."""
    leaves, renewed = tree_leaves_with_path(old), []
    owners = [_owner(keys) for keys, _ in leaves]
    rows = zip(leaves, owners, jax.tree.leaves(new), strict=True)
    for (keys, before), (state, starts), after in rows:
        if starts is None:
            # The count of a named tuple such as Adam's starts again with its trees, if
            # these hold M's alone. Adam would otherwise correct the bias of new moments
            # as if they were old, and its first steps would be large.
            starts = (state, True) in owners and (state, False) not in owners
        # The steps of `optax.MultiSteps` are the steps of a schedule.
        starts &= paths.key_name(keys[-1]) != "gradient_step"
        renewed.append(after if starts else before)
    return renewed


def _owner(keys: Any) -> tuple[str, bool | None]:
    """The named tuple that holds a leaf, and True if the leaf belongs to an M."""
    # An optimizer's state is a tree of named tuples, whose fields are trees like the
    # trained one, or single arrays. Those belong to no leaf, which None stands for.
    fields = [k for k, key in enumerate(keys) if isinstance(key, GetAttrKey)]
    last = fields[-1] if fields else -1
    names = [paths.key_name(key) for key in keys[last + 1 :]]
    of_m = any(name.endswith(SUFFIX) for name in names) if names else None
    return keystr(keys[: max(last, 0)]), of_m
