r"""The equation: a layer's own product, and what its adapter adds to it.

.. math:: y = x W + \alpha\, D(C(x) M)

`ProductByM.forward` is D(C(x) M), see `by_m`. `scaled` multiplies M by alpha, before
anything else is done with M, since alpha D(C(x) M) = D(C(x) (alpha M)). `add_delta`
adds the result to x W, which the layer itself computes. Nothing else in the library
multiplies by M or by alpha, except for `by_row`, where each row of a batch has its own
M. The rest of this file says what takes the place of x (the rows of a batch, the unit
vectors of an embedding, the outputs of a convolution), and where the devices are that
compute it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._common.axes import kernel_from_rows
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.linear_map import static
from mora_jax._jax.qwix_guard import undisturbed
from mora_jax._jax.vma import shape_for
from mora_jax._layer.compressed import Compressed, compressed_units
from mora_jax._layer.delta_matrix import add_matrix, delta_matrix
from mora_jax._layer.equation import ProductByM, SlicedProduct, can_slice
from mora_jax._layer.folded_part import add_part
from mora_jax._layer.per_row import by_row
from mora_jax._layer.rounding import add_rounded
from mora_jax._layer.slots import Selected
from mora_jax._mesh import apply as on_mesh
from mora_jax._mesh.layout import FeatureSharding, KernelLayout
from mora_jax._mesh.parts import OperatorPart
from mora_jax._mesh.placement import (
    explicit_layout,
    explicit_sharding,
    gather_m,
    row_shards,
    with_auto_axes,
)
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators import Operator
from mora_jax.operators._base import delta_of
from mora_jax.products import Contraction, Lookup, Product


def _product_by_x(product: ProductByM, residuals: Any, operand: jax.Array) -> jax.Array:
    """The same as a map of x."""
    op, m = residuals
    return product.forward((op, operand), m)


# Compiled as a whole: one program for each shape, which all layers of it share.
_compiled_product = jax.jit(ProductByM.forward, static_argnums=0)
_compiled_matrix = jax.jit(delta_matrix)


def _matrix_here(residuals: Any, operand: jax.Array) -> jax.Array:
    (part,) = residuals
    return delta_matrix(part, operand)


def _add_here(residuals: Any, operand: jax.Array) -> jax.Array:
    part, m = residuals
    return add_part(part, m, operand)


def _units(dtype: DTypeLike, op: Any, indices: jax.Array) -> Compressed:
    return compressed_units(op, indices, dtype)


def _given(op: Operator, h: jax.Array) -> Compressed:
    return Compressed(h, op._decompress)


@dataclasses.dataclass(frozen=True)
class Delta:
    r"""A kernel's delta :math:`\alpha\, C M D` as the linear map that it is.

    Attributes:
      operator: C and D; or one device's part of them, where a device computes.
      m: alpha M, (*stack, q, q).
      kernel_shape: The kernel's shape.
      axes: The kernel's axes, a letter each.
      precision: The precision of the products with M.
      layout: Where the kernel's features are on a mesh; None for one device.
      in_parts: Whether devices that share features each compute a part of the product
        with M, whichever the operator, instead of sharing C(x). M's gradient then needs
        a sum of (q, q) and nothing else.
    """

    operator: Any
    m: jax.Array
    kernel_shape: Shape
    axes: str
    precision: jax.lax.PrecisionLike = None
    layout: KernelLayout | None = None
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
        """The delta of an adapter.

        Args:
          spec: The adapter.
          m: M, (*stack, q, q).
          dtype: The dtype to compute in; M's own if it is None.
          ndim: How many of the kernel's axes the layer sees, the last ones; a lifted
            transformation takes off leading stack axes.
          precision: The precision of the products with M.
          x: The layer's input. M is replicated over the devices that it is on.
        """
        shape, axes = spec.seen_by(ndim)
        scaled_m = scaled(spec, jnp.asarray(m))
        if dtype is not None:
            scaled_m = scaled_m.astype(dtype)
        if x is not None:
            ndim_m = len(spec.operator.m_shape)
            scaled_m = gather_m(scaled_m, spec.layout, x, ndim_m)
        return cls(spec.operator, scaled_m, shape, axes, precision, spec.layout)

    @property
    def settings(self) -> tuple[Any, ...]:
        """All of it except the arrays: `Delta(operator, m, *settings)` is the delta."""
        of_kernel = self.kernel_shape, self.axes
        return *of_kernel, self.precision, self.layout, self.in_parts

    def rows(self, x: jax.Array) -> jax.Array:
        """(*stack, *batch, in_features) -> (*stack, *batch, out_features)."""
        if self._stack:
            return jax.vmap(lambda m, x: self._with(m).rows(x))(self.m, x)
        op, product = self.operator, ProductByM(self.precision)
        if isinstance(op, OperatorPart):  # within a map whose transpose is written out
            return product.forward((op, x), self.m)
        features = self._features(KernelLayout.for_activations)
        if features is None and not op.block:
            return _compiled_product(product, (op, x), self.m)
        if features is None:
            if can_slice(op):
                shards = row_shards(self.layout, x)
                product = SlicedProduct(self.precision, row_shards=shards)
            return product((op, x), self.m)
        if not op.block and not self.in_parts:
            op = on_mesh.OperatorOnMesh(op, features)
            return product.forward((op, x), self.m)
        by_m, by_x = static(ProductByM.forward, product), static(_product_by_x, product)
        return on_mesh.product(by_m, by_x, op, features, self.m, x)

    def transposed_rows(self, y: jax.Array) -> jax.Array:
        """(*stack, *batch, out_features) -> (*stack, *batch, in_features)."""
        x = shape_for((*y.shape[:-1], self.operator.in_features), y.dtype, y)
        (x,) = jax.linear_transpose(self.rows, x)(y)
        return x

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Integers (...) -> rows of the delta (..., out_features)."""
        # Wide, or a vocabulary beyond the range of a small type would wrap around.
        indices = indices.astype(jnp.result_type(indices.dtype, jnp.int32))
        indices %= self.operator.in_features
        product = ProductByM(self.precision, static(_units, self.m.dtype))
        features = self._features(KernelLayout.for_activations)
        if features is None or not features.out_axes:
            return _compiled_product(product, (self.operator, indices), self.m)
        rows = static(ProductByM.forward, product)
        return on_mesh.lookup(rows, self.operator, features, self.m, indices)

    def decompress(self, h: jax.Array) -> jax.Array:
        r""":math:`\alpha\, D(h M)`: (..., K q) -> (..., out_features)."""
        product = ProductByM(self.precision, _given)
        return product.forward((self.operator, h), self.m)

    def compress_kernel(self) -> jax.Array:
        """C as a kernel, with K q in place of the output features."""
        width = self.operator.width
        pairs = zip(self.axes, self.kernel_shape, strict=True)
        shape = tuple(width if axis == "o" else n for axis, n in pairs)
        matrix = self.operator.compress_matrix(self.m.dtype)
        return kernel_from_rows(matrix, shape, self.axes)

    def kernel(self) -> jax.Array:
        """The delta as an array of the kernel's shape."""
        return kernel_from_rows(self._matrix(), self.kernel_shape, self.axes)

    def added_to(self, kernel: jax.Array) -> jax.Array:
        """`kernel` plus the delta, which is computed in the dtype of `m`.

        A kernel of 16 bits is rounded with a dither, as `merge` does.
        """
        split = self._features(KernelLayout.for_kernel)
        if self.axes == "io" and split is not None:
            add = static(_add_here)
            return on_mesh.folded(add, self.operator, split, self.m, kernel)
        if self.axes.lstrip("s") != "io" or split is not None:
            return add_rounded(kernel, self.kernel(), self.axes, kernel.dtype, "dither")
        add = functools.partial(add_matrix, self.operator)
        for _ in self._stack:
            add = jax.vmap(add)
        return add(self.m, kernel)

    def _matrix(self) -> jax.Array:
        """(*stack, in_features, out_features)."""
        if self._stack:
            return jax.vmap(lambda m: self._with(m)._matrix())(self.m)
        features = self._features(KernelLayout.for_kernel)
        if features is None:
            return _compiled_matrix(self.operator, self.m)
        return on_mesh.kernel(static(_matrix_here), self.operator, features, self.m)

    def _features(
        self, split: Callable[[KernelLayout, str, Shape], FeatureSharding]
    ) -> FeatureSharding | None:
        """How devices share the features; None if they do not."""
        if self.layout is None:
            return None
        features = split(self.layout, self.axes, self.kernel_shape)
        return features if features.splits else None

    @property
    def _stack(self) -> Shape:
        """The stack axes of M."""
        return self.m.shape[: self.m.ndim - len(self.operator.m_shape)]

    def _with(self, m: jax.Array) -> "Delta":
        """The delta at one index of a stack axis."""
        return dataclasses.replace(self, m=m)


@delta_of.register
def _(op: Operator, m: jax.Array, precision: jax.lax.PrecisionLike) -> Delta:
    return Delta(op, m, (op.in_features, op.out_features), "io", precision)


def scaled(spec: AdapterSpec, m: Any) -> Any:
    """Alpha M, where alpha stands for alpha times the kernel's own scale."""
    return spec.factor * m


def delta_kernel(spec: AdapterSpec, m: ArrayLike) -> jax.Array:
    r"""The delta of an adapter, :math:`\alpha\, C M D`, with the kernel's shape."""
    return undisturbed(Delta.of(spec, m).kernel)()


def add_delta(
    y: jax.Array,
    spec: AdapterSpec,
    m: ArrayLike | Selected,
    x: ArrayLike,
    product: Product,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
    factor: jax.Array | None = None,
) -> jax.Array:
    """A layer's output with its delta, times `factor` if there is one.

    Args:
      y: The layer's output.
      spec: The adapter.
      m: M, (*stack, q, q), with the stack axes of `product`; or one for each row.
      x: The layer's input.
      product: What the layer computes.
      dropout_key: A key to drop some of what the adapter sees of `x`; None for nothing.
      precision: The precision of the product with M.
      factor: What the layer multiplies its output by in place of its kernel.
    """
    if (sharding := explicit_sharding(y)) is not None:
        layout = None
        if isinstance(product, Contraction):
            labels = product.inputs, product.kernel, product.outputs
            layout = explicit_layout(labels, x, sharding)
        spec = dataclasses.replace(spec, layout=layout)

        def add(y: jax.Array, m: Any, x: ArrayLike, key: Any) -> jax.Array:
            return add_delta(y, spec, m, x, product, key, precision, factor)

        return with_auto_axes(add, sharding, y, m, x, dropout_key)
    x, settings = jnp.asarray(x), {"dtype": y.dtype, "precision": precision}
    delta_of = functools.partial(Delta.of, spec, ndim=len(product.axes), **settings)
    added_to: Callable[[jax.Array], jax.Array]
    if isinstance(m, Selected):

        def for_one(m: ArrayLike, x: jax.Array) -> jax.Array:
            return product.delta(delta_of(m, x=x), x)

        added_to = functools.partial(by_row, spec, product, for_one, precision, m)
    else:
        added_to = functools.partial(product.delta, delta_of(m, x=x))
    if isinstance(product, Lookup):  # an index is dropped with its row
        added = undisturbed(added_to)(x)
        added = _dropout(added, (*x.shape, 1), dropout_key, spec.dropout)
    else:
        x = _dropout(x.astype(y.dtype), x.shape, dropout_key, spec.dropout)
        added = undisturbed(added_to)(x)
    return y + (added if factor is None else added * factor.astype(y.dtype))


def _dropout(
    x: jax.Array, shape: Shape, key: PRNGKeyArray | None, rate: float
) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0)
