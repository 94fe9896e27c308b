"""An optimizer's state, in which the adapters start again."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.combined import combine


def with_specs(opt_state: Any, found: Mapping[Path, Adapter]) -> Any:
    """An optimizer's state whose moments mean what the adapters do, by their paths."""
    specs = {paths.place_of(path, a.spec): a.spec for path, a in found.items()}

    def follow(keys: Any, leaf: Any) -> Any:
        if (adapter := paths.adapter_of(leaf)) is None:
            return leaf
        names = tuple(map(paths.key_name, keys))  # they end with the path of the M
        ends = (names[k:] for k in range(len(names)))
        spec = next((specs[end] for end in ends if end in specs), adapter.spec)
        # A variable of a model knows one layer of a stack.
        own = getattr(adapter.spec, "stack_shape", None)
        spec = spec if own is None else spec.with_stack(own)
        return paths.reboxed(leaf, adapter.replace(spec=spec))

    return jax.tree.map_with_path(follow, opt_state, is_leaf=paths.is_end)


def with_new_moments(
    opt_state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    adapters: Any,
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
    """The state with arrays instead of boxes."""
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
