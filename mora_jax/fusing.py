"""A dense product and its update in one, where devices share the features.

Parts of the output, and parts of the input's gradient, are added up over the devices
once, each with what the adapter adds to it: there is no traffic but the layer's own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._linear import with_derivatives
from mora_jax._mesh import WHOLE, Axes, FeatureMesh, OnShards
from mora_jax._types import ArrayLike
from mora_jax.explicit import explicit_sharding
from mora_jax.folding import Multiply, Settings, UpdateByM
from mora_jax.operators import Operator
from mora_jax.operators._shard import shard
from mora_jax.products import Contraction, KernelUpdate, Product
from mora_jax.spec import AdapterSpec


def fuses(spec: AdapterSpec, product: Product, x: Any) -> bool:
    """Whether whole results would else be added up twice, the layer's and the update's.

    So it is of block operators; what others compress to is small, and added up alone.
    """
    if spec.layout is None or not spec.operator.block:
        return False
    if not isinstance(product, Contraction) or "s" in product.axes:
        return False
    if explicit_sharding(x) is not None:  # one device's part is of no such type
        return False
    inner = slice(len(spec.axes) - len(product.axes), None)
    mesh = spec.layout.of_rows(spec.axes[inner], spec.kernel_shape[inner])
    return product.axes == spec.axes[inner] and bool(mesh.ins or mesh.outs)


def fused_product(
    spec: AdapterSpec,
    m: ArrayLike,
    x: jax.Array,
    kernel: jax.Array,
    product: Contraction,
    multiply: Multiply,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """`multiply(x, kernel)` and the update; arguments are those of `folded_product`."""
    settings = Settings.of(spec, x, kernel, product, multiply, precision)
    assert settings.layout is not None
    mesh = settings.layout.of_rows(settings.axes, settings.shape)
    x_spec, kernel_spec, y_spec = _specs(product, settings, mesh)
    specs = WHOLE, WHOLE, kernel_spec
    by_x = _ByX.of(mesh, _Both(mesh, settings), x, x_spec, y_spec, specs)
    function = with_derivatives(_Fused(by_x), {1: UpdateByM(settings), 3: by_x})
    m = settings.layout.gather_m(jnp.asarray(m))
    return function(spec.operator, m, kernel, x)


def _specs(
    product: Contraction, settings: Settings, mesh: FeatureMesh
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How input, kernel and output are split."""
    split: dict[str, Axes] = {}
    for letter, axes in (("i", mesh.ins), ("o", mesh.outs)):
        kernel = zip(product.kernel, settings.axes, settings.shape, strict=True)
        first = next((c for c, a, n in kernel if a == letter and n > 1), "")
        split[first] = axes
    inputs, kernel, outputs = (
        PartitionSpec(*(split.get(label) or None for label in labels))
        for labels in (product.inputs, product.kernel, product.outputs)
    )
    return inputs, kernel, outputs


@dataclasses.dataclass(frozen=True)
class _Both:
    """Product and update on one device."""

    mesh: FeatureMesh
    settings: Settings

    def __call__(
        self,
        k_in: jax.Array,
        k_out: jax.Array,
        x: jax.Array,
        op: Operator,
        m: jax.Array,
        kernel: jax.Array,
    ) -> jax.Array:
        one, here = self.settings, shard(op, self.mesh, k_in, k_out)
        y = one.multiply(x, kernel)
        m, x = m.astype(y.dtype), x.astype(y.dtype)
        update = KernelUpdate(here, m, kernel.shape, one.axes, one.precision)
        return y + one.product.update(update, x) * jnp.asarray(one.alpha, y.dtype)


@dataclasses.dataclass(frozen=True)
class _ByX(OnShards):
    """A map with a kernel among its residuals, which axes of the batch may split.

    Such a kernel is gathered, or XLA might gather inputs for its sake: from its parts
    in each direction, so that no gathered one is kept.
    """

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        return super().forward(self._gather(*residuals), x)

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        return super().backward(self._gather(*residuals), y)

    def _gather(self, op: Operator, m: jax.Array, kernel: jax.Array) -> Any:
        whole = NamedSharding(self.mesh.mesh, self.specs[-1])
        return op, m, jax.lax.with_sharding_constraint(kernel, whole)


@dataclasses.dataclass(frozen=True)
class _Fused:
    """Product and update as a function of all that it multiplies."""

    by_x: OnShards

    def __call__(
        self, operator: Operator, m: jax.Array, kernel: jax.Array, x: Any
    ) -> jax.Array:
        return self.by_x((operator, m, kernel), x)
