"""All M's of a model as one vector, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from mora_jax._common.types import ArrayLike, Path
from mora_jax._plan.plan import Plan
from mora_jax._tree.adapters import nest
from mora_jax._tree.paths import adapter_path, located_leaves, replace_leaves, unboxed


def ravel_adapters(adapters: Any) -> Float[jax.Array, " parameters"]:
    """All M's as one vector, in the order of their paths, each M row by row.

    Arrays that train themselves are among them.

    Raises:
      TypeError: `adapters` is not a tree of arrays.
      ValueError: The tree holds no adapters.

    Example::

      >>> import mora_jax
      >>> adapters = {"fc": {"kernel_mora": jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
      >>> mora_jax.ravel_adapters(adapters)
      Array([1., 2., 3., 4.], dtype=float32)
    """
    if not (leaves := _leaves(adapters)):
        raise ValueError("adapters hold no M")
    return ravel_pytree(nest(leaves))[0]


def _leaves(adapters: Any) -> dict[Path, Any]:
    """{path: M}; as nested dicts they are in the order of their paths."""
    leaves = located_leaves(adapters, "adapters")
    return {path: unboxed(leaf) for path, leaf in leaves.items()}


def unravel_adapters(
    vector: Float[ArrayLike, " parameters"], plan_or_adapters: Any
) -> Any:
    """Undo `ravel_adapters`.

    Args:
      vector: All M's as one vector, (parameters,).
      plan_or_adapters: The plan, or adapters of the wanted shapes and dtypes.

    Returns:
      Nested dicts for a plan, otherwise a tree like the given adapters.

    Raises:
      TypeError: The second argument is neither a plan nor a tree of arrays or shapes.
      ValueError: The vector has another length.

    Example::

      >>> import mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> vector = mora_jax.ravel_adapters(mora_jax.init(plan))
      >>> mora_jax.unravel_adapters(vector, plan)["fc"]["kernel_mora"].shape
      (8, 8)
    """
    like, zeros = plan_or_adapters, {}
    if isinstance(like, Plan):
        shape_of = jax.ShapeDtypeStruct
        ms = {adapter_path(s): shape_of(s.shape, s.param_dtype) for s in like.specs}
        like = nest(ms | {a.path: shape_of(a.shape, a.dtype) for a in like.trained})
    for path, leaf in _leaves(like).items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            kind, name = type(leaf).__name__, "/".join(path)
            raise TypeError(
                f"plan_or_adapters must hold arrays or shapes, got {kind} at {name!r}"
            )
        zeros[path] = jnp.zeros(leaf.shape, leaf.dtype)
    whole, unravel = ravel_pytree(nest(zeros))
    if getattr(vector, "shape", None) != whole.shape:
        got = getattr(vector, "shape", type(vector).__name__)
        raise ValueError(f"vector must have shape {whole.shape}, got {got}")
    restored = unravel(jnp.asarray(vector, whole.dtype))
    return replace_leaves(like, located_leaves(restored))
