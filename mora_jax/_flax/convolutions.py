"""The products of Flax's convolutions, which Linen and NNX share."""

from typing import Any

import flax.linen as nn
import jax

from mora_jax.products import Convolution


def convolution(layer: Any, *_: Any, **__: Any) -> Convolution:
    """The product of `Conv`."""
    plain = layer.feature_group_count == 1 and layer.mask is None
    settings = "input_dilation", "feature_group_count"
    return _convolution(layer, nn.Conv, settings, "io", plain)


def transposed_convolution(layer: Any, *_: Any, **__: Any) -> Convolution:
    """The product of `ConvTranspose`."""
    features = "oi" if layer.transpose_kernel else "io"
    settings = ("transpose_kernel",)
    plain = layer.mask is None
    return _convolution(layer, nn.ConvTranspose, settings, features, plain)


def _convolution(
    layer: Any, cls: Any, fields: tuple[str, ...], features: str, any_outputs: bool
) -> Convolution:
    """The product of a layer of either API; Linen's `cls` computes it."""
    size = layer.kernel_size
    window = (size,) if isinstance(size, int) else tuple(size)
    shared = "strides", "padding", "kernel_dilation", "mask", "precision"
    copied = {name: getattr(layer, name) for name in (*shared, *fields)}

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = kernel.shape[len(window) + features.index("o")]
        settings = {**copied, "use_bias": False, "dtype": kernel.dtype}
        # Without a parent; otherwise it would become a part of the running module.
        convolution = cls(outputs, window, parent=None, **settings)
        return convolution.apply({"params": {"kernel": kernel}}, x)

    axes = "i" * len(window) + features
    return Convolution(axes, convolve, any_outputs, masked=layer.mask is not None)
