"""Ways to compute an adapted layer, which give the same numbers up to rounding.

RunLoRA (https://arxiv.org/abs/2312.03415) chose among such ways for a LoRA.

- "activation" is x W + alpha D(C(x) M). It reads the input and the output once more.
- "fold" is x (W + alpha C M D). It reads the kernel once more, so it pays where an
  input has many rows. The backward pass folds again, so that no fold is kept.
- "fused" is for meshes: each device adds its parts of both terms before the devices sum
  them. XLA would not join the two sums.

Each is a linear map of x, and its transpose is dx. `Adapted` is the map that stands in
a program, with the derivative by M that all of them have, `equation.ByM`; it becomes
one of the three when it is traced for a platform.

On a mesh each device folds the part of the kernel that it holds. If the kernel is split
over batches (FSDP), it is folded before it is gathered: each device does its share of
the work, and the gather that the layer needs anyway brings the folded kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PRNGKeyArray

from mora_jax._common.axes import features, sizes, without
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.linear_algebra import transposed
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.tracing import current_chip, intercepted, undisturbed
from mora_jax._layer import chips
from mora_jax._layer.equation import ByM, Delta
from mora_jax._layer.tuning import Tuning, current_tuning
from mora_jax._mesh import places
from mora_jax._mesh.on_mesh import OnMesh
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators._base import Work
from mora_jax.products import Contraction, Product

Way = Literal["activation", "fold", "fused"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One adapted layer, without its arrays.

    `multiply` is its own product of x and W, linear in both, and `product` says which.
    `execution` is as asked for, `precision` for products with M, all else of W and x.
    """

    product: Contraction
    multiply: Callable[..., Any]
    axes: str
    precision: jax.lax.PrecisionLike
    layout: places.KernelLayout | None
    execution: str
    x_shape: Shape
    x_dtype: Any

    def way(self, kernel: Any, work: Work, tuning: Tuning) -> Way:
        """Way to compute on a platform, by shapes and dtypes alone."""
        pays = self.execution == "auto" and self._fold_pays(kernel, work, tuning)
        if self.execution == "fold" or pays:
            return "fold"
        return "fused" if self.features(kernel.shape) else "activation"

    def features(self, kernel_shape: Shape) -> places.FeatureSharding | None:
        """The mesh axes that split features of inputs and outputs, if any does."""
        return self.layout and self.layout.for_activations(self.axes, kernel_shape)

    def _fold_pays(self, kernel: Any, work: Work, tuning: Tuning) -> bool:
        bits = jnp.finfo(kernel.dtype).bits
        if bits < 16 or (bits == 16 and not tuning.folds_16_bits):
            return False
        if self.layout and self.layout.gathers and not tuning.folds_gathered:
            return False
        ins, outs = features(kernel.shape, self.axes)
        rows = math.prod(self.x_shape) / ins
        return rows >= tuning.fold_from[work] * ins * outs / (ins + outs)


@dataclasses.dataclass(frozen=True)
class _OfLayer(LinearMap):
    """A map of a layer's x. The residuals are (operator, alpha M, W)."""

    layer: Layer

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        # JAX transposes what `forward` does with x, which holds nothing but the
        # residuals, so that no activation is kept for it.
        of_x = functools.partial(self.forward, residuals)
        return transposed(of_x, self.layer.x_shape, cotangent, self.layer.x_dtype)


class Adapted(_OfLayer):
    """x (W + alpha C M D), in the way that suits the platform."""

    def chosen(self, residuals: Any) -> LinearMap:
        operator, _, kernel = residuals
        way = self.layer.way(kernel, operator.work, current_tuning())
        return {"activation": Activation, "fold": Fold, "fused": Fused}[way](self.layer)

    def mapped(self, residuals: Any) -> LinearMap:
        # Each of many M's would make a folded kernel of its own.
        _, m, kernel = residuals
        if self.layer.execution != "auto" or not m or kernel:
            return self
        return Adapted(dataclasses.replace(self.layer, execution="activation"))

    def forward(self, residuals: Any, operand: Array) -> Array:
        return self.chosen(residuals).forward(residuals, operand)

    def derivative(self, residuals: Any, operand: Any) -> tuple[LinearMap, Any]:
        """The derivative by M: dy = alpha D(C(x) dM), see `equation.ByM`."""
        # JAX's own, of a fold, would go through a gradient of the kernel's shape.
        (op, m, kernel), layer = residuals, self.layer
        product, precision = layer.product, layer.precision
        arrays = (operand.shape, operand.dtype), (kernel.shape, kernel.dtype)
        dtype = _result_dtype(layer.multiply, *arrays)
        features = layer.features(kernel.shape)
        delta = OnMesh(op, features) if features else op
        x = product.to_rows(operand.astype(dtype))
        shards = places.row_shards(layer.layout, x)
        outs = sizes(kernel.shape, layer.axes, "o")
        by_m = ByM(m.dtype, dtype, precision, shards, features, product, outs)
        return by_m, (op, delta.kept(x, m.astype(dtype), precision))


class Activation(_OfLayer):
    """x W + alpha D(C(x) M)."""

    def forward(self, residuals: Any, operand: Array) -> Array:
        (op, m, kernel), layer = residuals, self.layer
        y = layer.multiply(operand, kernel)
        x = layer.product.to_rows(operand.astype(y.dtype))
        rows = chips.map_of(op).rows(x, m.astype(y.dtype), layer.precision)
        return y + layer.product.from_rows(rows, sizes(kernel.shape, layer.axes, "o"))


class Fold(_OfLayer):
    """x times the folded kernel."""

    def forward(self, residuals: Any, operand: Array) -> Array:
        return self.layer.multiply(operand, self._fold(residuals, operand))

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        # dx = g (W + alpha C M D)^T, with the kernel folded once more.
        layer, kernel = self.layer, self._fold(residuals, cotangent)
        like = layer.x_shape, cotangent, layer.x_dtype
        return transposed(lambda x: layer.multiply(x, kernel), *like)

    def _fold(self, residuals: Any, after: Array) -> Array:
        """W + alpha C M D, summed in float32 at least, rounded to W's dtype."""
        (op, m, kernel), layer = residuals, self.layer
        m, layout = m.astype(jnp.result_type(m, kernel, jnp.float32)), layer.layout
        gathers = layout is not None and layout.gathers
        # If it is gathered, the fold does not wait for `after`: it is the same in the
        # rematerialised forward and the backward pass, which can share it, gathered.
        m = m if gathers else _scheduled_after(after, m)
        delta = Delta(op, m, kernel.shape, layer.axes, layer.precision, layout)
        folded = delta.added_to(kernel)
        if layout and gathers:
            folded = jax.lax.with_sharding_constraint(folded, layout.gathered_sharding)
        # Of aligned blocks the fold changes some in place, and copies the rest.
        in_place = isinstance(op, chips.InBlocks) and op.aligned and not gathers
        if in_place or current_chip() != "tpu":
            return folded
        # Each part of a product would form a folded kernel once more.
        return jax.lax.optimization_barrier((after, folded))[1]


def _scheduled_after(x: Array, m: Array) -> Array:
    """`m` with a dependency on `x`."""
    # Without it nothing that a fold needs depends on the layers before it, so XLA would
    # fold every kernel of a model at its start and keep them all in memory. A barrier
    # says just this, but XLA's CPU compiler drops it before it orders the program.
    if x.size == 0:
        return m
    if current_chip():
        return jax.lax.optimization_barrier((x, m))[1]
    # So m is added to a zero that is computed from x: the sign bit of a number of x,
    # shifted down to the last place, and then out: 0 or 1, and so 0. A product with 0
    # would be NaN where x is infinite. One shift by all bits, or a subtraction of a
    # number from itself, XLA simplifies to the constant 0; two shifts it leaves alone.
    bits = jnp.finfo(x.dtype).bits
    first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim], f"uint{bits}")
    one = jnp.ones((), first.dtype)
    zero = (first >> (bits - 1) * one) >> one
    return m + zero.astype(m.dtype)


class Fused(_OfLayer):
    """The same where each device adds its parts of both terms."""

    def forward(self, residuals: Any, operand: Array) -> Array:
        (op, m, kernel), layer = residuals, self.layer
        labels, features = layer.product.claim.einsum, layer.features(kernel.shape)
        assert features is not None
        split: dict[str, places.MeshAxes] = {}
        for letter, axes in (("i", features.in_axes), ("o", features.out_axes)):
            # Of several axes of a kind (heads and their features) the first is split.
            of_kernel = zip(labels[1], layer.axes, kernel.shape, strict=True)
            first = next((c for c, a, n in of_kernel if a == letter and n > 1), "")
            split[first] = axes
        x_spec, kernel_spec, y_spec = (
            jax.sharding.PartitionSpec(*(split.get(label) or None for label in part))
            for part in labels
        )
        # XLA might gather the input instead. The kernel is gathered again in the
        # backward pass, so that it is not saved.
        place = jax.sharding.NamedSharding(features.mesh, kernel_spec)
        arrays = operand, m, jax.lax.with_sharding_constraint(kernel, place)
        on_one = Activation(dataclasses.replace(layer, layout=None))
        on_mesh = OnMesh(op, features)
        specs = x_spec, on_mesh.m_spec, kernel_spec
        return on_mesh.shared(on_one.forward, arrays, specs, y_spec)


@functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
def _result_dtype(multiply: Callable[..., Any], *arrays: tuple[Shape, Any]) -> Any:
    shapes = [jax.ShapeDtypeStruct(*array) for array in arrays]
    return jax.eval_shape(multiply, *shapes).dtype


def adapted_product(
    spec: AdapterSpec,
    m: ArrayLike,
    x: ArrayLike,
    kernel: Any,
    product: Product,
    multiply: Callable[..., Any],
    *,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    r"""A layer's product with its adapter: :math:`x W + \alpha\, D(C(x) M)`.

    M is (*stack, *m_shape), with the stack axes of `product`. `multiply` is the layer's
    own product of x and W, as `product` describes it, linear in both; W may be the
    stand-in of a quantized kernel that it understands. `dropout_key` drops some of what
    the adapter sees of `x`, and `precision` is for the product with M. The result has
    the shape and dtype of the layer's output.
    """
    check_product(spec, product)
    x = jnp.asarray(x)
    # A delta can be added to numbers, and a kernel may stand for quantized ones.
    is_array = isinstance(kernel, Array | np.ndarray)
    floating = is_array and jnp.issubdtype(kernel.dtype, jnp.floating)
    takes_delta = floating and places.explicit_sharding(kernel) is None
    if not (takes_delta and joins(product, spec.axes, x, dropout_key is not None)):
        y = multiply(x, kernel)
        return add_delta(y, spec, m, x, product, dropout_key, precision)
    kernel = jnp.asarray(kernel)
    if kernel.shape != spec.kernel_shape:
        told = f"the layer multiplies by a kernel of shape {kernel.shape}"
        remedy = "say execution='activation' in overrides for it"
        raise ValueError(f"{told}, the adapter's has {spec.kernel_shape}; {remedy}")
    assert isinstance(product, Contraction)  # or it would not have joined
    # Residuals are arrays, and all else is static: layers of one shape share a trace.
    settings = spec.axes, precision, spec.layout, spec.execution
    layer = Layer(product, multiply, *settings, tuple(x.shape), x.dtype)
    delta = Delta.of(spec, m, dtype=jnp.promote_types(jnp.result_type(m), x.dtype), x=x)
    return Adapted(layer)((delta.operator, delta.m, kernel), x)


def joins(product: Product, axes: str, x: Any, dropout: bool = False) -> bool:
    """True if product and delta can be one map of the layer's input `x`, or its shape.

    `axes` are the kernel's, as the plan has them.
    """
    # With a stack axis it would be a batched product.
    fits = isinstance(product, Contraction) and product.axes == axes and "s" not in axes
    if not fits or places.explicit_sharding(x) is not None:
        return False
    # The adapter sees another input than the layer under dropout. Steps of the ways
    # lack explicit shardings. A library that computes the layer's product would be
    # given, instead of the kernel that it knows, one with a delta, and round it.
    known = {type(size) for size in x.shape} <= {int}  # unlike some of jax.export
    return known and not (dropout or intercepted())


def add_delta(
    y: Array,
    spec: AdapterSpec,
    m: ArrayLike,
    x: ArrayLike,
    product: Product,
    dropout_key: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
    factor: Array | None = None,
) -> Array:
    """A layer's output `y` with its delta, arguments as for `adapted_product`.

    `factor` is an array that the layer multiplies its output by, instead of its kernel.
    """
    if (sharding := places.explicit_sharding(y)) is not None:
        labels = product.claim.einsum
        layout = places.explicit_layout(labels, x, sharding) if labels else None
        spec = dataclasses.replace(spec, layout=layout)

        def add(y: Array, m: Any, x: ArrayLike, key: Any) -> Array:
            return add_delta(y, spec, m, x, product, key, precision, factor)

        return places.with_auto_axes(add, sharding, y, m, x, dropout_key)
    x, rate = jnp.asarray(x), spec.dropout

    @undisturbed
    def added(x: Array) -> Array:
        delta = Delta.of(spec, m, dtype=y.dtype, precision=precision, x=x)
        return product.delta(delta, x)

    if product.takes_indices:  # they cannot be zero, and are dropped with their rows
        rows = dropped(added(x), dropout_key, rate, (*x.shape, 1))
    else:
        rows = added(dropped(x.astype(y.dtype), dropout_key, rate))
    return y + (rows if factor is None else rows * factor.astype(y.dtype))


def dropped(
    x: Array, key: PRNGKeyArray | None, rate: float, shape: Shape | None = None
) -> Array:
    """`x` with a part of it zero, by a mask of `shape`; without a key all of it."""
    if key is None or rate == 0:
        return x
    # What stays is scaled up, which keeps the mean.
    mask = jax.random.bernoulli(key, 1 - rate, x.shape if shape is None else shape)
    return jnp.where(mask, x / (1 - rate), 0)


def check_product(spec: AdapterSpec, product: Product) -> None:
    """Raise unless the layer reads the kernel's axes as the plan does."""
    if product.fits(spec.axes):
        return
    # A lifted transformation may take off stack axes of the plan.
    taken = spec.stacks(len(spec.axes) - len(product.axes))
    if not any(product.fits("".join(without(spec.axes, one))) for one in taken):
        raise ValueError(
            f"the adapter reads the kernel's axes as {spec.axes!r}, the layer computes "
            f"{product.axes!r}; plan with mora_jax.linen.plan or mora_jax.nnx.plan, or "
            f"say 'axes': {product.axes!r} in overrides for it"
        )
