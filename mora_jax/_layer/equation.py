r"""The equation of an adapted layer, and its derivatives.

.. math::

    y = x W + \alpha\, D(C(x) M) = x\,(W + \alpha\, C M D)

    dM = \alpha \sum_{rows} C(x)^T D^T(g), \qquad dx = g\,(W + \alpha\, C M D)^T

Here g is the gradient of y. `adapted` adds the two terms of y, for every layer. The
operator computes D(C(x) M), as `Operator.rows`, and dM, as `Operator.gradient`: blocks
of C(x) are rows like any other, so that the sum goes over both. dx follows from the
transpose of a map of x, see `ways`. alpha multiplies M before anything else is done
with it, since alpha D(C(x) M) = D(C(x) (alpha M)).

The rest of this file says what stands here for x (rows of a batch, unit vectors of an
embedding, outputs of a convolution), and where the devices are that compute it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common.axes import kernel_from_rows
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.qwix_guard import last_with_first, undisturbed
from mora_jax._jax.vma import transposed
from mora_jax._layer import chips
from mora_jax._layer.rounding import add_rounded
from mora_jax._mesh.layout import FeatureSharding, KernelLayout
from mora_jax._mesh.on_mesh import OperatorOnMesh
from mora_jax._mesh.placement import gather_m, row_shards
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators._base import in_range, rows_product, whole


def adapted(
    y: jax.Array,
    delta: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    factor: jax.Array | None = None,
) -> jax.Array:
    """Sum of y = x W, as the layer has computed it, and alpha D(C(x) M) = delta(x).

    `factor` is an array that the layer multiplies its output by, instead of its kernel.
    """
    added = delta(x)
    return y + (added if factor is None else added * factor.astype(y.dtype))


@dataclasses.dataclass(frozen=True)
class TimesM(LinearMap):
    """Product h M as a map of M; the residual is h = C(x)."""

    precision: jax.lax.PrecisionLike

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (h,) = residuals
        axes = last_with_first(h)
        return jax.lax.dot_general(h, operand, axes, precision=self.precision)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        # d(h M) = h dM, so the gradient of M is the sum of h^T g over rows. JAX would
        # derive the same sum with the axes of a batch kept apart, for which XLA's CPU
        # compiler writes h once more in another order.
        (h,) = residuals
        return rows_product(h, cotangent, self.precision)


@dataclasses.dataclass(frozen=True)
class ProductByM(LinearMap):
    """D(C(x) M) as a map of M; the residuals are (operator, x)."""

    # `row_shards` devices share the rows of x and split its first axis; 1 if unknown.
    # For operators whose C(x) is as large as x: x is kept for the gradient, and no
    # blocks of it. Layers that read the same x (queries, keys, values) keep it once.
    precision: jax.lax.PrecisionLike
    row_shards: int = 1

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        op, x = residuals
        return chips.rows_of(op)(x, operand, self.precision)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        op, x = residuals
        gradient = chips.gradient_of(op, self.row_shards)
        return gradient(x, cotangent, self.precision)


@dataclasses.dataclass(frozen=True)
class MatrixByM(LinearMap):
    """C M D as a map of M; the residual is the operator."""

    # JAX knows its transpose; it is a map so that the form is chosen by the platform.
    m_shape: Shape

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (op,) = residuals
        return chips.matrix_of(op)(operand)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        of_m = functools.partial(self.forward, residuals)
        return transposed(of_m, self.m_shape, cotangent)


@dataclasses.dataclass(frozen=True)
class Delta:
    r"""A kernel's delta :math:`\alpha\, C M D` as the linear map that it is.

    Attributes:
      operator: C and D; or one device's part of them, where a device computes.
      m: alpha M, (*stack, *m_shape).
      kernel_shape, axes: The kernel's shape, and its axes, a letter each.
      precision: The precision of the products with M.
      layout: The places of the kernel's features on a mesh; None for one device.
      given_m: True where the derivative by M is taken elsewhere.
      in_parts: True if devices that share features each compute a part of the product
        with M, instead of sharing C(x).
    """

    operator: Any
    m: jax.Array
    kernel_shape: Shape
    axes: str
    precision: jax.lax.PrecisionLike = None
    layout: KernelLayout | None = None
    given_m: bool = False
    in_parts: bool = False

    @classmethod
    def of(
        cls,
        spec: AdapterSpec,
        m: ArrayLike,
        *,
        dtype: DTypeLike | None = None,
        ndim: int | None = None,
        precision: jax.lax.PrecisionLike = None,
        x: jax.Array | None = None,
    ) -> "Delta":
        """The delta of an adapter, in `dtype` or M's own, on the last `ndim` axes."""
        # M is replicated over the devices that the layer's input `x` is on.
        shape, axes = spec.seen_by(ndim)
        scaled_m = spec.operator.scaled(jnp.asarray(m), spec.factor)
        if dtype is not None:
            scaled_m = scaled_m.astype(dtype)
        if x is not None:
            ndim_m = len(spec.operator.m_shape)
            scaled_m = gather_m(scaled_m, spec.layout, x, ndim_m)
        return cls(spec.operator, scaled_m, shape, axes, precision, spec.layout)

    @property
    def rows(self) -> Callable[[jax.Array], jax.Array]:
        """The function from (*stack, *batch, in) to (*stack, *batch, out)."""
        # A function, chosen once: a method that asked on each call would be one more
        # frame between a user's layer and the product.
        if self._stack:
            return lambda x: jax.vmap(lambda m, x: self._with(m).rows(x))(self.m, x)
        on_mesh = self._on_mesh(KernelLayout.for_activations)
        op, operator = on_mesh or self.operator, self.operator
        # Devices send each other parts of the output, or parts of C(x), q numbers a
        # row. With the first M's gradient needs a sum of arrays like M, nothing else.
        in_parts = on_mesh and (self.in_parts or operator.block or not operator.linear)
        # With a given M the product need be fast as a map of x alone.
        if in_parts or self.given_m:
            rows = chips.rows_of(op)
            return functools.partial(rows, m=self.m, precision=self.precision)
        if operator.block:
            return self._rows_by_m
        return lambda x: op.rows_with(self._times, x, self.m)

    def _rows_by_m(self, x: jax.Array) -> jax.Array:
        by_m = ProductByM(self.precision, row_shards(self.layout, x))
        return by_m((self.operator, x), self.m)

    def _times(self, h: jax.Array, m: jax.Array, part: Any = whole) -> jax.Array:
        return TimesM(self.precision)((h,), part(m))

    def transposed_rows(self, y: jax.Array) -> jax.Array:
        """(*stack, *batch, out_features) -> (*stack, *batch, in_features)."""
        return transposed(self.rows, (*y.shape[:-1], self.operator.in_features), y)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Integers (...) -> rows of the delta (..., out_features)."""
        op, indices = self.operator, in_range(indices, self.operator.in_features)
        on_mesh = self._on_mesh(KernelLayout.for_activations)
        if on_mesh and on_mesh.features.out_axes:
            return on_mesh.unit_rows(indices, self.m, self.precision)
        if op.linear:
            h, decompress = op.split_units(indices, self.m.dtype)
            return decompress(self._times(h, self.m))
        return op.unit_rows(indices, self.m, self.precision)

    def decompress(self, h: jax.Array) -> jax.Array:
        r""":math:`\alpha\, D(h M)`: (..., q) -> (..., out_features)."""
        if not self.operator.linear:
            return self._times(h, self.operator.factors(self.m)[1])
        return self.operator._decompress(self._times(h, self.m))

    def compress_kernel(self) -> jax.Array:
        """C as a kernel, with q output features."""
        q = self.operator.square_rank
        pairs = zip(self.axes, self.kernel_shape, strict=True)
        shape = tuple(q if axis == "o" else n for axis, n in pairs)
        matrix, _ = self.operator.factors(self.m)
        return kernel_from_rows(matrix, shape, self.axes)

    def kernel(self) -> jax.Array:
        """The delta as an array of the kernel's shape."""
        return kernel_from_rows(self._matrix(), self.kernel_shape, self.axes)

    def added_to(self, kernel: jax.Array) -> jax.Array:
        """`kernel` plus the delta in M's dtype; 16 bits are rounded with a dither."""
        if self.axes != "io":
            return add_rounded(kernel, self.kernel(), self.axes, kernel.dtype, "dither")
        if on_mesh := self._on_mesh(KernelLayout.for_kernel):
            return on_mesh.added(self.m, kernel, chips.add_of)
        return chips.add_of(self.operator)(self.m, kernel)

    def _matrix(self) -> jax.Array:
        """(*stack, in_features, out_features)."""
        if self._stack:
            return jax.vmap(lambda m: self._with(m)._matrix())(self.m)
        if on_mesh := self._on_mesh(KernelLayout.for_kernel):
            return on_mesh.matrix(self.m, chips.matrix_of)
        if not self.operator.linear:
            return self.operator.matrix(self.m)
        return MatrixByM(self.operator.m_shape)((self.operator,), self.m)

    def _on_mesh(
        self, split: Callable[[KernelLayout, str, Shape], FeatureSharding]
    ) -> OperatorOnMesh | None:
        """The operator where devices share the features; None if they do not."""
        if self.layout is None:
            return None
        features = split(self.layout, self.axes, self.kernel_shape)
        return OperatorOnMesh(self.operator, features) if features.splits else None

    @property
    def _stack(self) -> Shape:
        """The stack axes of M."""
        return self.m.shape[: self.m.ndim - len(self.operator.m_shape)]

    def _with(self, m: jax.Array) -> "Delta":
        """The delta at one index of a stack axis."""
        return dataclasses.replace(self, m=m)


def delta_kernel(spec: AdapterSpec, m: ArrayLike) -> jax.Array:
    r"""The delta of an adapter, :math:`\alpha\, C M D`, with the kernel's shape."""
    return undisturbed(Delta.of(spec, m).kernel)()
