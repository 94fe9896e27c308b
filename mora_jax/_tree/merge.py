"""Deltas added to kernels, and subtracted again."""

from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._common.checks import as_jax_array, check_dtype, check_finite
from mora_jax._common.types import ArrayLike, Path
from mora_jax._layer.dense import FrozenDense, params_adapter
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import Rounding, add_rounded, check_rounding
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Items, refuse_trained
from mora_jax._tree.adapters import (
    Tree,
    adapter_items,
    base_leaves,
    nest,
    trained_items,
    with_trained,
)
from mora_jax._tree.paths import find_part, replace_leaves


@overload
def delta_weight(params: Any, frozen: FrozenDense) -> Float[jax.Array, "..."]: ...
@overload
def delta_weight(params: Any, frozen: Plan) -> Tree: ...
def delta_weight(
    params: Any, frozen: FrozenDense | Plan
) -> Float[jax.Array, "..."] | Tree:
    r"""The delta of a kernel, :math:`\alpha s\, C M D` (paper equation 3).

    s is the kernel's `scale` (1 in the paper). Trained arrays of the base are left out.

    Args:
      params: `{"kernel_mora": M}` of one layer, or the adapters of a model.
      frozen: The layer, or the plan.

    Returns:
      An array of the kernel's shape, or for a model a tree of them by the kernels'
      names, in float32, or in float64 where an argument is.

    Example::

      >>> import mora_jax
      >>> truncation = mora_jax.operators.Truncation(2, 2, square_rank=1)
      >>> frozen = mora_jax.FrozenDense(jnp.ones((2, 2)), None, truncation, alpha=2.0)
      >>> mora_jax.delta_weight({"kernel_mora": jnp.ones((1, 1))}, frozen)
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
    """
    if isinstance(frozen, FrozenDense):
        m = wide(params_adapter(params, frozen), frozen.kernel.dtype)
        return delta_kernel(frozen.spec, m)
    items = array_items(params, check_plan(frozen, "frozen"))
    return nest({spec.path: delta_kernel(spec, wide(m)) for spec, m in items})


def wide(array: ArrayLike, *dtypes: DTypeLike) -> jax.Array:
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
    rounding: Rounding = "dither",
) -> Any:
    r"""The base with its deltas added, to be kept: :math:`W' = W + \alpha\, C M D`.

    The merged model computes what the adapted model does, at the cost of the base. The
    sum is taken in float32 (float64 where the kernel is) and rounded once, in 16-bit
    kernels with a dither: rounding to nearest would lose a delta that is small beside
    its kernel. `diagnostics.merge_loss` says what is lost. Arrays that the plan trains
    themselves replace the base's, rounded to nearest.

    Args:
      params: The base's params: any pytree, which may be `nnx.state(model, nnx.Param)`.
      adapters: The adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
      plan: The plan of the adapters.
      dtype: The dtype of merged kernels and trained arrays; None for their own dtypes.
      any_base: True to merge into other weights than the adapters were trained on. The
        plan knows those if `save` was given `params`.
      rounding: The way to round to less than 32 bits: "dither" rounds as many numbers
        away from zero as keeps the delta in the mean, the same ones in each run;
        "nearest" rounds each by itself.

    Returns:
      A new tree of the same structure; unadapted leaves are the same arrays.

    Raises:
      TypeError: A leaf is not an array, or a kernel's dtype is not floating-point.
      ValueError: Adapters or params do not fit the plan, an M holds NaN or infinity,
        `rounding` is unknown, or a kernel is of another base.

    Example::

      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params)
      >>> merged = mora_jax.merge(params, mora_jax.init(plan), plan)
      >>> bool((merged["fc"]["kernel"] == params["fc"]["kernel"]).all())
      True
    """
    check_rounding(rounding)
    kernels = with_kernels(params, array_items(adapters, plan), any_base=any_base)
    return _merged(params, kernels, trained_items(adapters, plan), dtype, rounding)


def fold(params: Any, adapters: Any, plan: Plan, dtype: DTypeLike | None = None) -> Any:
    r"""The base with its deltas added, inside of jit: :math:`W' = W + \alpha\, C M D`.

    Unlike `merge`, whose arguments, results and errors it shares, `fold` checks neither
    numbers nor the base, and rounds to nearest, so that it can be compiled and
    differentiated. It trains any model that is a function of its params, as one of
    Haiku or Equinox, by `loss(fold(params, adapters, plan))`. An override says which
    axes a kernel has if not (in, out): `{".*weight": {"axes": "oi"}}`. This costs more
    than `linen.wrap` and `nnx.wrap`: each step forms all deltas and their gradients.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> plan = mora_jax.plan(params)
      >>> def loss(adapters, params):
      ...     return jnp.mean(mora_jax.fold(params, adapters, plan)["kernel"] ** 2)
      >>> grads = jax.jit(jax.grad(loss))(mora_jax.init(plan), params)
      >>> grads["kernel_mora"].shape
      (8, 8)
    """
    kernels = with_kernels(params, array_items(adapters, plan, finite=False))
    return _merged(params, kernels, trained_items(adapters, plan), dtype)


def unmerge(params: Any, adapters: Any, plan: Plan) -> Any:
    r"""Subtract the deltas from merged kernels: :math:`W = W' - \alpha\, C M D`.

    `params` are what `merge` returned. The result is approximate: each kernel comes
    back to within the rounding of its dtype. Keep the base itself to have it exactly.

    Raises:
      TypeError, ValueError: As `merge`; a kernel has fewer than 32 bits and so would
        drift; or the plan trains arrays, whose old values are in no merged params.

    Example::

      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params)
      >>> adapters = jax.tree.map(lambda m: m + 1, mora_jax.init(plan))
      >>> merged = mora_jax.merge(params, adapters, plan)
      >>> mora_jax.unmerge(merged, adapters, plan)["fc"]["kernel"][0, :2].round(5)
      Array([1., 1.], dtype=float32)
    """
    refuse_trained(
        check_plan(plan).trained, "so that merging replaced it; keep the base instead"
    )
    kernels = {}
    for spec, m, path, kernel in with_kernels(params, array_items(adapters, plan)):
        if jnp.finfo(kernel.dtype).bits < 32:
            raise ValueError(
                f"unmerge needs float32 kernels, got {kernel.dtype} at {spec.name!r}; "
                "keep the base instead"
            )
        # Not `merged_kernel` of -M: the delta of some operators is not linear in M.
        delta = delta_kernel(spec, wide(m, kernel.dtype))
        kernels[path] = (kernel - delta).astype(kernel.dtype)
    return replace_leaves(params, kernels)


def array_items(
    adapters: Any, plan: Plan, *, finite: bool = True
) -> list[tuple[AdapterSpec, jax.Array]]:
    """Each spec with its M, an array; with `finite` all that is trained is finite."""
    pairs = adapter_items(adapters, plan)
    items = [(spec, as_jax_array(f"{spec.name}{SUFFIX}", m)) for spec, m in pairs]
    if finite:
        for spec, m in items:
            check_finite(m, f"{spec.name}{SUFFIX}")
        for array, copy in trained_items(adapters, plan):
            check_finite(copy, f"{array.name} in the adapters")
    return items


def with_kernels(
    params: Any, items: list[tuple[AdapterSpec, jax.Array]], *, any_base: bool = True
) -> list[tuple[AdapterSpec, jax.Array, Path, jax.Array]]:
    """Each spec and M with the path and the array of the kernel, which are checked."""
    leaves, joined = base_leaves(params, [spec for spec, _ in items], any_base), []
    for spec, m in items:
        path, kernel = find_part(leaves, spec)
        joined.append((spec, m, path, as_jax_array(spec.name, kernel)))
    return joined


def _merged(
    params: Any,
    kernels: list[tuple[AdapterSpec, jax.Array, Path, jax.Array]],
    trained: Items,
    dtype: DTypeLike | None,
    rounding: Rounding = "nearest",
) -> Any:
    """The params with merged kernels and trained arrays."""
    sums = {
        path: merged_kernel(spec, m, kernel, dtype=dtype, rounding=rounding)
        for spec, m, path, kernel in kernels
    }
    return replace_leaves(with_trained(params, trained, dtype), sums)


def merged_kernel(
    spec: AdapterSpec,
    m: jax.Array,
    kernel: jax.Array,
    *,
    dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    start: tuple[ArrayLike | int, ArrayLike | int] = (0, 0),
) -> jax.Array:
    """The kernel with its delta added in float32 or wider, and rounded once."""
    # Another `start`, the features from which a dither counts, is another dither.
    dtype = kernel.dtype if dtype is None else check_dtype("dtype", dtype)
    # In 16 bits the product C M D would lose more than the sum is rounded by.
    delta = delta_kernel(spec, wide(m, kernel.dtype))
    return add_rounded(kernel, delta, spec.axes, dtype, rounding, start)
