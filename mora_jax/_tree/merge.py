"""Deltas added to kernels, and subtracted again."""

from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._common.checks import check_dtype
from mora_jax._common.types import ArrayLike
from mora_jax._layer.adapter import Adapter, delta_of
from mora_jax._layer.dense import FrozenDense, params_adapter
from mora_jax._layer.rounding import Rounding, add_rounded, check_rounding
from mora_jax._tree.paths import Found, Tree, checked_adapters, nest, replace_leaves


@overload
def delta_weight(adapters: Any, frozen: FrozenDense) -> Float[jax.Array, "..."]: ...
@overload
def delta_weight(adapters: Any, frozen: None = None) -> Tree: ...
def delta_weight(
    adapters: Any, frozen: FrozenDense | None = None
) -> Float[jax.Array, "..."] | Tree:
    r"""The deltas of kernels, :math:`\alpha s\, C M D` (paper equation 3).

    s is the kernel's `scale` (1 in the paper). Trained arrays of the base are left out.

    Args:
      adapters: The adapters of a model; or `{"kernel_mora": M}` of one layer.
      frozen: The layer, where M is a plain array.

    Returns:
      A tree as of the kernels, in float32, or float64 where M is; or a layer's array.

    Example::

      >>> import mora_jax
      >>> truncation = mora_jax.operators.Truncation(2, 2, square_rank=1)
      >>> frozen = mora_jax.FrozenDense(jnp.ones((2, 2)), None, truncation, alpha=2.0)
      >>> mora_jax.delta_weight({"kernel_mora": jnp.ones((1, 1))}, frozen)
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
    """
    if frozen is not None:
        return delta_of(params_adapter(adapters, frozen), frozen.kernel.dtype)
    found = checked_adapters(adapters).kernels
    return nest({path: delta_of(adapter) for path, adapter in found.items()})


def merge(
    params: Any,
    adapters: Any,
    dtype: DTypeLike | None = None,
    *,
    any_base: bool = False,
    rounding: Rounding = "dither",
) -> Any:
    r"""The base with its deltas added, to be kept: :math:`W' = W + \alpha\, C M D`.

    The merged model computes what the adapted model does, at the cost of the base. The
    sum is taken in float32 (float64 where the kernel is) and rounded once, in 16-bit
    kernels with a dither: rounding to nearest would lose a delta that is small beside
    its kernel. `diagnostics.merge_loss` says what is lost. Arrays that are trained
    themselves replace the base's, rounded to nearest.

    Args:
      params: The base's params: any pytree, which may be `nnx.state(model, nnx.Param)`.
      adapters: The adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
      dtype: The dtype of merged kernels and trained arrays; None for their own dtypes.
      any_base: True to merge into other weights than the adapters were trained on.
        They know those if `save` was given `params`.
      rounding: The way to round to less than 32 bits: "nearest", or "dither": as many
        numbers away from zero as keeps the delta in the mean, the same in each run.

    Returns:
      A new tree of the same structure; unadapted leaves are the same arrays.

    Raises:
      TypeError: A leaf is not an array, or a kernel's dtype is not floating-point.
      ValueError: Adapters and params do not fit, an M holds NaN or infinity,
        `rounding` is unknown, a kernel is of another base, or a sum is beyond the range
        of its dtype, such as float16.

    Example::

      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> merged = mora_jax.merge(params, mora_jax.init(mora_jax.plan(params)))
      >>> bool((merged["fc"]["kernel"] == params["fc"]["kernel"]).all())
      True
    """
    check_rounding(rounding)
    found = checked_adapters(adapters)
    new = merged(params, found, dtype, rounding, any_base)
    _refuse_overflow(params, new, found)
    return new


def fold(params: Any, adapters: Any, dtype: DTypeLike | None = None) -> Any:
    r"""The base with its deltas added, inside of jit: :math:`W' = W + \alpha\, C M D`.

    Unlike `merge`, whose arguments, results and errors it shares, `fold` checks neither
    numbers nor the base, and rounds to nearest, so that it can be compiled and
    differentiated. It trains any model that is a function of its params, as one of
    Haiku or Equinox, by `loss(fold(params, adapters))`. An override says which
    axes a kernel has if not (in, out): `{".*weight": {"axes": "oi"}}`. This costs more
    than `linen.wrap` and `nnx.wrap`: each step forms all deltas and their gradients.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> def loss(adapters, params):
      ...     return jnp.mean(mora_jax.fold(params, adapters)["kernel"] ** 2)
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> jax.jit(jax.grad(loss))(adapters, params)
      {'kernel_mora': Adapter(block_diagonal, float32[1, 8, 8])}
    """
    return merged(params, checked_adapters(adapters, finite=False), dtype)


def unmerge(params: Any, adapters: Any) -> Any:
    r"""Subtract the deltas from merged kernels: :math:`W = W' - \alpha\, C M D`.

    `params` are what `merge` returned. The result is approximate: each kernel comes
    back to within the rounding of its dtype. Keep the base itself to have it exactly.

    Raises:
      TypeError, ValueError: As `merge`; a kernel has fewer than 32 bits and so would
        drift; or arrays are trained, whose old values are in no merged params.

    Example::

      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = jax.tree.map(jnp.ones_like, mora_jax.init(mora_jax.plan(params)))
      >>> merged = mora_jax.merge(params, adapters)
      >>> mora_jax.unmerge(merged, adapters)["fc"]["kernel"][0, :2].round(5)
      Array([1., 1.], dtype=float32)
    """
    found, kernels = checked_adapters(adapters), {}
    found.refuse_trained("so that merging replaced it; keep the base instead")
    for path, (place, kernel) in found.in_base(params).items():
        if jnp.finfo(kernel.dtype).bits < 32:
            got = f"{kernel.dtype} at {'/'.join(path)!r}; keep the base instead"
            raise ValueError(f"unmerge needs float32 kernels, got {got}")
        # Not `merged_kernel` of -M: the delta of some operators is not linear in M.
        delta = delta_of(found[path], kernel.dtype)
        kernels[place] = (kernel - delta).astype(kernel.dtype)
    return replace_leaves(params, kernels)


def _refuse_overflow(params: Any, new: Any, found: Found) -> None:
    """Raise if a merged array left the range of its dtype, as float16's."""
    before = found.in_base(params)
    for path, (_, array) in found.in_base(new).items():
        traced = isinstance(array, Tracer) or isinstance(before[path][1], Tracer)
        # bfloat16 has float32's range, which no merge leaves.
        if traced or jnp.finfo(array.dtype).max >= jnp.finfo(jnp.bfloat16).max:
            continue
        if not jnp.isfinite(array).all() and jnp.isfinite(before[path][1]).all():
            name = "/".join(path)
            raise ValueError(f"{name!r} overflows {array.dtype} with its delta")


def merged(
    params: Any,
    found: Found,
    dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    any_base: bool = True,
) -> Any:
    """`merge` of adapters that are checked already."""
    new = {}
    for path, (place, array) in found.in_base(params, any_base=any_base).items():
        if (adapter := found[path]).of_kernel:
            new[place] = merged_kernel(adapter, array, dtype=dtype, rounding=rounding)
        else:
            new[place] = jnp.asarray(adapter.m, dtype or array.dtype)
    return replace_leaves(params, new)


def merged_kernel(
    adapter: Adapter,
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
    delta = delta_of(adapter, kernel.dtype)
    return add_rounded(kernel, delta, adapter.spec.axes, dtype, rounding, start)
