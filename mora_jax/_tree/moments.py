r"""Second moments of the inputs of adapted layers.

An adapted model computes what its adapters say, under scan and remat, with quantized
kernels and in both APIs of Flax. So the moments are measured by adapters whose delta is
zero and whose "gradient by M" is the moment: no hook into the model is needed. XLA
leaves out the backward pass of the model, since no moment depends on a gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._common.checks import check_finite
from mora_jax._common.types import Path, Precision, Shape
from mora_jax._jax.linear_algebra import rows_product
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._tree import losses, paths
from mora_jax.operators import Operator
from mora_jax.operators._pytree import operator


@dataclasses.dataclass(frozen=True)
class Moments:
    """The inputs of a kernel as one call showed them, with the axes of a stack first.

    Attributes:
      products: S Z, (*stack, in_features, columns), of the second moments S.
      squares: The diagonal of S, (*stack, in_features).
      is_multiplied: True if the call multiplies rows of numbers by the kernel.
      is_used_otherwise: True if the call uses the kernel in another way: it looks up
        its rows, reads it, or convolves with it in groups.
      ignores_mask: True if the rows of an input do not have the shape of the mask.
    """

    products: np.ndarray
    squares: np.ndarray
    is_multiplied: bool
    is_used_otherwise: bool
    ignores_mask: bool

    @property
    def trace(self) -> np.ndarray:
        """The trace of S, (*stack,)."""
        return self.squares.sum(-1)


def measured(
    call: Callable[[Any], Any],
    adapters: Any,
    found: Mapping[Path, Adapter],
    columns: Mapping[Path, np.ndarray],
    mask: np.ndarray | None,
) -> dict[Path, Moments]:
    """The moments of inputs in `call`, by the paths of kernels.

    Args:
      call: A function from adapters to outputs of the adapted model.
      adapters: The tree of adapters that `call` is given, with others in their places.
      found: The adapters of kernels among them.
      columns: Z for each of them, (in_features, columns) or with a stack's axes first.
      mask: 1 for each position that counts and 0 for others; None to count all.
    """
    meters = {}
    for path, z in columns.items():
        meters[path] = _meter_of(found[path], z, mask)

    def total(given: Any) -> Array:
        outputs = map(jnp.asarray, jax.tree.leaves(call(given)))
        real = [y for y in outputs if jnp.issubdtype(y.dtype, jnp.floating)]
        if not real:
            raise ValueError("call must return floating-point outputs, got none")
        return sum((jnp.sum(y.astype(jnp.float32)) for y in real), jnp.zeros(()))

    grads = jax.grad(total)(paths.replace_adapters(adapters, meters))
    losses.refuse_traced("call", grads, "input_damping")
    moments = {}
    for path, gradient in paths.adapters_in(grads).kernels.items():
        if path in meters:
            op: Any = gradient.operator
            moments[path] = op.read(np.asarray(gradient.m, np.float64))
            check_finite(moments[path].squares, f"inputs of {'/'.join(path)} in call")
    return moments


def _meter_of(adapter: Adapter, z: np.ndarray, mask: np.ndarray | None) -> Adapter:
    """An adapter that measures the inputs of the kernel of another one."""
    old, shape = adapter.spec, () if mask is None else mask.shape
    op = Meter(old.in_features, old.out_features, z.shape[-1], mask_shape=shape)
    spec = dataclasses.replace(
        old,
        operator=op,
        execution="activation",
        alpha=1.0,
        scale=1.0,
        dropout=0.0,
        layout=None,
    )
    stack = z.shape[:-2]
    weights = np.zeros(0) if mask is None else mask.ravel()
    parts = [
        np.zeros((*stack, op.in_features)),
        z.reshape(*stack, -1),
        np.broadcast_to(weights, (*stack, weights.size)),
        np.zeros((*stack, COUNTS)),
    ]
    m = jnp.asarray(np.concatenate(parts, -1), jnp.float32)
    return Adapter(jnp.broadcast_to(m, spec.shape), spec)


COUNTS = 3  # of calls: with rows, in another way, and with rows that are not the mask's


@operator
class Meter(Operator):
    """A delta of zero, whose "gradient by M" is what `Moments` holds.

    M is one vector of four parts: a place for the squares, the columns Z, the mask, and
    a place for three counts of calls. Its gradient has the squares, S Z, zeros and the
    counts. `square_rank` is the number of columns.
    """

    mask_shape: Shape = ()

    name = "moments"
    square = False
    bounded = False

    @property
    def m_shape(self) -> Shape:
        return (sum(self._sizes),)

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        masked = math.prod(self.mask_shape) if self.mask_shape else 0
        return self.in_features, self.in_features * self.square_rank, masked, COUNTS

    def _parts(self, m: Any) -> list[Any]:
        """The four parts of M, or of its gradient."""
        ends = np.cumsum(self._sizes)
        return [m[..., end - n : end] for n, end in zip(self._sizes, ends, strict=True)]

    def _joined(self, squares: Array, products: Array, counts: Array) -> Array:
        """The gradient of its parts."""
        masked = jnp.zeros(self._sizes[2], squares.dtype)
        counts = counts.astype(squares.dtype)
        return jnp.concatenate([squares, products.reshape(-1), masked, counts])

    def read(self, gradient: np.ndarray) -> Moments:
        """The moments that a gradient by M holds."""
        squares, products, _, counts = self._parts(gradient)
        counts = counts.reshape(-1, COUNTS).sum(0)
        return Moments(
            products=products.reshape(*squares.shape, self.square_rank),
            squares=squares,
            is_multiplied=bool(counts[0]),
            is_used_otherwise=bool(counts[1]),
            ignores_mask=bool(counts[2]),
        )

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        return jnp.zeros((*x.shape[:-1], self.out_features), x.dtype)

    def kept(self, x: Array, m: Array, precision: Precision = None) -> Any:
        return x, m

    def kept_of(self, h: Array, m: Array) -> Any:
        return h, m

    def factors(self, m: Array) -> tuple[Array, Array]:
        # Where a convolution asks for C, C(x) are the windows that it multiplies.
        c = jnp.eye(self.in_features, dtype=m.dtype)
        return c, jnp.zeros((self.in_features, self.out_features), m.dtype)

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        return self.rows(kept[0], tangent)

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        x, m = map(wide, kept)
        _, columns, mask, _ = self._parts(m)
        count = len(self.mask_shape)
        fits = x.shape[:-1][:count] == self.mask_shape
        flat = x.shape[:-1] == (math.prod(self.mask_shape),)
        if count and (fits or flat):
            leading = x.shape[:1] if flat else self.mask_shape
            mask = mask.reshape(*leading, *[1] * (x.ndim - len(leading)))
            x = jnp.where(mask > 0, x, 0)  # pads may be NaN
        x = x.reshape(-1, self.in_features)
        products = rows_product(x, x @ columns.reshape(self.in_features, -1))
        ignored = count > 0 and not (fits or flat)
        counts = jnp.array([len(x) > 0, False, len(x) > 0 and ignored])
        return self._joined(jnp.sum(x**2, 0), products, counts)

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        return _used_otherwise(self, (*indices.shape, self.out_features), m)

    def matrix(self, m: Array) -> Array:
        return _used_otherwise(self, (self.in_features, self.out_features), m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _used_otherwise(op: Meter, shape: Shape, m: Array) -> Array:
    """Zeros, whose "gradient by M" counts one call in another way."""
    return jnp.zeros(shape, m.dtype)


def _forward(op: Meter, shape: Shape, m: Array) -> tuple[Array, Array]:
    return _used_otherwise(op, shape, m), m


def _backward(op: Meter, shape: Shape, m: Array, g: Array) -> tuple[Array]:
    none = jnp.zeros(op.in_features, m.dtype)
    products = jnp.zeros((op.in_features, op.square_rank), m.dtype)
    return (op._joined(none, products, jnp.array([False, True, False])),)


_used_otherwise.defvjp(_forward, _backward)
