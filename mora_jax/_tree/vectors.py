"""All M's of a model as one vector, and back."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mora_jax._common.types import ArrayLike, Path
from mora_jax._plan.plan import Plan
from mora_jax._tree.adapters import nest
from mora_jax._tree.paths import adapter_path, located_leaves, replace_leaves, unboxed


def ravel_adapters(adapters: Any) -> Float[jax.Array, " parameters"]:
    """All M's as one vector, in the order of their paths, each M row by row.

    Arrays that train themselves are among them.

    Args:
      adapters: The adapters, as `init` makes them.

    Raises:
      TypeError: `adapters` is not a tree of arrays.
      ValueError: The tree holds no adapters.

    Example::

      >>> import mora_jax
      >>> adapters = {"fc": {"kernel_mora": jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
      >>> mora_jax.ravel_adapters(adapters)
      Array([1., 2., 3., 4.], dtype=float32)
    """
    leaves = _in_order(adapters)
    if not leaves:
        raise ValueError("adapters hold no M")
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves.values()])


def _in_order(adapters: Any) -> dict[Path, Any]:
    """{path: M}, in the order of nested dicts, whatever containers the tree has."""
    leaves = located_leaves(adapters, "adapters")
    return {path: unboxed(leaves[path]) for path in sorted(leaves)}


def unravel_adapters(
    vector: Float[ArrayLike, " parameters"], plan_or_adapters: Any
) -> Any:
    """Undo `ravel_adapters`.

    Args:
      vector: All M's as one vector, (parameters,).
      plan_or_adapters: The plan, or adapters of the wanted shapes and dtypes.

    Returns:
      The adapters: nested dicts for a plan, otherwise a tree of the same structure as
      the given adapters.

    Raises:
      TypeError: The second argument is neither a plan nor a tree of arrays or shapes.
      ValueError: The vector has another length.

    Example::

      >>> import mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> vector = mora_jax.ravel_adapters(mora_jax.init(plan))
      >>> mora_jax.unravel_adapters(vector, plan)["fc"]["kernel_mora"].shape
      (8, 8)
      >>> mora_jax.unravel_adapters(vector[:9], plan)
      Traceback (most recent call last):
      ValueError: vector must have shape (64,), got (9,)
    """
    like = plan_or_adapters
    if isinstance(like, Plan):
        shapes = {
            adapter_path(spec): jax.ShapeDtypeStruct(spec.shape, spec.param_dtype)
            for spec in like.specs
        }
        for one in like.trained:
            shapes[one.path] = jax.ShapeDtypeStruct(one.shape, one.dtype)
        like = nest(shapes)
    leaves = _in_order(like)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"plan_or_adapters must hold arrays or shapes, got "
                f"{type(leaf).__name__} at {'/'.join(path)!r}"
            )
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves.values()], dtype=int)
    size = int(ends[-1]) if leaves else 0
    if getattr(vector, "shape", None) != (size,):
        got = getattr(vector, "shape", type(vector).__name__)
        raise ValueError(f"vector must have shape ({size},), got {got}")
    parts = jnp.split(jnp.asarray(vector), ends[:-1])
    restored = {
        path: part.reshape(leaf.shape).astype(leaf.dtype)
        for (path, leaf), part in zip(leaves.items(), parts, strict=True)
    }
    return replace_leaves(like, restored)
