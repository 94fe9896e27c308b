"""The update in the kernel, and out of it again."""

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._adapters import Tree, adapter_items, nest
from mora_jax._bases import check_base
from mora_jax._compute.delta import delta_kernel
from mora_jax._config import floating_dtype
from mora_jax._dense import FrozenDense, as_jax_array, params_adapter
from mora_jax._paths import Path, find_kernel, named_leaves, replace_leaves
from mora_jax._plan import Plan, check_plan
from mora_jax._spec import SUFFIX, AdapterSpec
from mora_jax._types import ArrayLike


@overload
def delta_weight(params: Any, frozen: FrozenDense) -> Float[jax.Array, "..."]: ...
@overload
def delta_weight(params: Any, frozen: Plan) -> Tree: ...
def delta_weight(
    params: Any, frozen: FrozenDense | Plan
) -> Float[jax.Array, "..."] | Tree:
    r"""The update as a kernel, :math:`\alpha\, C M D` (paper equation 3).

    Args:
      params: `{"kernel_mora": M}` of one layer, or the adapters of a model.
      frozen: the layer, or the plan.

    Returns:
      An array of the kernel's shape; for a model a tree of them, under their kernels'
      names. In float32, or float64 where M or the layer's kernel is.

    Example::

      >>> from mora_jax import FrozenDense, MoRAConfig, delta_weight
      >>> config = MoRAConfig(square_rank=1, operator="truncation", alpha=2.0)
      >>> frozen = FrozenDense.from_config(jnp.ones((2, 2)), config=config)
      >>> delta_weight({"kernel_mora": jnp.ones((1, 1))}, frozen)
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
    """
    if isinstance(frozen, FrozenDense):
        m = _wide(params_adapter(params, frozen), frozen.kernel.dtype)
        return delta_kernel(frozen.spec, m)
    items = _items(params, check_plan(frozen, "frozen"))
    return nest({spec.path: delta_kernel(spec, _wide(m)) for spec, m in items})


def _items(adapters: Any, plan: Plan) -> list[tuple[AdapterSpec, jax.Array]]:
    """Each spec with its M, which must be an array and not the shape of one."""
    return [
        (spec, as_jax_array(f"{spec.name}{SUFFIX}", m))
        for spec, m in adapter_items(adapters, plan)
    ]


def _wide(array: ArrayLike, *dtypes: DTypeLike) -> jax.Array:
    """`array` in float32, or in float64 where it or any of `dtypes` is."""
    array = jnp.asarray(array)
    return array.astype(jnp.result_type(jnp.float32, array.dtype, *dtypes))


def merge(
    params: Any,
    adapters: Any,
    plan: Plan,
    dtype: DTypeLike | None = None,
    *,
    any_base: bool = False,
) -> Any:
    r"""The base with its adapters folded in: :math:`W' = W + \alpha\, C M D`.

    The merged model computes the same function and costs what the base does. The sum
    is taken in float32 (float64 where the kernel is) and rounded once;
    `diagnostics.merge_loss` says what that loses in a 16-bit kernel.

    Args:
      params: the base's params: any pytree, `nnx.state(model, nnx.Param)` too.
      adapters: as `init` makes them, or `nnx.state(model, MoRAParam)`.
      plan: the plan that they follow.
      dtype: of the merged kernels; by default that of each kernel.
      any_base: Merge into other weights than those that the adapter was trained on,
        too. The plan knows them if `save` was given `params`.

    Returns:
      A new tree of the same structure; unadapted leaves are the same arrays.

    Raises:
      TypeError: leaves that are no arrays, a model in place of its params, or a kernel
        that is not floating-point, such as a quantized one.
      ValueError: adapters or params that do not fit the plan, or M's that hold NaN or
        infinity; kernels of another base, without `any_base`.

    Example::

      >>> from mora_jax import init, merge, plan
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> layers = plan(params)
      >>> merged = merge(params, init(layers), layers)
      >>> bool((merged["fc"]["kernel"] == params["fc"]["kernel"]).all())
      True
    """
    finite_items(adapters, plan)
    if not any_base:
        leaves = named_leaves(params)
        check_base(plan.specs, {s.name: find_kernel(leaves, s)[1] for s in plan.specs})
    return fold(params, adapters, plan, dtype)


def fold(params: Any, adapters: Any, plan: Plan, dtype: DTypeLike | None = None) -> Any:
    r"""Effective params, for a model that is any function of its params.

    As `merge`, but made to be differentiated: `loss(fold(params, a, plan))` inside jit
    trains the adapters of a Haiku, Equinox or hand-written model. This is the general
    way, and the dearer one: each step forms every update and its gradient at the full
    size of its kernel, which `linen.wrap` and `nnx.wrap` do not.

    Args:
      params: the base's params: any pytree of arrays, an `nnx.State` too.
      adapters: as `init` makes them, or `nnx.state(model, MoRAParam)`.
      plan: the plan that they follow. Where a kernel's axes are not (in, out), an
        override of the config says so: `{".*weight": {"axes": "oi"}}`.
      dtype: of the folded kernels; by default that of each kernel.

    Returns:
      A new tree of the same structure; unadapted leaves are the same arrays.

    Raises:
      TypeError: as `merge`.
      ValueError: adapters or params that do not fit the plan.

    Example::

      >>> from mora_jax import fold, init, plan
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> layers = plan(params)
      >>> def loss(adapters, params, x):
      ...     return jnp.mean((x @ fold(params, adapters, layers)["kernel"]) ** 2)
      >>> grads = jax.jit(jax.grad(loss))(init(layers), params, jnp.ones((1, 8)))
      >>> grads["kernel_mora"].shape
      (8, 8)
    """
    return _add(params, adapters, plan, 1, dtype)


def unmerge(params: Any, adapters: Any, plan: Plan) -> Any:
    r"""Subtract the update from merged kernels: :math:`W = W' - \alpha\, C M D`.

    Approximate: each kernel comes back to within the rounding of its dtype. To have the
    base exactly, keep it; `merge` leaves it as it was.

    Raises:
      TypeError, ValueError: as `merge`, and kernels of fewer than 32 bits, which would
        drift.

    Example::

      >>> from mora_jax import init, merge, plan, unmerge
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> layers = plan(params)
      >>> adapters = jax.tree.map(lambda m: m + 1, init(layers))
      >>> back = unmerge(merge(params, adapters, layers), adapters, layers)
      >>> bool(jnp.allclose(back["fc"]["kernel"], params["fc"]["kernel"]))
      True
    """
    leaves = named_leaves(params)
    for spec in check_plan(plan).specs:
        _, kernel = find_kernel(leaves, spec)
        if jnp.finfo(kernel.dtype).bits < 32:
            raise ValueError(
                f"unmerge needs float32 kernels, got {kernel.dtype} at {spec.name!r}; "
                "keep the base instead"
            )
    finite_items(adapters, plan)
    return _add(params, adapters, plan, -1, None)


def finite_items(adapters: Any, plan: Plan) -> list[tuple[AdapterSpec, jax.Array]]:
    """Each spec with its M, which must be finite as far as that can be seen."""
    items = _items(adapters, plan)
    for spec, m in items:
        if not isinstance(m, Tracer) and not np.isfinite(m).all():
            raise ValueError(f"{spec.name}{SUFFIX} holds NaN or infinity")
    return items


def _add(
    params: Any, adapters: Any, plan: Plan, sign: int, dtype: DTypeLike | None
) -> Any:
    items, leaves = _items(adapters, plan), named_leaves(params)
    if dtype is not None:
        dtype = floating_dtype(dtype, "dtype")
    updated: dict[Path, jax.Array] = {}
    for spec, m in items:
        if f"{spec.name}{SUFFIX}" in leaves:  # which would be added twice
            raise ValueError(
                f"params hold the adapter {spec.name}{SUFFIX}: give the base alone, "
                "as split(params)[0]"
            )
        path, kernel = find_kernel(leaves, spec)
        as_jax_array(spec.name, kernel)
        delta = sign * delta_kernel(spec, _wide(m, kernel.dtype))
        updated[path] = (_wide(kernel) + delta).astype(dtype or kernel.dtype)
    return replace_leaves(params, updated)
