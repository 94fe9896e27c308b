r"""One dense layer with its adapter: the equation.

.. math:: y = x W + b + \alpha\, D(C(x) M), \qquad W' = W + \alpha\, C M D
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray, Shaped

from mora_jax._types import ArrayLike, Shape
from mora_jax.axes import sizes
from mora_jax.config import MoRAConfig
from mora_jax.operators import Operator
from mora_jax.products import Contraction, KernelUpdate, Lookup, Product
from mora_jax.spec import SUFFIX, AdapterSpec, check_adapter, check_kernel


@dataclasses.dataclass(frozen=True)
class FrozenDense:
    """All of a dense layer that is not trained.

    A pytree: kernel, bias and the operator's arrays are leaves, the rest is static.

    Attributes:
      kernel: (in, out), or any number of axes that `axes` explains.
      bias: the shape of the output features, behind any stack axes; or None.
      operator: C and D for the kernel's flattened widths.
      axes: the kernel's axes, a letter each: "i" input, "o" output, "s" stacked.
      alpha: factor of the update.
      dropout: rate on the adapter's input.
      init: of M, "zeros" or "gaussian".
      param_dtype: of M.
      precision: of both products, as in `jax.lax.dot_general`.

    Example::

      >>> from mora_jax import FrozenDense, MoRAConfig, init, mora_apply
      >>> config = MoRAConfig(square_rank=2, operator="rotation")
      >>> frozen = FrozenDense.from_config(jnp.ones((4, 6)), config=config)
      >>> params = init(frozen)
      >>> mora_apply(params, frozen, jnp.ones((3, 4))).shape
      (3, 6)
    """

    # Any: arrays, or what JAX puts in their place, as shapes and the leaves of a map.
    kernel: Any
    bias: Any
    operator: Operator
    axes: str = "io"
    alpha: float = 1.0
    dropout: float = 0.0
    init: str = "zeros"
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @classmethod
    def from_config(
        cls,
        kernel: ArrayLike | jax.ShapeDtypeStruct,
        bias: ArrayLike | jax.ShapeDtypeStruct | None = None,
        *,
        config: MoRAConfig | None = None,
        axes: str = "io",
    ) -> "FrozenDense":
        """A layer with the adapter that `config` asks for."""
        check_kernel(kernel, "kernel")
        spec = AdapterSpec.from_config(config or MoRAConfig(), kernel.shape, axes)
        settings = {f: getattr(spec, f) for f in cls._shared}
        return cls(kernel, bias, **settings)

    _shared = ("operator", "axes", "alpha", "dropout", "init", "param_dtype")

    @property
    def spec(self) -> AdapterSpec:
        """The description of its adapter."""
        check_kernel(self.kernel, "kernel")
        settings = {f: getattr(self, f) for f in self._shared}
        return AdapterSpec(kernel_shape=tuple(self.kernel.shape), **settings)


jax.tree_util.register_dataclass(
    FrozenDense,
    data_fields=["kernel", "bias", "operator"],
    meta_fields=["axes", "alpha", "dropout", "init", "param_dtype", "precision"],
)


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

    The one place where it is computed, for every layer and both Flax APIs.

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
    inner = slice(len(spec.axes) - len(product.axes), None)
    m, x = jnp.asarray(m).astype(dtype), jnp.asarray(x)
    kernel = KernelUpdate(
        spec.operator, m, spec.kernel_shape[inner], spec.axes[inner], precision
    )
    if isinstance(product, Lookup):  # an index is dropped with its row
        y = product.update(kernel, x)
        y = _dropout(y, (*x.shape, 1), dropout_key, spec.dropout)
    else:
        x = _dropout(x.astype(dtype), x.shape, dropout_key, spec.dropout)
        y = product.update(kernel, x)
    return y * jnp.asarray(spec.alpha, dtype)


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


def _dropout(
    x: jax.Array, shape: Shape, key: PRNGKeyArray | None, rate: float
) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0)


def kernel_update(spec: AdapterSpec, m: ArrayLike) -> jax.Array:
    r"""The update as a kernel, :math:`\alpha\, C M D`, of the kernel's shape."""
    m = jnp.asarray(m)
    kernel = KernelUpdate(spec.operator, m, spec.kernel_shape, spec.axes).kernel()
    return kernel * jnp.asarray(spec.alpha, m.dtype)


def choose_dropout_key(
    spec: AdapterSpec, key: PRNGKeyArray | None, deterministic: bool
) -> PRNGKeyArray | None:
    """The key to drop with, or None; a missing one is an error."""
    if spec.dropout == 0 or deterministic:
        return None
    if key is None:
        raise ValueError(
            f"dropout={spec.dropout} needs a key, got None; "
            "pass one, or deterministic=True"
        )
    return key


def mora_apply(
    params: Mapping[str, ArrayLike],
    frozen: FrozenDense,
    x: Shaped[ArrayLike, "..."],
    *,
    key: PRNGKeyArray | None = None,
    deterministic: bool = False,
) -> Float[jax.Array, "..."]:
    r"""One adapted dense layer (paper equation 3).

    .. math:: y = x W + b + \alpha\, D(C(x) M)

    Args:
      params: `{"kernel_mora": M}`, M of shape (*stack, q, q).
      frozen: kernel, bias and operator.
      x: (*stack, *batch, *in).
      key: for dropout, where `frozen.dropout` is above zero.
      deterministic: no dropout.

    Returns:
      (*stack, *batch, *out) in the dtype that x, kernel and bias promote to.

    Raises:
      TypeError: something is no array, or M or the kernel is not floating-point.
      ValueError: shapes that do not fit, or dropout without a key.

    Example::

      >>> from mora_jax import FrozenDense, mora_apply
      >>> from mora_jax.operators import Truncation
      >>> frozen = FrozenDense(jnp.eye(3), None, Truncation(3, 3, square_rank=1))
      >>> mora_apply({"kernel_mora": jnp.array([[0.5]])}, frozen, jnp.ones((1, 3)))
      Array([[1.5, 1. , 1. ]], dtype=float32)
    """
    spec, m = frozen.spec, params_adapter(params, frozen)
    x = concrete("x", x)
    kernel = concrete("kernel", frozen.kernel)
    bias = None if frozen.bias is None else concrete("bias", frozen.bias)
    contraction = Contraction.from_axes(spec.axes, x.ndim)
    contraction.check_input(tuple(x.shape), spec.kernel_shape)
    dtype = jnp.result_type(x, kernel, *([] if bias is None else [bias]))
    y = jnp.einsum(
        contraction.equation,
        x.astype(dtype),
        kernel.astype(dtype),
        precision=frozen.precision,
    )
    if bias is not None:
        y = y + _spread_bias(bias, spec, y.ndim).astype(dtype)
    key = choose_dropout_key(spec, key, deterministic)
    return y + update(
        spec,
        m,
        x,
        contraction,
        dtype=y.dtype,
        dropout_key=key,
        precision=frozen.precision,
    )


def concrete(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array, tracers included, if it is an array."""
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{name} must be an array, got {type(value).__name__}"
            + "; for shapes alone call it under jax.eval_shape"
            * isinstance(value, jax.ShapeDtypeStruct)
        )
    return jnp.asarray(value)


def params_adapter(params: Mapping[str, ArrayLike], frozen: FrozenDense) -> ArrayLike:
    """M out of `{"kernel_mora": M}`, checked."""
    expected = f"kernel{SUFFIX}"
    if not isinstance(params, Mapping) or set(params) != {expected}:
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"params must hold {expected!r} and nothing else, got {got}")
    check_adapter(params[expected], frozen.spec)
    return params[expected]


def _spread_bias(bias: jax.Array, spec: AdapterSpec, ndim: int) -> jax.Array:
    """The bias with axes of length 1 where the output has batch axes."""
    stack = sizes(spec.kernel_shape, spec.axes, "s")
    outs = sizes(spec.kernel_shape, spec.axes, "o")
    if tuple(bias.shape) != stack + outs:
        raise ValueError(f"bias must have shape {stack + outs}, got {bias.shape}")
    ones = (1,) * (ndim - len(stack) - len(outs))
    return bias.reshape(stack + ones + outs)
