"""One dense layer with its adapter, as a pure function."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray, Shaped

from mora_jax._common.axes import sizes
from mora_jax._common.checks import as_jax_array, check_kernel, check_key, check_leaf
from mora_jax._common.trees import unboxed
from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import static
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._layer.ways import adapted_product
from mora_jax._mesh.places import KernelLayout
from mora_jax._plan.settings import SETTINGS, AdapterSettings, MoRAConfig
from mora_jax._plan.spec import SUFFIX, AdapterSpec, check_same
from mora_jax.operators._base import Operator
from mora_jax.operators._pytree import register_pytree
from mora_jax.products.contraction import Contraction


@dataclasses.dataclass(frozen=True)
class FrozenDense(AdapterSettings):
    """Everything of a dense layer that is not trained.

    It is a pytree, whose leaves are kernel, bias and the operator's arrays. Fields that
    are not listed here are as for `AdapterSpec`.

    Attributes:
      kernel: W, (in, out), or an array of any number of axes that `axes` explains.
      bias: b, of the shape (*stack, *out); or None.
      operator: C and D for the kernel's flattened widths.
      precision: The precision of both products, as in `jax.lax.dot_general`.

    Example::

      >>> import mora_jax
      >>> config = mora_jax.MoRAConfig(square_rank=2, operator="rotation")
      >>> frozen = mora_jax.FrozenDense.from_config(jnp.ones((4, 6)), config=config)
      >>> mora_jax.mora_apply(mora_jax.init(frozen), frozen, jnp.ones((3, 4))).shape
      (3, 6)
    """

    # The settings stand here and not in a spec, which holds the kernel's shape:
    # `jax.vmap` over a stack of kernels changes that. Arrays are Any, since JAX puts
    # shapes and the leaves of a `jax.tree.map` in their places.
    kernel: Any
    bias: Any
    operator: Operator
    axes: str = "io"
    precision: jax.lax.PrecisionLike = None
    layout: KernelLayout | None = None

    @classmethod
    def from_config(
        cls,
        kernel: ArrayLike | jax.ShapeDtypeStruct,
        bias: ArrayLike | jax.ShapeDtypeStruct | None = None,
        *,
        config: MoRAConfig | None = None,
        axes: str = "io",
    ) -> "FrozenDense":
        """A layer with the adapter that `config` asks for.

        Args:
          kernel: W, or its shape.
          bias: b, or its shape; None for a layer without a bias.
          config: The settings; None for the defaults.
          axes: The meaning of the kernel's axes, a letter each.

        Raises:
          TypeError: `kernel` is not a floating-point array.
          ValueError: `axes` or the rank do not fit the kernel, or `config` has `train`.
        """
        check_kernel(kernel, "kernel")
        shape, dtype = tuple(kernel.shape), kernel.dtype
        spec = AdapterSpec.from_config(config, shape, axes, kernel_dtype=dtype)
        settings = {name: getattr(spec, name) for name in SETTINGS}
        return cls(kernel, bias, spec.operator, axes, **settings)

    @property
    def spec(self) -> AdapterSpec:
        """The kernel's adapter."""
        check_kernel(self.kernel, "kernel")
        settings = {name: getattr(self, name) for name in SETTINGS}
        place = tuple(self.kernel.shape), self.axes, self.layout
        return AdapterSpec(self.operator, *place, **settings)


register_pytree(FrozenDense, ["kernel", "bias", "operator"])


def mora_apply(
    params: Mapping[str, Any],
    frozen: FrozenDense,
    x: Shaped[ArrayLike, "..."],
    *,
    key: PRNGKeyArray | None = None,
    deterministic: bool = False,
) -> Float[jax.Array, "..."]:
    r"""One adapted dense layer, :math:`y = x W + b + \alpha\, D(C(x) M)`.

    Args:
      params: The trained part, `{"kernel_mora": M}`: an adapter, as `init` makes it, or
        a plain array (*stack, *m_shape).
      frozen: Kernel, bias and operator.
      x: The layer's input, (*stack, *batch, *in).
      key: The key for dropout, which is needed where `frozen.dropout` is above zero.
      deterministic: Whether to switch dropout off.

    Returns:
      (*stack, *batch, *out) in the dtype that x, kernel and bias promote to.

    Raises:
      TypeError: An argument is not an array, or M or the kernel is not floating-point.
      ValueError: The shapes do not fit, or dropout lacks a key.

    Example::

      >>> import mora_jax
      >>> truncation = mora_jax.operators.Truncation(3, 3, square_rank=1)
      >>> frozen = mora_jax.FrozenDense(jnp.eye(3), None, truncation)
      >>> params = {"kernel_mora": jnp.array([[0.5]])}
      >>> mora_jax.mora_apply(params, frozen, jnp.ones((1, 3)))
      Array([[1.5, 1. , 1. ]], dtype=float32)
    """
    adapter = params_adapter(params, frozen)
    m, spec = adapter.m, adapter.spec
    check_key(key)
    drops = spec.dropout > 0 and not deterministic
    if drops and key is None:
        hint = "pass one, or deterministic=True"
        raise ValueError(f"dropout={spec.dropout} needs a key, got None; {hint}")
    x = as_jax_array("x", x)
    kernel = as_jax_array("kernel", frozen.kernel)
    bias = None if frozen.bias is None else as_jax_array("bias", frozen.bias)
    contraction = Contraction.from_axes(spec.axes, x.ndim)
    contraction.check_input(tuple(x.shape), spec.kernel_shape)
    dtype = jnp.result_type(x, kernel, *([] if bias is None else [bias]))
    precision, dropout_key = frozen.precision, key if drops else None
    multiply = static(jnp.einsum, contraction.equation, precision=precision)
    inputs = x.astype(dtype), kernel.astype(dtype), contraction, multiply
    y = adapted_product(spec, m, *inputs, dropout_key=dropout_key, precision=precision)
    if bias is None:
        return y
    stack, outs = spec.stack_shape, sizes(spec.kernel_shape, spec.axes, "o")
    if tuple(bias.shape) != stack + outs:
        raise ValueError(f"bias must have shape {stack + outs}, got {bias.shape}")
    ones = (1,) * (y.ndim - bias.ndim)  # the batch's axes
    return y + bias.reshape(stack + ones + outs).astype(dtype)


def params_adapter(params: Mapping[str, Any], frozen: FrozenDense) -> Adapter:
    """The adapter in `{"kernel_mora": M}`, checked; a plain M is for the layer."""
    expected = f"kernel{SUFFIX}"
    if not isinstance(frozen, FrozenDense):
        raise TypeError(f"frozen must be a FrozenDense, got {type(frozen).__name__}")
    if not isinstance(params, Mapping) or set(params) != {expected}:
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"params must hold {expected!r} and nothing else, got {got}")
    m, spec = params[expected], frozen.spec
    if (own := getattr(m, "spec", None)) is not None:  # also of a variable of NNX
        m = m.m if isinstance(m, Adapter) else unboxed(m)
        check_same("kernel", check_adapter(expected, Adapter(m, own)).spec, spec)
    check_leaf(m, expected, spec.shape)  # and not of a stack of such layers
    return Adapter(m, spec)
