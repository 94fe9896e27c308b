r"""The equation of an adapted layer, and its derivatives.

.. math::

    y = x W + \alpha\, D(C(x) M) = x\,(W + \alpha\, C M D)

    dM = \alpha \sum_{rows} C(x)^T D^T(g), \qquad dx = g\,(W + \alpha\, C M D)^T

Here g is the gradient of y. The map D(C(x) M) and its derivative by M are the
operator's, see `operators._base`. dx follows from the transpose of a map of x, see
`ways`. alpha multiplies M before all else: alpha D(C(x) M) = D(C(x) (alpha M)).

The rest of this file says what stands here for x (rows of a batch, unit vectors of an
embedding, outputs of a convolution), and where the devices are that compute it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mora_jax._common.axes import kernel_from_rows
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.linear_algebra import matmul, transposed
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.tracing import Chip, current_chip, undisturbed
from mora_jax._layer import chips
from mora_jax._layer.rounding import add_rounded
from mora_jax._mesh import places
from mora_jax._mesh.on_mesh import OnMesh
from mora_jax._plan.spec import AdapterSpec, many_if
from mora_jax.operators._pytree import by_layer
from mora_jax.products import Contraction, KernelDelta


@dataclasses.dataclass(frozen=True)
class ByM(LinearMap):
    """The derivative dy = D(C(x) dM) as a map of dM, whose transpose is M's gradient.

    The residuals are the operator and what is kept of x. If the delta is linear in M,
    D(C(x) M) itself is this map of M.
    """

    m_dtype: Any
    dtype: Any  # of the computation
    precision: jax.lax.PrecisionLike
    shards: int = 1  # of the rows of x, whose first axis devices split
    features: places.FeatureSharding | None = None  # None on one device
    product: Contraction | None = None  # whose output y is; None for y as rows
    out_shape: Shape = ()  # of its features

    def forward(self, residuals: Any, operand: Array) -> Array:
        op, kept = residuals
        y = self._map(op).tangent(kept, operand.astype(self.dtype), self.precision)
        return y if self.product is None else self.product.from_rows(y, self.out_shape)

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        op, kept = residuals
        g = cotangent if self.product is None else self.product.output_rows(cotangent)
        gradient = self._map(op).gradient(kept, g, self.precision, self.shards)
        return gradient.astype(self.m_dtype)

    def _map(self, op: Any) -> Any:
        return chips.map_of(op) if self.features is None else OnMesh(op, self.features)


@dataclasses.dataclass(frozen=True)
class Delta(KernelDelta):
    r"""A kernel's delta :math:`\alpha\, C M D` as the linear map that it is.

    `m` is alpha M, (*stack, *m_shape), and `layout` has the places of the kernel's
    features on a mesh; None for one device.
    """

    operator: Any
    m: Array
    kernel_shape: Shape
    axes: str
    precision: jax.lax.PrecisionLike = None
    layout: places.KernelLayout | None = None

    @classmethod
    def of(
        cls,
        spec: AdapterSpec,
        m: ArrayLike,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        x: Array | None = None,
    ) -> "Delta":
        """The delta of an adapter, in `dtype` or M's own."""
        # With the layer's input `x` its M is on the devices that `x` is on.
        if (got := jnp.shape(m)) != spec.shape:
            many = many_if(got, spec.shape)
            raise ValueError(f"M must have shape {spec.shape}, got {got}{many}")
        layout, m = spec.layout, jnp.asarray(m)
        dtype = m.dtype if dtype is None else dtype
        # The factor is not rounded where the layer is wider than M.
        wide = m.astype(jnp.promote_types(m.dtype, dtype))
        op, scaled = spec.operator.absorbed(wide, spec.factor)
        scaled = scaled.astype(dtype)
        if x is not None:
            features = layout and layout.for_activations(spec.axes, spec.kernel_shape)
            split = OnMesh(op, features).m_spec if features else ()
            scaled = places.gather_m(scaled, layout, x, len(op.m_shape), split)
        return cls(op, scaled, spec.kernel_shape, spec.axes, precision, layout)

    def rows(self, x: Array) -> Array:
        if self._stack:
            return self._over_stack(Delta.rows, x)
        op, layout = self.operator, self.layout
        features = layout and layout.for_activations(self.axes, self.kernel_shape)
        delta = OnMesh(op, features) if features else op
        if features or not op.linear:
            return delta.rows(x, self.m, self.precision)
        kept = op.kept(x, self.m, self.precision)
        return self._by_m(kept, places.row_shards(layout, x))

    def _by_m(self, kept: Any, shards: int = 1) -> Array:
        """D(C(x) M) for a delta that is linear in M: its derivative by M, of M."""
        by_m = ByM(self.m.dtype, self.m.dtype, self.precision, shards)
        return by_m((self.operator, kept), self.m)

    def transposed_rows(self, y: Array) -> Array:
        return transposed(self.rows, (*y.shape[:-1], self.operator.in_features), y)

    def lookup(self, indices: Array) -> Array:
        # As JAX's indexing takes them, from 0 on. They are wide, or a vocabulary beyond
        # the range of a small type would wrap around.
        op, size = self.operator, self.operator.in_features
        indices = jnp.asarray(indices, jnp.result_type(indices.dtype, jnp.int32))
        indices = jnp.where(indices < 0, indices + size, indices).clip(0, size - 1)
        return op.unit_rows(indices, self.m, self.precision)

    def decompress(self, h: Array) -> Array:
        op = getattr(self.operator, "inner", self.operator)  # C damps
        if op.linear:
            own = dataclasses.replace(self, operator=op)
            return own._by_m(op.kept_of(h, self.m))
        _, b = self.operator.factors(self.m)
        return self.operator.leave(matmul(h, b, self.precision))

    def compress_kernel(self) -> Array:
        matrix, _ = self.operator.factors(self.m)
        pairs = zip(self.axes, self.kernel_shape, strict=True)
        shape = tuple(matrix.shape[-1] if axis == "o" else n for axis, n in pairs)
        return kernel_from_rows(matrix, shape, self.axes)

    def kernel(self) -> Array:
        return kernel_from_rows(self._matrix(), self.kernel_shape, self.axes)

    def added_to(self, kernel: Array) -> Array:
        """`kernel` plus the delta in M's dtype; 16 bits are rounded with a dither."""
        if self.axes != "io":
            return add_rounded(kernel, self.kernel(), self.axes, kernel.dtype, "dither")
        if features := self._features_of_kernel:
            return OnMesh(self.operator, features).added(self.m, kernel, chips.add)
        return chips.add(self.operator, self.m, kernel)

    def _matrix(self) -> Array:
        """(*stack, in_features, out_features)."""
        if self._stack:
            return self._over_stack(Delta._matrix)
        return _matrix(self.operator, self.m, current_chip(), self._features_of_kernel)

    @property
    def _features_of_kernel(self) -> places.FeatureSharding | None:
        """The mesh axes that split features of the kernel itself, if any does."""
        return self.layout and self.layout.for_kernel(self.axes, self.kernel_shape)

    @property
    def _stack(self) -> Shape:
        return self.m.shape[: self.m.ndim - len(self.operator.m_shape)]

    def _over_stack(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """`function(delta, *arrays)` of each layer along a stack's first axis."""
        given, with_arrays = by_layer(self.operator)

        def of_layer(m: Array, given: Any, *arrays: Array) -> Array:
            one = dataclasses.replace(self, m=m, operator=with_arrays(given))
            return function(one, *arrays)

        return jax.vmap(of_layer)(self.m, given, *arrays)


# One program for all layers of a shape: `merge` calls it for each kernel.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _matrix(
    op: Any, m: Array, chip: Chip | None, features: places.FeatureSharding | None
) -> Array:
    if features:
        return OnMesh(op, features).matrix(m, chips.matrix_of)
    return chips.matrix_of(op, m)


def delta_kernel(spec: AdapterSpec, m: ArrayLike) -> Array:
    r"""The delta of an adapter, :math:`\alpha\, C M D`, with the kernel's shape."""
    return undisturbed(Delta.of(spec, m).kernel)()


def folded_kernel(spec: AdapterSpec, m: ArrayLike, kernel: Array) -> Array:
    """The kernel of a layer that reads it itself, with the delta as `merge` adds it."""
    if (sharding := places.explicit_sharding(kernel)) is not None:
        fold = functools.partial(folded_kernel, dataclasses.replace(spec, layout=None))
        return places.with_auto_axes(fold, sharding, m, kernel)
    delta = Delta.of(spec, m, dtype=jnp.result_type(m, kernel, jnp.float32), x=kernel)
    return _rounded_sum(delta.axes, kernel, undisturbed(delta.kernel)())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_sum(axes: str, kernel: Array, delta: Array) -> Array:
    # Rounding has a derivative of zero nearly everywhere, so the sum gives its own one.
    # Unlike in a dense layer the sum is kept for the backward pass, and M's gradient is
    # taken from its gradient: nothing is known of what the layer computes with it.
    return add_rounded(kernel, delta, axes, kernel.dtype, "dither")


@_rounded_sum.defjvp
def _(axes: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    y = _rounded_sum(axes, *primals)
    kernel, delta = tangents
    return y, kernel + delta.astype(y.dtype)
