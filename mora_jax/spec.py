"""How one kernel is adapted: all but the arrays."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._types import Shape
from mora_jax.axes import check_axes, sizes
from mora_jax.config import (
    EXECUTIONS,
    INITS,
    MoRAConfig,
    check_choice,
    check_number,
    check_rate,
    floating_dtype,
)
from mora_jax.layout import Layout
from mora_jax.operators import Operator, make_operator, square_rank
from mora_jax.operators._registry import resolve_auto

SUFFIX = "_mora"
"""M is stored beside its kernel, under the kernel's name and this."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """How one kernel is adapted: all but the arrays; hashable.

    Attributes:
      operator: the maps C and D.
      kernel_shape: the kernel's shape, stack axes included.
      axes: the meaning of the kernel's axes, a letter each: "i", "o" or "s".
      alpha: factor of the update.
      dropout: rate on the adapter's input.
      init: "zeros" or "gaussian".
      param_dtype: of M.
      execution: "auto", "activation" or "fold", as in `MoRAConfig`.
      path: the kernel's place in its params tree, a tuple of keys.
      layout: where its features are on a mesh, as `sharding.shard` finds it; None for
        one device.
    """

    operator: Operator
    kernel_shape: Shape
    axes: str = "io"
    alpha: float = 1.0
    dropout: float = 0.0
    init: str = "zeros"
    param_dtype: DTypeLike = jnp.float32
    execution: str = "auto"
    path: tuple[str, ...] = ("kernel",)
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(f"operator must be an Operator, got {self.operator!r}")
        check_axes(self.axes, len(self.kernel_shape))
        widths = self.operator.in_features, self.operator.out_features
        if widths != (self.in_features, self.out_features):
            raise ValueError(
                f"operator for {widths[0]} -> {widths[1]} features does not fit a "
                f"kernel of shape {self.kernel_shape} with axes {self.axes!r}: "
                f"{self.in_features} -> {self.out_features}"
            )
        check_number("alpha", self.alpha)
        check_rate(self.dropout)
        check_choice("init", self.init, INITS)
        check_choice("execution", self.execution, EXECUTIONS)
        object.__setattr__(self, "param_dtype", floating_dtype(self.param_dtype))

    @classmethod
    def from_config(
        cls,
        config: MoRAConfig,
        kernel_shape: Shape,
        axes: str = "io",
        path: tuple[str, ...] = ("kernel",),
        *,
        kernel_dtype: DTypeLike | None = None,
    ) -> "AdapterSpec":
        """The adapter that `config` asks for on a kernel of `kernel_shape`.

        Where `config.param_dtype` is None, `kernel_dtype` must be given.
        """
        check_axes(axes, len(kernel_shape))
        in_features = math.prod(sizes(kernel_shape, axes, "i"))
        out_features = math.prod(sizes(kernel_shape, axes, "o"))
        param_dtype = config.param_dtype
        if param_dtype is None:
            param_dtype = floating_dtype(kernel_dtype)
        q, operator = config.square_rank, config.operator
        if q is None:
            operator = resolve_auto(operator, config.rank)
            q = square_rank(
                config.rank, in_features, out_features, operator, config.multiple_of
            )
        elif q > min(in_features, out_features):
            raise ValueError(
                f"square_rank must be at most min(in_features, out_features) = "
                f"{min(in_features, out_features)}, got {q}"
            )
        return cls(
            operator=make_operator(
                operator, in_features, out_features, q, seed=config.seed
            ),
            kernel_shape=kernel_shape,
            axes=axes,
            alpha=config.alpha,
            dropout=config.dropout,
            init=config.init,
            param_dtype=param_dtype,
            execution=config.execution,
            path=path,
        )

    @property
    def name(self) -> str:
        """The kernel's path, slash-joined."""
        return "/".join(self.path)

    @property
    def in_features(self) -> int:
        """Product of the kernel's input axes."""
        return math.prod(sizes(self.kernel_shape, self.axes, "i"))

    @property
    def out_features(self) -> int:
        """Product of the kernel's output axes."""
        return math.prod(sizes(self.kernel_shape, self.axes, "o"))

    @property
    def shape(self) -> Shape:
        """Shape of M: (*stack, q, q)."""
        q = self.operator.square_rank
        return (*sizes(self.kernel_shape, self.axes, "s"), q, q)

    @property
    def parameters(self) -> int:
        """How many numbers M holds."""
        return math.prod(self.shape)

    @property
    def lora_rank(self) -> float:
        """The rank of a LoRA with as many parameters: q^2 / (in + out)."""
        q = self.operator.square_rank
        return q * q / (self.in_features + self.out_features)


def check_kernel(kernel: Any, name: str) -> None:
    """Raise unless `kernel` has a shape and a floating-point dtype that MoRA adapts."""
    if not hasattr(kernel, "shape") or not hasattr(kernel, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(kernel).__name__}")
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating-point dtype, got {kernel.dtype}; "
            "dequantise it first, or leave it out with exclude"
        )
    if len(kernel.shape) < 2 or 0 in kernel.shape:
        raise ValueError(
            f"{name} must have at least two axes, none of them empty, "
            f"got shape {tuple(kernel.shape)}"
        )


def check_adapter(m: Any, spec: AdapterSpec) -> None:
    """Raise unless `m` can be the M of `spec`."""
    name = f"{spec.name}{SUFFIX}"
    if not hasattr(m, "shape") or not hasattr(m, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(m).__name__}")
    if tuple(m.shape) != spec.shape:
        raise ValueError(f"{name} must have shape {spec.shape}, got {tuple(m.shape)}")
    if not jnp.issubdtype(m.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating-point dtype, got {m.dtype}")


# One program for each shape: a tenth of what JAX's own functions take when called so.
_zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))
_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


def init_adapter(spec: AdapterSpec, key: PRNGKeyArray | None = None) -> jax.Array:
    """M as `spec.init` wants it, shape (*stack, q, q)."""
    dtype = spec.param_dtype
    if spec.init == "zeros":
        return _zeros(spec.shape, dtype)
    if key is None:
        raise ValueError("init='gaussian' needs a key, got None")
    std = 1 / math.sqrt(spec.operator.square_rank)
    return std * _normal(key, spec.shape, dtype)
