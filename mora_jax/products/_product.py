"""Products of an input and a kernel, except those that are an einsum."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mora_jax._common.checks import check_choice
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._trace_check import Claim
from mora_jax.operators._base import Operator


class KernelDelta(abc.ABC):
    r"""Delta that an adapter adds to a kernel, :math:`\alpha\, C M D`, as a linear map.

    A product asks it for what its layer would do if this were the kernel. The delta is
    not formed unless `kernel` is called.

    Attributes:
      operator: C and D.
      axes, kernel_shape: The kernel's axes, a letter each, and its shape.
    """

    operator: Operator
    axes: str
    kernel_shape: Shape

    @abc.abstractmethod
    def rows(self, x: jax.Array) -> jax.Array:
        """(*stack, *batch, in_features) -> (*stack, *batch, out_features)."""

    @abc.abstractmethod
    def transposed_rows(self, y: jax.Array) -> jax.Array:
        """(*stack, *batch, out_features) -> (*stack, *batch, in_features)."""

    @abc.abstractmethod
    def lookup(self, indices: jax.Array) -> jax.Array:
        """Integers (...) -> rows of the delta (..., out_features)."""

    @abc.abstractmethod
    def kernel(self) -> jax.Array:
        """The delta as an array of the kernel's shape."""

    @abc.abstractmethod
    def compress_kernel(self) -> jax.Array:
        """C as a kernel, with q outputs instead of the output features."""

    @abc.abstractmethod
    def decompress(self, h: jax.Array) -> jax.Array:
        r""":math:`\alpha\, D(h M)`: (..., q) -> (..., out_features)."""


Factors = tuple[jax.Array | None, jax.Array | None]
"""Factors of a product's input and output; None for no factor."""


class Product(abc.ABC):
    """Product of a layer's input with its kernel; linear in both.

    A product of your own needs `axes` and `delta`; all else has a default.

    Attributes:
      axes: The kernel's axes as letters s, i and o (see `MoRAConfig.overrides`).
      adapted_by_default: True if the default targets include such layers.
      label: A name of such layers for a plan's list of what it leaves out.
      takes_indices: True if the input is integers that number rows of the kernel.
    """

    axes: str
    adapted_by_default: bool = False
    label: ClassVar[str] = ""
    takes_indices: ClassVar[bool] = False

    @property
    def claim(self) -> Claim:
        """The product as a trace recognises it."""
        return Claim()

    def fits(self, axes: str) -> bool:
        """True if the layer can use a kernel that is planned with `axes`."""
        return axes == self.axes

    @abc.abstractmethod
    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        """The output of the layer for its input `x`, if the delta were its kernel."""

    def factors(self, scale: ArrayLike | float) -> Factors:
        """Factors of input and output that have the effect of scaling the kernel.

        Args:
          scale: The factor of the kernel, an array that broadcasts against it.

        Returns:
          Arrays that broadcast against the input and the output, or None for one.

        Raises:
          ValueError: No such factors exist, or the product does not know them.
        """
        rule = "must be of an einsum, or one number, or one a feature of an embedding"
        got = f"got {type(self).__name__} scaled by shape {jnp.shape(scale)}"
        raise ValueError(f"scale= of register_layer {rule}, {got}")


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    r"""A convolution: a dense layer on each window of the input.

    The kernel is (*window, in, out), and the numbers in a window are the input
    features. So :math:`x * (C M D) = D((x * C) M)`. If C(x) is a single vector of q
    numbers, the input is convolved with C, a kernel of q outputs; else with the delta.

    Attributes:
      axes: The kernel's axes as letters, such as "iiio".
      convolve: A function of (x, kernel) that returns the layer's output without bias.
      any_outputs: True if `convolve` takes any number of outputs: no groups, no mask.
      masked: True if `convolve` multiplies the kernel by a mask.
    """

    axes: str
    convolve: Callable[[jax.Array, jax.Array], jax.Array]
    any_outputs: bool = True
    masked: bool = False

    label = "a convolution"

    @property
    def claim(self) -> Claim:
        # Some paddings change the kernel or the output by these; so does `convolve`.
        steps = {"concatenate", "pad", "reduce_sum", "rev", "slice"}
        passes = frozenset(steps | {"mul"} if self.masked else steps)
        return Claim(primitive="conv_general_dilated", passes=passes)

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        # With several blocks C(x) is not one vector of q numbers.
        if delta.operator.block or not self.any_outputs:
            return self.convolve(x, delta.kernel())
        return delta.decompress(self.convolve(x, delta.compress_kernel()))


MODES: tuple[Any, ...] = None, "clip", "wrap", "fill"


@dataclasses.dataclass(frozen=True)
class Lookup(Product):
    """An embedding: the kernel's rows at integer inputs.

    The kernel is (in, out), and the input features are the vocabulary. The delta's rows
    are computed for the given indices alone.

    Attributes:
      mode: Rows at indices beyond the table, as in `jnp.take`: "clip", "wrap" or "fill"
        (no delta there). None is for `table[ids]`, where negative indices count from
        the end, and the rest is clipped; and for layers that return NaN.

    Example: an embedding class of your own, and its tied head::

      >>> from flax import nnx
      >>> from mora_jax import register_layer
      >>> from mora_jax.products import ATTEND, Lookup
      >>> class Table(nnx.Module):
      ...     def encode(self, ids): return self.table[...][ids]
      ...     def decode(self, x): return x @ self.table[...].T
      >>> register_layer(Table, equation=Lookup(), kernel="table", method="encode")
      >>> register_layer(Table, equation=ATTEND, kernel="table", method="decode")
    """

    mode: str | None = None

    axes = "io"
    label = "an embedding"
    takes_indices = True

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)

    @property
    def claim(self) -> Claim:
        lookups = [self, *(Lookup(mode) for mode in MODES if mode != self.mode)]
        return Claim(
            primitive="gather",
            # Flax does not look up in an embedding of a single row, but copies it.
            stand_ins=frozenset({"broadcast_in_dim"}),
            rows=tuple((f"products.{lookup}", lookup.places) for lookup in lookups),
        )

    def places(self, indices: Any, size: int) -> Any:
        """The rows of a table of `size` rows; beyond it for none of them."""
        if self.mode == "wrap":
            return indices % size
        if self.mode != "clip":
            indices = indices + size * (indices < 0)
        return indices if self.mode == "fill" else indices.clip(0, size - 1)

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        size, wide = delta.operator.in_features, jnp.result_type(x.dtype, jnp.int32)
        places = self.places(x.astype(wide), size)
        inside = (places >= 0) & (places < size)
        rows = delta.lookup(places)
        return jnp.where(inside[..., None], rows, 0) if self.mode == "fill" else rows

    def factors(self, scale: ArrayLike | float) -> Factors:
        if jnp.ndim(scale) > 1:  # it varies along the vocabulary
            return super().factors(scale)
        return None, jnp.asarray(scale)


@dataclasses.dataclass(frozen=True)
class Folded(Product):
    r"""Any use of a kernel: all methods of its module read :math:`W + \alpha\, C M D`.

    It is for kernels whose use no einsum of one input describes, such as experts that
    are bare arrays of an NNX module, for all of a class or none. It is exact whatever
    the methods compute, but each call forms the sum and a gradient of its shape.

    Attributes:
      axes: The kernel's axes as letters i, o, and s for experts, which have an M each.
      adapted_by_default: True to have the kernel among the default targets.

    Example::

      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, mora_jax
      >>> class Experts(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 16, 16)))
      ...     def __call__(self, x, best):  # (n, 16), and an expert for each
      ...         return jnp.einsum("ni,nio->no", x, self.w[best])
      >>> folded = mora_jax.products.Folded("sio")
      >>> mora_jax.register_layer(Experts, equation=folded, kernel="w")
      >>> model, config = Experts(nnx.Rngs(0)), mora_jax.MoRAConfig(rank=2)
      >>> x, best = jnp.ones((3, 16)), jnp.array([0, 3, 0])
      >>> mora_jax.nnx.plan(model, config, x, best)["w"].shape
      (4, 4, 4, 4)
    """

    axes: str
    adapted_by_default: bool = True

    @property
    def claim(self) -> Claim:
        return Claim(reads=True)

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        """The delta itself: what is read here is the kernel, and `x` is not used."""
        return delta.kernel()
