"""The optimizer's state of M's that start again, and of what goes on."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.combined import combine
from mora_jax._tree.paths import key_name


def with_new_moments(
    opt_state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    adapters: Any,
    plan: Plan,
) -> Any:
    """The state with that of the M's as it starts, and all else as it is.

    Args:
      opt_state: A state of `tx` for the adapters, or for the combined tree.
      tx: The optimizer.
      params: The base's params.
      adapters: The adapters.
      plan: Their plan.

    Raises:
      ValueError: `opt_state` is no such state.
    """
    bare = _bare(opt_state)
    for trained in (adapters, combine(params, adapters, plan)):
        try:
            shapes = jax.eval_shape(tx.init, trained)
        except (TypeError, ValueError):  # tx has labels or a mask for the other tree
            continue
        if jax.tree.structure(_bare(shapes)) == jax.tree.structure(bare):
            new = _renewed(bare, _bare(tx.init(_started(trained))))
            structure = jax.tree.structure(opt_state)
            return jax.tree.unflatten(structure, jax.tree.leaves(new))
    raise ValueError(
        "opt_state must be a state of tx for the adapters, or for the combined tree of "
        f"params and adapters, got one of {jax.tree.structure(bare).num_leaves} arrays "
        "for other ones; an nnx.Optimizer's is for nnx.state(model, MoRAParam)"
    )


def _bare(opt_state: Any) -> Any:
    """The state with arrays in place of NNX's variables, which all have one array.

    An `nnx.Optimizer` keeps them in variables of another type than the adapters'.
    """

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    def array(leaf: Any) -> Any:
        return jax.tree.leaves(leaf)[0] if is_variable(leaf) else leaf

    return jax.tree.map(array, opt_state, is_leaf=is_variable)


def _started(trained: Any) -> Any:
    """The tree with zeros for each M, which is what the optimizer starts with."""

    def start(keys: Any, leaf: Any) -> Any:
        return jnp.zeros_like(leaf) if is_m(keys) else leaf

    return jax.tree_util.tree_map_with_path(start, trained)


def _renewed(old: Any, new: Any) -> Any:
    """`old` with the parts of `new` that belong to M's.

    An optimizer's state is a tree of named tuples. One such as Adam's holds trees like
    the trained one, and counts. Its counts start again with them if all of them are of
    M's: Adam would otherwise take its first steps for late ones, and make them large.
    """
    if isinstance(old, Mapping):
        return {name: _renewed(old[name], new[name]) for name in old}
    if not isinstance(old, tuple):
        return old
    if isinstance(old, optax.MultiStepsState):  # its steps are those of a schedule
        new = new._replace(gradient_step=old.gradient_step)
    pairs = list(zip(old, new, strict=True))
    if not hasattr(old, "_fields"):  # those of a chain
        return tuple(_renewed(*pair) for pair in pairs)
    inner = [_holds_states(field) for field in old]
    of_m = [set() if i else _owners(f) for i, f in zip(inner, old, strict=True)]
    alone = any(of_m) and all(found <= {True} for found in of_m)
    fields = []
    for (before, after), is_state, found in zip(pairs, inner, of_m, strict=True):
        if is_state:
            fields.append(_renewed(before, after))
        elif found:
            fields.append(_new_leaves(before, after))
        else:
            fields.append(after if alone else before)
    return type(old)(*fields)


def _holds_states(tree: Any) -> bool:
    """Whether a tree has states of optimizers in it, and not arrays alone."""

    def is_state(node: Any) -> bool:  # what a mask leaves out has no fields
        return bool(getattr(node, "_fields", ()))

    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def _owners(field: Any) -> set[bool]:
    """Whether the leaves of a tree belong to M's; nothing for a single array."""
    paths = [keys for keys, _ in jax.tree_util.tree_leaves_with_path(field) if keys]
    return {is_m(keys) for keys in paths}


def _new_leaves(old: Any, new: Any) -> Any:
    def choose(keys: Any, before: Any, after: Any) -> Any:
        return after if is_m(keys) else before

    return jax.tree_util.tree_map_with_path(choose, old, new)


def is_m(keys: Any) -> bool:
    """Whether the keys lead to an M, or to what an optimizer keeps of one."""
    return any(key_name(key).endswith(SUFFIX) for key in keys)
