"""The product of Flax's convolutions, Linen's and NNX's."""

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
    layer: Any, kind: Any, fields: tuple[str, ...], features: str, any_outputs: bool
) -> Convolution:
    size = layer.kernel_size
    window = (size,) if isinstance(size, int) else tuple(size)
    shared = "strides", "padding", "kernel_dilation", "mask", "precision"
    copied = {name: getattr(layer, name) for name in (*shared, *fields)}

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = kernel.shape[len(window) + features.index("o")]
        # A module of its own, not a part of the one that is running.
        settings = {**copied, "use_bias": False, "dtype": kernel.dtype}
        own = kind(outputs, window, parent=None, **settings)
        return own.apply({"params": {"kernel": kernel}}, x)

    axes = "i" * len(window) + features
    return Convolution(axes, convolve, any_outputs, masked=layer.mask is not None)
