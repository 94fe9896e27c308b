r"""The adapted product, in two ways.

.. math:: y = x W + \alpha\, D(C(x) M) = x\,(W + \alpha\, C M D)

The first way, *activation*, reads the input and the output once more; the second,
*fold*, the kernel. So a fold pays where an input has many rows. It is made anew in the
backward pass, so that no folded kernel is kept, and the gradient of M is taken from x
and y: none of a kernel's shape is ever formed.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._interception import intercepted, undisturbed
from mora_jax._types import ArrayLike, Shape
from mora_jax.explicit import explicit_sharding, layout_of, left_to_xla
from mora_jax.folding import Multiply, folded_product
from mora_jax.fusing import fused_product, fuses
from mora_jax.layers import LayerRule
from mora_jax.layout import gather_m, on_kernel, on_rows
from mora_jax.products import Contraction, KernelUpdate, Lookup, Product
from mora_jax.spec import AdapterSpec


@undisturbed
def update(
    spec: AdapterSpec,
    m: ArrayLike,
    x: ArrayLike,
    product: Product,
    *,
    dtype: DTypeLike,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""What the adapter adds to a layer's output: :math:`\alpha\, D(C(x) M)`.

    Args:
      spec: the adapter.
      m: M, (*stack, q, q) with the stack axes of `product`.
      x: the layer's input.
      product: how the layer multiplies it with its kernel.
      dtype: of the computation and of the result: that of the layer's output.
      dropout_key: drops some of `x` if given.
      precision: of the product with M.

    Returns:
      The shape of the layer's output.

    Raises:
      ValueError: the plan reads the kernel's axes otherwise than the layer.
    """
    check_product(spec, product)
    m, x = jnp.asarray(m).astype(dtype), jnp.asarray(x)
    m = gather_m(m, spec.layout, x)
    kernel = _kernel_update(spec, product, m, precision)
    if isinstance(product, Lookup):  # an index is dropped with its row
        y = product.update(kernel, x)
        y = _dropout(y, (*x.shape, 1), dropout_key, spec.dropout)
    else:
        x = _dropout(x.astype(dtype), x.shape, dropout_key, spec.dropout)
        y = product.update(kernel, x)
    return y * jnp.asarray(spec.alpha, dtype)


def _add_update(
    y: jax.Array,
    spec: AdapterSpec,
    m: ArrayLike,
    x: ArrayLike,
    product: Product,
    dropout_key: PRNGKeyArray | None,
    precision: jax.lax.PrecisionLike,
    factor: jax.Array | None = None,
) -> jax.Array:
    """A layer's output with its update, times `factor` if there is one."""
    sharding = explicit_sharding(y)
    if sharding is not None:
        layout = layout_of(product, x, sharding)
        spec = dataclasses.replace(spec, layout=layout)

    def one(m: ArrayLike, x: ArrayLike, key: PRNGKeyArray | None) -> jax.Array:
        settings = {"dtype": y.dtype, "dropout_key": key, "precision": precision}
        delta = update(spec, m, x, product, **settings)
        return delta if factor is None else delta * factor.astype(y.dtype)

    if sharding is None:
        return y + one(m, x, dropout_key)
    return y + left_to_xla(one, sharding, m, x, dropout_key)


def check_product(spec: AdapterSpec, product: Product) -> None:
    """Raise unless the layer reads the kernel's axes as the plan does.

    Leading stack axes of the plan may be ones that a lifted transformation takes off.
    """
    lead = len(spec.axes) - len(product.axes)
    if set(spec.axes[:lead]) - {"s"} or not product.fits(spec.axes[lead:]):
        raise ValueError(
            f"{spec.name}: the plan reads its axes as {spec.axes!r}, the layer "
            f"computes {product.axes!r}; plan with mora_jax.linen.plan or "
            f"mora_jax.nnx.plan, or say overrides={{{spec.name!r}: "
            f"{{'axes': {product.axes!r}}}}}"
        )


@undisturbed
def kernel_update(spec: AdapterSpec, m: ArrayLike) -> jax.Array:
    r"""The update as a kernel, :math:`\alpha\, C M D`, of the kernel's shape."""
    m = jnp.asarray(m)
    shape, axes = spec.kernel_shape, spec.axes
    operator = on_kernel(spec.operator, spec.layout, axes, shape)
    kernel = KernelUpdate(operator, m, shape, axes).kernel()
    return kernel * jnp.asarray(spec.alpha, m.dtype)


def _kernel_update(
    spec: AdapterSpec,
    product: Product,
    m: jax.Array,
    precision: jax.lax.PrecisionLike,
) -> KernelUpdate:
    inner = slice(len(spec.axes) - len(product.axes), None)
    shape, axes = spec.kernel_shape[inner], spec.axes[inner]
    operator = on_rows(spec.operator, spec.layout, axes, shape)
    return KernelUpdate(operator, m, shape, axes, precision)


def _dropout(
    x: jax.Array, shape: Shape, key: PRNGKeyArray | None, rate: float
) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0)


def folds(spec: AdapterSpec, product: Product, x: Any, dtype: DTypeLike) -> bool:
    """Whether `adapted_product` folds; decided by shapes and dtype alone.

    Only dense layers fold, and not where one call multiplies a stack of kernels. "auto"
    folds from as many rows on as made it faster in `benchmarks/one_layer.py`, and in no
    16-bit dtype: a fold rounds to it, which `benchmarks/bfloat16.py` saw slow learning.
    Nor where a kernel is gathered, which a fold in the backward pass would do again.
    """
    if not isinstance(product, Contraction) or "s" in product.axes:
        return False
    if explicit_sharding(x) is not None:  # a fold's steps are of no such type
        return False
    if product.axes != spec.axes[len(spec.axes) - len(product.axes) :]:
        return False
    if spec.execution != "auto":
        return spec.execution == "fold"
    if spec.layout is not None and spec.layout.gathers:
        return False
    ins, outs = spec.in_features, spec.out_features
    rows = math.prod(x.shape) / ins
    fast = rows >= spec.operator.fold_from * ins * outs / (ins + outs)
    return fast and jnp.finfo(dtype).bits >= 32


def adapted_product(
    spec: AdapterSpec,
    m: ArrayLike,
    x: ArrayLike,
    kernel: Any,
    product: Product,
    multiply: Multiply,
    *,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""A layer's product with its adapter: :math:`x W + \alpha\, D(C(x) M)`.

    Args:
      spec: the adapter.
      m: M, as for `update`.
      x: the layer's input.
      kernel: W, of the same dtype; or what stands for a quantized one, which `multiply`
        understands.
      product: what `multiply` computes.
      multiply: the layer's own product.
      dropout_key: drops some of what the adapter sees of `x`; nothing is folded then.
      precision: of the product with M.
    """
    check_product(spec, product)
    x = jnp.asarray(x)
    if _is_floating(kernel) and (
        joined := _joined(spec, product, x, kernel.dtype, dropout_key)
    ):
        return joined(spec, m, x, jnp.asarray(kernel), product, multiply, precision)
    y = multiply(x, kernel)
    return _add_update(y, spec, m, x, product, dropout_key, precision)


def _joined(
    spec: AdapterSpec,
    product: Product,
    x: Any,
    dtype: DTypeLike,
    dropout_key: PRNGKeyArray | None,
) -> Callable[..., jax.Array] | None:
    """What computes product and update as one, if that is better here and may be done.

    Not where another library computes the layer's product: it would be given, in place
    of the kernel that it knows, one with an update, and round it.
    """
    if dropout_key is not None or intercepted():
        return None
    if folds(spec, product, x, dtype):
        return folded_product
    return fused_product if fuses(spec, product, x) else None


def _is_floating(kernel: Any) -> bool:
    """Whether it is an array that can be added to; a quantized kernel is not."""
    is_array = isinstance(kernel, jax.Array | np.ndarray)
    return is_array and jnp.issubdtype(kernel.dtype, jnp.floating)


def adapt_call(
    call: Callable[[], jax.Array],
    module: Any,
    rule: LayerRule,
    spec: AdapterSpec,
    m: Callable[[], ArrayLike],
    x: Any,
    product: Product,
    dropout_key: PRNGKeyArray | None = None,
) -> jax.Array:
    """What `call()`, a method of a Flax layer, gives with an adapter.

    Args:
      call: the method with its arguments.
      module: the layer.
      rule: what is known of the method.
      spec: the adapter.
      m: gives M; asked for once, when the layer has made its own parameters.
      x: the layer's input.
      product: what the method computes, but for the bias.
      dropout_key: for the adapter's dropout.
    """
    check_product(spec, product)
    precision = getattr(module, "precision", None)
    if rule.multiplies_by_dot_general(module) and _joined(
        spec, product, x, jnp.float32, dropout_key
    ):

        def dot_general(
            x: ArrayLike, kernel: Any, dimension_numbers: Any, **settings: Any
        ) -> jax.Array:
            contracted, batch = dimension_numbers  # of lists, perhaps
            axes = tuple(map(tuple, contracted)), tuple(map(tuple, batch))
            multiply = _DotGeneral(axes, tuple(settings.items()))
            return adapted_product(
                spec, m(), x, kernel, product, multiply, precision=precision
            )

        with _replaced(module, "dot_general", dot_general):
            return call()
    y, after = call(), None
    if (scale := rule.scale_of(module)) is not None:
        if not isinstance(product, Contraction):
            raise ValueError(
                f"{spec.name}: scale= of register_layer is for layers that compute an "
                f"einsum, got {type(product).__name__}"
            )
        before, after = product.factors(scale)
        x = jnp.asarray(x).astype(y.dtype) * before.astype(y.dtype)
    return _add_update(y, spec, m(), x, product, dropout_key, precision, after)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    # Past the module's own __setattr__: both Flax APIs guard what users assign.
    before = getattr(module, name)
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__setattr__(module, name, before)


@dataclasses.dataclass(frozen=True)
class _DotGeneral:
    """`jax.lax.dot_general` with its settings."""

    dimension_numbers: Any
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        settings = dict(self.settings)
        return jax.lax.dot_general(x, kernel, self.dimension_numbers, **settings)
