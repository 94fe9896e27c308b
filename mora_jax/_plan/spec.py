"""How one kernel is adapted: everything except the arrays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common.axes import check_axes, sizes
from mora_jax._common.checks import (
    check_choice,
    check_number,
    check_rate,
    floating_dtype,
)
from mora_jax._common.types import Shape
from mora_jax._mesh.layout import KernelLayout
from mora_jax._plan.config import EXECUTIONS, INITS, MoRAConfig, check_config
from mora_jax.operators import Operator, make_operator, square_rank
from mora_jax.operators._registry import fill_squares, resolve_auto

SUFFIX = "_mora"
"""What the name of an M ends in, after the name of its kernel."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """How one kernel is adapted: everything except the arrays; hashable.

    Attributes:
      operator: The maps C and D.
      kernel_shape: The kernel's shape, stack axes included.
      axes: The meaning of the kernel's axes, a letter each: "i", "o" or "s".
      alpha: The factor of the delta.
      scale: A second factor, which `MoRAConfig(scale=)` chooses for the kernel.
      dropout: The rate of dropout on the adapter's input.
      init: How M starts, "zeros" or "gaussian".
      param_dtype: The dtype of M.
      execution: How a dense layer computes, as in `MoRAConfig`.
      path: The kernel's place in its params tree, a tuple of keys.
      layout: Where the kernel's features are on a mesh, as `sharding.plan_on_mesh`
        finds it; None for one device.
      base_digest: Digests of the kernel that the adapter was trained on, one for each
        index of its stack axes; None if no file holds them. Two specs that differ in
        this alone are equal.
      rank: The budget that q was chosen by; None if q itself was given, or was read
        from a file. Two specs that differ in this alone are equal.

    Example::

      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64))}}
      >>> spec = mora_jax.plan(params, mora_jax.MoRAConfig(rank=2))["fc/kernel"]
      >>> spec.name, spec.shape, spec.parameters
      ('fc/kernel', (16, 16), 256)
    """

    operator: Operator
    kernel_shape: Shape
    axes: str = "io"
    alpha: float = 1.0
    scale: float = 1.0
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
        object.__setattr__(self, "scale", check_number("scale", self.scale))
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")
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
        """The adapter that `config` asks for on a kernel.

        Args:
          config: The settings; None for the default ones.
          kernel_shape: The kernel's shape.
          axes: The meaning of the kernel's axes, a letter each.
          path: The kernel's place in its params tree.
          kernel_dtype: The kernel's dtype, which is needed if `config.param_dtype` is
            None.

        Raises:
          ValueError: The axes do not fit the shape, or the kernel is too small.
        """
        config = check_config(config)
        check_axes(axes, len(kernel_shape))
        in_features = math.prod(sizes(kernel_shape, axes, "i"))
        out_features = math.prod(sizes(kernel_shape, axes, "o"))
        param_dtype = config.param_dtype
        if param_dtype is None:
            param_dtype = floating_dtype(kernel_dtype)
        q, operator = config.square_rank, config.operator
        squares = config.squares if isinstance(config.squares, int) else None
        if q is None:
            operator = resolve_auto(operator, config.rank)
            budget = config.rank, in_features, out_features, operator
            q = square_rank(*budget, config.multiple_of, squares or 1)
            squares = squares or fill_squares(*budget, q)
        elif q > min(in_features, out_features):
            raise ValueError(
                f"square_rank must be at most min(in_features, out_features) = "
                f"{min(in_features, out_features)}, got {q}"
            )
        made = make_operator(
            operator,
            in_features,
            out_features,
            q,
            squares=squares or 1,
            seed=config.seed,
        )
        return cls(
            operator=made,
            kernel_shape=kernel_shape,
            axes=axes,
            alpha=config.alpha,
            scale=1.0 if config.scale == "paper" else made.fine_tuning_scale,
            dropout=config.dropout,
            init=config.init,
            param_dtype=param_dtype,
            execution=config.execution,
            path=path,
            rank=config.rank if config.square_rank is None else None,
        )

    @property
    def factor(self) -> float:
        """What multiplies the delta: alpha times scale."""
        return self.alpha * self.scale

    @property
    def name(self) -> str:
        """The kernel's path, slash-joined."""
        return "/".join(self.path)

    @property
    def in_features(self) -> int:
        """The product of the kernel's input axes."""
        return math.prod(sizes(self.kernel_shape, self.axes, "i"))

    @property
    def out_features(self) -> int:
        """The product of the kernel's output axes."""
        return math.prod(sizes(self.kernel_shape, self.axes, "o"))

    def seen_by(self, ndim: int | None) -> tuple[Shape, str]:
        """The shape and the axes of the kernel as a layer sees it.

        Args:
          ndim: How many of the kernel's axes the layer sees, the last ones: a lifted
            transformation takes off leading stack axes. None stands for all.
        """
        first = 0 if ndim is None else len(self.axes) - ndim
        return self.kernel_shape[first:], self.axes[first:]

    @property
    def stack_shape(self) -> Shape:
        """The sizes of the kernel's stack axes."""
        return sizes(self.kernel_shape, self.axes, "s")

    @property
    def shape(self) -> Shape:
        """The shape of M: (*stack, q, q), or (*stack, K, q, q) for K squares."""
        return (*self.stack_shape, *self.operator.m_shape)

    @property
    def parameters(self) -> int:
        """How many numbers M holds."""
        return math.prod(self.shape)

    @property
    def lora_rank(self) -> float:
        """The rank of a LoRA with as many parameters: K q^2 / (in + out)."""
        parameters = math.prod(self.operator.m_shape)
        return parameters / (self.in_features + self.out_features)

    @property
    def asked_square_rank(self) -> int | None:
        """The q that the budget would buy, if less than four fifths of it are used.

        The layer is too small for it, or no wider M suits its widths. None if it is
        what the layer has.
        """
        if self.rank is None or 5 * self.lora_rank >= 4 * self.rank:
            return None
        asked = math.isqrt((self.in_features + self.out_features) * self.rank)
        return asked if asked > self.operator.width else None

    @property
    def meaning(self) -> dict[str, Any]:
        """The settings that decide which delta an M stands for, as JSON can hold them.

        Settings that decide how M is trained or computed (dropout, init, execution,
        param_dtype, layout) are not among them, and neither is the path.
        """
        settings = operator_settings(self.operator)
        return {
            **{f"operator.{name}": value for name, value in settings.items()},
            "kernel_shape": list(self.kernel_shape),
            "axes": self.axes,
            "square_rank": self.operator.square_rank,
            "squares": self.operator.squares,
            "alpha": self.alpha,
            "scale": self.scale,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The meaning, and the settings that decide how M is trained and computed."""
        return {
            **self.meaning,
            "dropout": self.dropout,
            "init": self.init,
            "execution": self.execution,
            "param_dtype": jnp.dtype(self.param_dtype).name,
        }

    def stacked(self, sizes: Shape, path: tuple[str, ...]) -> "AdapterSpec":
        """The same adapter for a stack of such kernels, whose axes come first."""
        return dataclasses.replace(
            self,
            path=path,
            kernel_shape=(*sizes, *self.kernel_shape),
            axes="s" * len(sizes) + self.axes,
        )


_SIZES = {"in_features", "out_features", "square_rank", "squares"}


def operator_settings(operator: Operator) -> dict[str, Any]:
    """An operator's name and settings, with the seed and without sizes.

    A digest stands for arrays that are given.
    """
    fields = {f.name for f in dataclasses.fields(operator) if f.compare} - _SIZES
    fields |= {"digest"} if operator.given else set()
    values = {name: getattr(operator, name) for name in sorted(fields)}
    return {"name": operator.name, **values}


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """{name: its two values} where the settings of two adapters of a kernel differ.

    A setting that only the first or only the second operator has is left out, since
    the names of the operators differ then.
    """
    return {
        name: (first[name], second[name])
        for name in first
        if name in second and first[name] != second[name]
    }


def check_same(made_for: AdapterSpec, used_with: AdapterSpec) -> None:
    """Raise unless an M that was made for the first adapter is right for the second."""
    if differing := differences(made_for.meaning, used_with.meaning):
        settings = " and ".join(
            f"{name} {made!r}, not {used!r}" for name, (made, used) in differing.items()
        )
        raise ValueError(f"{used_with.name}{SUFFIX} was made for {settings}")
