"""What Flax's own layers compute; importing this registers them."""

from typing import Any

from flax import nnx

from mora_jax._flax.convolutions import convolution, transposed_convolution
from mora_jax._flax.layer_rules import register_layer
from mora_jax.products import ATTEND, DENSE, Contraction, Lookup


def _general(module: nnx.LinearGeneral, inputs: Any, *_: Any, **__: Any) -> Contraction:
    outs = len(module.out_features)
    return Contraction.general(inputs.ndim, module.axis, module.batch_axis, outs)


def _einsum(
    module: nnx.Einsum,
    inputs: Any,
    einsum_str: str | None = None,
    *_: Any,
    **__: Any,
) -> str:
    return einsum_str or module.einsum_str


register_layer(nnx.Linear, equation=DENSE, dot_general=True)
register_layer(nnx.LinearGeneral, equation=_general, dot_general=True)
register_layer(nnx.Einsum, equation=_einsum)
register_layer(nnx.Conv, equation=convolution)
register_layer(nnx.ConvTranspose, equation=transposed_convolution)
register_layer(nnx.Embed, equation=Lookup(), kernel="embedding")
register_layer(nnx.Embed, equation=ATTEND, kernel="embedding", method="attend")
