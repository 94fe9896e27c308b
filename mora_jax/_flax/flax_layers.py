"""Products of Flax's own layers, of both APIs; importing this registers them."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from mora_jax._common.types import ArrayLike
from mora_jax._flax.layer_rules import register_layer
from mora_jax.products import ATTEND, DENSE, Contraction, Convolution, Lookup


def _axes(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _linen_general(module: nn.DenseGeneral, inputs: ArrayLike) -> Contraction:
    axis, batch, outs = map(_axes, (module.axis, module.batch_dims, module.features))
    return Contraction.general(inputs.ndim, axis, batch, len(outs))


def _nnx_general(
    module: nnx.LinearGeneral, inputs: Any, *_: Any, **__: Any
) -> Contraction:
    outs = len(module.out_features)
    return Contraction.general(inputs.ndim, module.axis, module.batch_axis, outs)


def _einsum(
    module: Any, inputs: Any, einsum_str: str | None = None, *_: Any, **__: Any
) -> str:
    return einsum_str or module.einsum_str


def convolution(layer: Any, *_: Any, **__: Any) -> Convolution:
    """The product of `Conv` or `ConvTranspose`; Linen's class computes it."""
    transposed = hasattr(layer, "transpose_kernel")
    cls = getattr(nn, "ConvTranspose" if transposed else "Conv")
    names = ["strides", "padding", "kernel_dilation", "mask", "precision"]
    if transposed:
        plain, features = True, "oi" if layer.transpose_kernel else "io"
        names += ["transpose_kernel"]
    else:
        plain, features = layer.feature_group_count == 1, "io"
        names += ["input_dilation", "feature_group_count"]
    window, masked = _axes(layer.kernel_size), layer.mask is not None
    copied = {name: getattr(layer, name) for name in names}

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = kernel.shape[len(window) + features.index("o")]
        settings = {**copied, "use_bias": False, "dtype": kernel.dtype}
        # Without a parent; otherwise it would become a part of the running module.
        convolution = cls(outputs, window, parent=None, **settings)
        return convolution.apply({"params": {"kernel": kernel}}, x)

    axes = "i" * len(window) + features
    return Convolution(axes, convolve, plain and not masked, masked)


for api, dense, general, equation in (
    (nn, nn.Dense, nn.DenseGeneral, _linen_general),
    (nnx, nnx.Linear, nnx.LinearGeneral, _nnx_general),
):
    register_layer(dense, equation=DENSE, dot_general=True)
    register_layer(general, equation=equation, dot_general=True)
    register_layer(api.Einsum, equation=_einsum)
    register_layer(api.Conv, equation=convolution)
    register_layer(api.ConvTranspose, equation=convolution)
    register_layer(api.Embed, equation=Lookup(), kernel="embedding")
    register_layer(api.Embed, equation=ATTEND, kernel="embedding", method="attend")
