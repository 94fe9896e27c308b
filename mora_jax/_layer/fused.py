"""A dense product and its delta in one, where devices share the features.

Where devices share the inputs, each has a part of the layer's output, and the parts are
summed over the devices. The delta is such a sum as well: of an array as large for a
block operator, and of C(x) for others. Here each device adds its parts of both before
there is one sum, in the forward pass and for the input's gradient: the adapter causes
no traffic but that of M's own gradient. XLA would not join the sums: between that of
the layer and that of the delta stands a sum of the two.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mora_jax._jax.linear_map import Static, static
from mora_jax._layer.delta import Delta
from mora_jax._layer.maps import DeltaOfTangent, result_dtype
from mora_jax._mesh.layout import FeatureSharding, MeshAxes
from mora_jax._mesh.shard_map import REPLICATED, ShardMappedMap
from mora_jax.products import Contraction, Product


@dataclasses.dataclass(frozen=True)
class FusedMap(ShardMappedMap):
    """Product and delta as a map of x. The residuals are (operator, alpha M, W)."""

    by_m: DeltaOfTangent | None = None

    @classmethod
    def of(
        cls,
        delta: Delta,
        x: jax.Array,
        kernel: jax.Array,
        product: Product,
        multiply: Static,
    ) -> "FusedMap":
        """The map of a layer; the arguments are those of `AdaptedMap.of`."""
        assert isinstance(product, Contraction) and delta.layout is not None
        features = delta.layout.for_activations(delta.axes, delta.kernel_shape)
        x_spec, kernel_spec, y_spec = _specs(product, delta, features)
        dtype = result_dtype(multiply, x, kernel)
        return cls(
            features,
            static(_layer_and_delta, multiply, product, delta.axes, delta.precision),
            x.shape,
            x.dtype,
            x_spec,
            y_spec,
            residual_specs=(REPLICATED, kernel_spec),
            gathers_last=True,
            by_m=DeltaOfTangent(product, delta.settings, dtype),
        )

    def derivatives(self) -> Mapping[int, Callable[[Any, Any, Any], jax.Array]]:
        assert self.by_m is not None
        return {1: self.by_m}


def _specs(
    product: Contraction, delta: Delta, features: FeatureSharding
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How input, kernel and output are split."""
    split: dict[str, MeshAxes] = {}
    for letter, axes in (("i", features.in_axes), ("o", features.out_axes)):
        kernel = zip(product.kernel, delta.axes, delta.kernel_shape, strict=True)
        first = next((c for c, a, n in kernel if a == letter and n > 1), "")
        split[first] = axes
    inputs, kernel, outputs = (
        PartitionSpec(*(split.get(label) or None for label in labels))
        for labels in (product.inputs, product.kernel, product.outputs)
    )
    return inputs, kernel, outputs


def _layer_and_delta(
    multiply: Static,
    product: Contraction,
    axes: str,
    precision: jax.lax.PrecisionLike,
    residuals: Any,
    operand: jax.Array,
) -> jax.Array:
    """Both on one device, by its part of the operator and of the kernel."""
    (part, m, kernel), x = residuals, operand
    y = multiply(x, kernel)
    delta = Delta(part, m.astype(y.dtype), kernel.shape, axes, precision)
    return y + product.delta(delta, x.astype(y.dtype))
