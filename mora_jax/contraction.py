"""Which axes of a layer's input, kernel and output are features."""

import dataclasses
import math
import string
from collections import Counter

import jax
import jax.numpy as jnp

from mora_jax._types import Shape


def check_axes(axes: str, ndim: int) -> str:
    """Return `axes` if it describes a kernel of `ndim` axes, one letter for each.

    "i" is an input feature axis, "o" an output feature axis, "s" a stack axis with an M
    for each index (the layers of `nn.scan`, the experts of a mixture). So "io" is a
    dense layer, "oi" the same stored transposed, "sio" a scanned one, and "ioo" the
    heads of attention. Several axes of a kind flatten in the kernel's order.
    """
    if not isinstance(axes, str) or set(axes) - set("sio"):
        raise ValueError(f"axes must be made of the letters s, i and o, got {axes!r}")
    if len(axes) != ndim:
        raise ValueError(
            f"axes must have one letter for each of the kernel's {ndim} axes, "
            f"got {axes!r}"
        )
    if not {"i", "o"} <= set(axes):
        raise ValueError(f"axes must hold at least one i and one o, got {axes!r}")
    return axes


def sizes(shape: Shape, axes: str, letter: str) -> Shape:
    """The sizes of the axes of `shape` that `axes` marks with `letter`."""
    return tuple(n for n, kind in zip(shape, axes, strict=True) if kind == letter)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An einsum equation of input, kernel and output, one letter an axis.

    It brings any dense-like layer to the one form that operators know: rows of
    `in_features` numbers to rows of `out_features` numbers.
    """

    inputs: str
    kernel: str
    outputs: str

    @classmethod
    def parse(cls, equation: str, inputs_ndim: int) -> "Contraction":
        """Read an equation such as `"...i,io->...o"`.

        Raises:
          ValueError: the equation is not a product of an input and a kernel that is
            linear in the kernel with separate input and output features.
        """
        operands, arrow, outputs = equation.replace(" ", "").partition("->")
        if operands.count(",") != 1:
            raise ValueError(
                f"equation must have two operands, input and kernel, got {equation!r}"
            )
        inputs, kernel = operands.split(",")
        named = [c for c in inputs + kernel if c != "."]
        if not arrow:  # numpy's rule for a missing right-hand side
            once = sorted(c for c, n in Counter(named).items() if n == 1)
            outputs = "..." * ("..." in inputs) + "".join(once)
        unused = [c for c in string.ascii_letters if c not in named]
        missing = max(0, inputs_ndim - len(inputs.replace("...", "")))
        hidden = "".join(unused[:missing])
        contraction = cls(
            inputs.replace("...", hidden), kernel, outputs.replace("...", hidden)
        )
        contraction._check(equation, inputs_ndim)
        return contraction

    @classmethod
    def from_axes(cls, axes: str, inputs_ndim: int) -> "Contraction":
        """The plain layout: (*stack, *batch, *in) to (*stack, *batch, *out)."""
        kernel = string.ascii_letters[: len(axes)]
        stack, ins, outs = (
            "".join(c for c, kind in zip(kernel, axes, strict=True) if kind == letter)
            for letter in "sio"
        )
        equation = f"{stack}...{ins},{kernel}->{stack}...{outs}"
        return cls.parse(equation, inputs_ndim)

    def _check(self, equation: str, inputs_ndim: int) -> None:
        if len(self.inputs) != inputs_ndim:
            raise ValueError(
                f"{equation!r} takes an input of at least {len(self.inputs)} axes, "
                f"got {inputs_ndim}"
            )
        x, w, y = set(self.inputs), set(self.kernel), set(self.outputs)
        terms = (self.inputs, self.kernel, self.outputs)
        if "." in self.kernel or any(len(set(t)) < len(t) for t in terms):
            raise ValueError(
                f"{equation!r} must name each axis of the kernel, and each axis once"
            )
        if y - (x | w) or (x | w) - y != x & w - y or not (x & w - y) or not w - x:
            raise ValueError(
                f"{equation!r} must sum over the axes that input and kernel share and "
                "no other, and the kernel must add axes to the output"
            )

    @property
    def axes(self) -> str:
        """The kernel's axes as letters s, i and o (see `check_axes`)."""
        kinds = {c: "o" if c not in self.inputs else "i" for c in self.kernel}
        kinds |= {c: "s" for c in self.kernel if c in self.inputs and c in self.outputs}
        return "".join(kinds[c] for c in self.kernel)

    @property
    def equation(self) -> str:
        """The equation for `jax.numpy.einsum`."""
        return f"{self.inputs},{self.kernel}->{self.outputs}"

    def check_input(self, x_shape: Shape, kernel_shape: Shape) -> None:
        """Raise unless `x_shape` fits a kernel of `kernel_shape`."""
        size = dict(zip(self.kernel, kernel_shape, strict=True))
        expected = tuple(
            size.get(c, n) for c, n in zip(self.inputs, x_shape, strict=True)
        )
        if expected != x_shape:
            raise ValueError(
                f"x of shape {x_shape} does not fit a kernel of shape {kernel_shape} "
                f"with axes {self.axes!r}: expected {expected}"
            )

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The input as (*stack, *batch, in_features)."""
        lead = self._stack + self._batch
        order = [self.inputs.index(c) for c in lead + self._labels("i")]
        x = jnp.transpose(x, order)
        return x.reshape(*x.shape[: len(lead)], math.prod(x.shape[len(lead) :]))

    def from_rows(self, rows: jax.Array, out_shape: Shape) -> jax.Array:
        """(*stack, *batch, out_features) as the layer's output."""
        labels = self._stack + self._batch + self._labels("o")
        y = rows.reshape(*rows.shape[:-1], *out_shape)
        return jnp.transpose(y, [labels.index(c) for c in self.outputs])

    def _labels(self, letter: str) -> str:
        pairs = zip(self.kernel, self.axes, strict=True)
        return "".join(c for c, kind in pairs if kind == letter)

    @property
    def _stack(self) -> str:
        return self._labels("s")

    @property
    def _batch(self) -> str:
        return "".join(c for c in self.inputs if c not in self.kernel)


def kernel_from_rows(weight: jax.Array, shape: Shape, axes: str) -> jax.Array:
    """(*stack, in_features, out_features) as a kernel of `shape`."""
    order = [k for letter in "sio" for k, kind in enumerate(axes) if kind == letter]
    weight = weight.reshape([shape[k] for k in order])
    return jnp.transpose(weight, [order.index(k) for k in range(len(shape))])
