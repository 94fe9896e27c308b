"""The optimizer's state of M's that start again, and of what goes on."""

from collections import defaultdict
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.combined import combine
from mora_jax._tree.paths import is_boxed, key_name, unboxed


def with_new_moments(
    opt_state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    adapters: Any,
    plan: Plan,
) -> Any:
    """Optimizer state with the moments of the adapters reset and the rest unchanged.

    `opt_state` must be a state of `tx` for the adapters, or for the combined tree.
    """
    bare = _bare(opt_state)
    for trained in (adapters, combine(params, adapters, plan)):
        try:
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
    """The state with arrays instead of boxes.

    An `nnx.Optimizer` keeps them in variables of another type than the adapters'.
    """
    return jax.tree.map(unboxed, opt_state, is_leaf=is_boxed)


def _renewed(old: Any, new: Any) -> list[Any]:
    """The leaves of `new` that belong to M's, and the other leaves of `old`.

    An optimizer's state is a tree of named tuples. A named tuple such as Adam's holds
    trees like the trained one, and counts. Its counts start again with its trees if
    these hold M's alone: Adam would otherwise correct the bias of new moments as if
    they were old, and its first steps would be large.
    """
    leaves = tree_leaves_with_path(old)
    owners: dict[str, set[bool]] = defaultdict(set)
    for keys, _ in leaves:
        state, inside = _split(keys)
        if inside:
            owners[state].add(is_m(inside))
    renewed = []
    for (keys, before), after in zip(leaves, jax.tree.leaves(new), strict=True):
        state, inside = _split(keys)
        starts = is_m(inside) if inside else owners[state] == {True}
        # The steps of `optax.MultiSteps` are the steps of a schedule.
        starts &= key_name(keys[-1]) != "gradient_step"
        renewed.append(after if starts else before)
    return renewed


def _split(keys: Any) -> tuple[str, Any]:
    """The named tuple that holds a leaf, and the path of the leaf inside a field."""
    fields = [k for k, key in enumerate(keys) if isinstance(key, GetAttrKey)]
    last = fields[-1] if fields else -1
    return keystr(keys[: max(last, 0)]), keys[last + 1 :]


def is_m(keys: Any) -> bool:
    """True if the keys lead to an M, or to what an optimizer keeps of it."""
    return any(key_name(key).endswith(SUFFIX) for key in keys)
