"""How one kernel is adapted: all but the arrays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._axes import check_axes, sizes
from mora_jax._config import (
    EXECUTIONS,
    INITS,
    MoRAConfig,
    check_choice,
    check_config,
    check_number,
    check_rate,
    floating_dtype,
)
from mora_jax._mesh.layout import KernelLayout
from mora_jax._types import Shape
from mora_jax.operators import Operator, make_operator, square_rank
from mora_jax.operators._registry import resolve_auto

SUFFIX = "_mora"
"""M is stored beside its kernel, under the kernel's name and this."""

DEQUANTISE = "dequantise it first, or leave it out with exclude"
"""What messages advise where a kernel is not floating-point."""


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
      layout: where its features are on a mesh, as `sharding.plan_on_mesh` finds it;
        None for one device.
      base_digest: what tells the kernel apart that the adapter was trained on, one
        digest for each index of its stack axes; None where no file has said. Two specs
        that differ in this alone are equal.
      rank: the budget that q was chosen by; None where q was given itself, or read from
        a file. Two specs that differ in this alone are equal.
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
    layout: KernelLayout | None = None
    base_digest: tuple[str, ...] | None = dataclasses.field(default=None, compare=False)
    rank: int | None = dataclasses.field(default=None, compare=False)

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
        object.__setattr__(self, "alpha", check_number("alpha", self.alpha))
        object.__setattr__(self, "dropout", check_rate(self.dropout))
        check_choice("init", self.init, INITS)
        check_choice("execution", self.execution, EXECUTIONS)
        object.__setattr__(self, "param_dtype", floating_dtype(self.param_dtype))

    @classmethod
    def from_config(
        cls,
        config: MoRAConfig | None,
        kernel_shape: Shape,
        axes: str = "io",
        path: tuple[str, ...] = ("kernel",),
        *,
        kernel_dtype: DTypeLike | None = None,
    ) -> "AdapterSpec":
        """The adapter that `config` asks for on a kernel of `kernel_shape`.

        Where `config.param_dtype` is None, `kernel_dtype` must be given.
        """
        config = check_config(config)
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
            rank=config.rank if config.square_rank is None else None,
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

    def seen_by(self, ndim: int | None) -> tuple[Shape, str]:
        """Shape and axes of the kernel as a layer sees it.

        Args:
          ndim: How many axes the layer sees, the last ones: a lifted transformation
            takes off leading stack axes. None stands for all.
        """
        first = 0 if ndim is None else len(self.axes) - ndim
        return self.kernel_shape[first:], self.axes[first:]

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

    @property
    def asked_square_rank(self) -> int | None:
        """The q that the budget would buy, where the layer is too small to have it."""
        if self.rank is None:
            return None
        asked = math.isqrt((self.in_features + self.out_features) * self.rank)
        return asked if asked > min(self.in_features, self.out_features) else None

    @property
    def meaning(self) -> dict[str, Any]:
        """What decides which update an M stands for, as JSON can hold it.

        Neither what decides how it is trained or computed (dropout, init, execution,
        the dtype, where it is on a mesh), nor the path.
        """
        settings = operator_settings(self.operator)
        return {
            **{f"operator.{name}": value for name, value in settings.items()},
            "kernel_shape": list(self.kernel_shape),
            "axes": self.axes,
            "square_rank": self.operator.square_rank,
            "alpha": self.alpha,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The meaning, and how M is trained and computed."""
        return {
            **self.meaning,
            "dropout": self.dropout,
            "init": self.init,
            "execution": self.execution,
            "param_dtype": jnp.dtype(self.param_dtype).name,
        }

    def stacked(self, sizes: Shape, path: tuple[str, ...]) -> "AdapterSpec":
        """The same adapter for a stack of such kernels, its axes in front."""
        return dataclasses.replace(
            self,
            path=path,
            kernel_shape=(*sizes, *self.kernel_shape),
            axes="s" * len(sizes) + self.axes,
        )


_SIZES = {"in_features", "out_features", "square_rank"}


def operator_settings(operator: Operator) -> dict[str, Any]:
    """Name and settings, the seed too, but no sizes."""
    fields = {f.name for f in dataclasses.fields(operator) if f.init} - _SIZES
    values = {name: getattr(operator, name) for name in sorted(fields)}
    return {"name": operator.name, **values}


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """{name: its two values} where the settings of two adapters of a kernel differ.

    A setting that only one of two operators has is left out: their names differ.
    """
    return {
        name: (one[name], other[name])
        for name in one
        if name in other and one[name] != other[name]
    }


def check_same(made_for: AdapterSpec, used_with: AdapterSpec) -> None:
    """Raise unless an M that was made for one adapter is right for the other."""
    if differing := differences(made_for.meaning, used_with.meaning):
        settings = " and ".join(
            f"{name} {one!r}, not {other!r}" for name, (one, other) in differing.items()
        )
        raise ValueError(f"{used_with.name}{SUFFIX} was made for {settings}")


def check_kernel(kernel: Any, name: str) -> None:
    """Raise unless `kernel` has a shape and a floating-point dtype that MoRA adapts."""
    if not hasattr(kernel, "shape") or not hasattr(kernel, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(kernel).__name__}")
    if not jax.tree_util.all_leaves([kernel]):  # qwix's kernels have both
        raise TypeError(
            f"{name} must be an array, got the structure {type(kernel).__name__}; "
            f"{DEQUANTISE}"
        )
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating-point dtype, got {kernel.dtype}; {DEQUANTISE}"
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


def check_key(key: Any) -> None:
    """Raise unless `key` is one of JAX's keys, or None."""
    if key is None:
        return
    typed = raw = False
    if isinstance(key, jax.Array | np.ndarray):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        raw = key.dtype == jnp.uint32 and key.ndim == 1  # made by jax.random.PRNGKey
    if not typed and not raw:
        raise TypeError(
            "key must be a JAX PRNG key, such as jax.random.key(42), "
            f"got {key if isinstance(key, int) else type(key).__name__}"
        )
    if typed and key.shape:
        raise ValueError(f"key must be one key, got an array of {key.shape}")


def init_adapter(spec: AdapterSpec, key: PRNGKeyArray | None = None) -> jax.Array:
    """M as `spec.init` wants it, shape (*stack, q, q)."""
    check_key(key)
    dtype = spec.param_dtype
    if spec.init == "zeros":
        return _zeros(spec.shape, dtype)
    if key is None:
        raise ValueError("init='gaussian' needs a key, got None")
    std = 1 / math.sqrt(spec.operator.square_rank)
    return std * _normal(key, spec.shape, dtype)
