"""Dense layers: an einsum of input and kernel."""

import dataclasses
import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.axes import sizes
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._trace_check import Claim
from mora_jax.products._product import Factors, KernelDelta, Product

DENSE = "...i,io->...o"
"""The equation of a dense layer."""

ATTEND = "...d,vd->...v"
"""The equation of a head that is tied to an embedding of a vocabulary v."""


def dot_general_equation(lhs_ndim: int, rhs_ndim: int, dimension_numbers: Any) -> str:
    """The equation of a `dot_general` of operands of so many axes."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    left = list(string.ascii_letters[:lhs_ndim])
    right = list(string.ascii_letters[lhs_ndim : lhs_ndim + rhs_ndim])
    for here, there in zip((*lhs_sum, *lhs_batch), (*rhs_sum, *rhs_batch), strict=True):
        right[there] = left[here]
    free = [c for c in (*left, *right) if (c in left) != (c in right)]
    outputs = [*(left[k] for k in lhs_batch), *free]
    return f"{''.join(left)},{''.join(right)}->{''.join(outputs)}"


@dataclasses.dataclass(frozen=True)
class Contraction(Product):
    """An einsum equation of input, kernel and output, with a letter for each axis.

    It brings any dense-like layer to the form that operators know: from rows of
    `in_features` numbers to rows of `out_features` numbers. If the plan has inputs and
    outputs exchanged, as in a tied head, the delta is used transposed.

    Attributes:
      inputs, kernel, outputs: The letters of the axes of each.
    """

    inputs: str
    kernel: str
    outputs: str
    axes: str = dataclasses.field(init=False, compare=False, repr=False)

    adapted_by_default = True

    def __post_init__(self) -> None:
        kinds = {(True, False): "i", (False, True): "o", (True, True): "s"}
        axes = [kinds[c in self.inputs, c in self.outputs] for c in self.kernel]
        object.__setattr__(self, "axes", "".join(axes))

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
    def parse(cls, equation: str, inputs_ndim: int | None = None) -> "Contraction":
        """Read an equation as for `jax.numpy.einsum`, such as `"...i,io->...o"`.

        The input has `inputs_ndim` axes; None stands for as few as are allowed.

        Raises:
          ValueError: The equation is not a product of an input and a kernel that has
            separate input and output features.
        """
        operands, arrow, outputs = equation.replace(" ", "").partition("->")
        if operands.count(",") != 1:
            rule = "equation must have two operands, input and kernel"
            raise ValueError(f"{rule}, got {equation!r}")
        inputs, kernel = operands.split(",")
        named = [c for c in inputs + kernel if c != "."]
        if not arrow:  # numpy's rule for a missing right-hand side
            single = sorted(c for c in named if named.count(c) == 1)
            outputs = "..." * ("..." in inputs) + "".join(single)
        # "..." stands for so many letters that the input has all its axes.
        unused = [c for c in string.ascii_letters if c not in named]
        least = len(inputs.replace("...", ""))
        ndim = least if inputs_ndim is None else inputs_ndim
        hidden = "".join(unused[: max(0, ndim - least)])
        inputs, outputs = (term.replace("...", hidden) for term in (inputs, outputs))
        if len(inputs) != ndim:
            rule = f"{equation!r} takes an input of at least {len(inputs)} axes"
            raise ValueError(f"{rule}, got {ndim}")
        x, w, y = map(set, terms := (inputs, kernel, outputs))
        if "." in kernel or any(len(set(term)) < len(term) for term in terms):
            rule = "must name each axis of the kernel, and each axis once"
            raise ValueError(f"{equation!r} {rule}")
        summed = (x | w) - y
        if not (y <= x | w and summed and summed <= x & w and w - x):
            rule = "must sum over the axes that input and kernel share and no other"
            more = "the kernel must add axes to the output"
            raise ValueError(f"{equation!r} {rule}, and {more}")
        return cls(inputs, kernel, outputs)

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def from_axes(cls, axes: str, inputs_ndim: int) -> "Contraction":
        """The equation from (*stack, *batch, *in) to (*stack, *batch, *out)."""
        kernel = string.ascii_letters[: len(axes)]
        stack, ins, outs = ("".join(sizes(kernel, axes, letter)) for letter in "sio")
        return cls.parse(f"{stack}...{ins},{kernel}->{stack}...{outs}", inputs_ndim)

    @property
    def claim(self) -> Claim:
        return Claim((self.inputs, self.kernel, self.outputs), "dot_general")

    @functools.cached_property
    def equation(self) -> str:
        """The equation for `jax.numpy.einsum`."""
        return f"{self.inputs},{self.kernel}->{self.outputs}"

    def fits(self, axes: str) -> bool:
        return axes in (self.axes, self.axes.translate(str.maketrans("io", "oi")))

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        for_rows = delta.rows if delta.axes == self.axes else delta.transposed_rows
        outs = sizes(delta.kernel_shape, self.axes, "o")
        return self.from_rows(for_rows(self.to_rows(x)), outs)

    def factors(self, scale: ArrayLike | float) -> Factors:
        scale = jnp.asarray(scale)
        shape = (1,) * (len(self.kernel) - scale.ndim) + scale.shape
        if len(shape) > len(self.kernel):
            kernel = f"a kernel of {len(self.kernel)} axes"
            raise ValueError(f"scale of shape {shape} must broadcast against {kernel}")
        # sum_i x_i s_i w_io = sum_i (x_i s_i) w_io, and sum_i x_i w_io s_o =
        # (sum_i x_i w_io) s_o: along inputs it goes to x, along all others to y.
        varies = {c: n for c, n in zip(self.kernel, shape, strict=True) if n > 1}
        for letters in (self.outputs, self.inputs):
            if varies.keys() <= set(letters):
                order = [[*varies].index(c) for c in letters if c in varies]
                factor = jnp.transpose(scale.squeeze(), order)
                factor = factor.reshape([varies.get(c, 1) for c in letters])
                return (None, factor) if letters is self.outputs else (factor, None)
        rule = "must vary along the input features or the output ones, not along both"
        kernel = f"of a kernel with axes {self.axes!r}"
        raise ValueError(f"scale of shape {scale.shape} {rule}, {kernel}")

    def check_input(self, x_shape: Shape, kernel_shape: Shape) -> None:
        """Raise unless an input of `x_shape` fits a kernel of `kernel_shape`."""
        size = dict(zip(self.kernel, kernel_shape, strict=True))
        pairs = zip(self.inputs, x_shape, strict=True)
        expected = tuple(size.get(c, n) for c, n in pairs)
        if expected != x_shape:
            rule = f"x of shape {x_shape} does not fit a kernel of shape {kernel_shape}"
            raise ValueError(f"{rule} with axes {self.axes!r}: expected {expected}")

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The input as (*stack, *batch, in_features)."""
        return self._rows(x, self._orders[0])

    def from_rows(self, rows: jax.Array, out_shape: Shape) -> jax.Array:
        """(*stack, *batch, out_features) as the layer's output."""
        rows = rows.reshape(*rows.shape[:-1], *out_shape)
        return jnp.transpose(rows, self._orders[2])

    def output_rows(self, y: jax.Array) -> jax.Array:
        """The output as (*stack, *batch, out_features)."""
        return self._rows(y, self._orders[1])

    def _rows(self, array: jax.Array, order: list[int]) -> jax.Array:
        *_, leading = self._orders
        array = jnp.transpose(array, order)
        return array.reshape(*array.shape[:leading], math.prod(array.shape[leading:]))

    @functools.cached_property
    def _orders(self) -> tuple[list[int], list[int], list[int], int]:
        """The orders of axes of x and y as rows, and of rows as y, found once."""
        # Then comes the number of axes that lead, before the features'.
        batch = [c for c in self.inputs if c not in self.kernel]
        stack, ins, outs = [sizes(self.kernel, self.axes, kind) for kind in "sio"]
        xs, ys = [*stack, *batch, *ins], [*stack, *batch, *outs]
        to_x = [self.inputs.index(c) for c in xs]
        to_y = [self.outputs.index(c) for c in ys]
        return to_x, to_y, [ys.index(c) for c in self.outputs], len(stack) + len(batch)


@dataclasses.dataclass(frozen=True)
class Blocks(Product):
    """A dense layer for each block of neighbouring features.

    The kernel is (blocks, in, out), and the input (..., blocks * in) as it is.
    """

    axes = "sio"
    adapted_by_default = True

    @property
    def claim(self) -> Claim:
        return Claim(primitive="dot_general")

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        batch, count = x.shape[:-1], delta.kernel_shape[0]
        rows = delta.rows(jnp.moveaxis(x.reshape(*batch, count, -1), -2, 0))
        return jnp.moveaxis(rows, 0, -2).reshape(*batch, -1)
