"""Products of Flax's own layers, of both APIs; importing this registers them."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from mora_jax._common.types import ArrayLike
from mora_jax._flax.layer_rules import register_layer
from mora_jax.products import ATTEND, DENSE, Convolution, Lookup
from mora_jax.products.contraction import dot_general_equation


def _axes(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _general(module: Any, inputs: ArrayLike, *_: Any, **__: Any) -> str:
    linen = isinstance(module, nn.Module)
    names = ("batch_dims", "features") if linen else ("batch_axis", "out_features")
    axis, batch, outs = (_axes(getattr(module, name)) for name in ("axis", *names))
    batch, axis = (sorted(k % inputs.ndim for k in axes) for axes in (batch, axis))
    # The kernel's axes are (*batch, *in, *out).
    summed = range(len(batch), len(batch) + len(axis))
    numbers = (axis, summed), (batch, range(len(batch)))
    ndim = summed.stop + len(outs)
    return dot_general_equation(inputs.ndim, ndim, numbers)


def _einsum(module: Any, x: Any, einsum_str: Any = None, *_: Any, **__: Any) -> str:
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


for api, dense, general in (
    (nn, nn.Dense, nn.DenseGeneral),
    (nnx, nnx.Linear, nnx.LinearGeneral),
):
    register_layer(dense, equation=DENSE, dot_general=True)
    register_layer(general, equation=_general, dot_general=True)
    register_layer(api.Einsum, equation=_einsum)
    register_layer(api.Conv, equation=convolution)
    register_layer(api.ConvTranspose, equation=convolution)
    register_layer(api.Embed, equation=Lookup(), kernel="embedding")
    register_layer(api.Embed, equation=ATTEND, kernel="embedding", method="attend")
