"""What Flax's own layers compute; importing this registers them."""

from typing import Any

import flax.linen as nn

from mora_jax._common.types import ArrayLike
from mora_jax._flax.convolutions import convolution, transposed_convolution
from mora_jax._flax.layer_rules import register_layer
from mora_jax.products import ATTEND, DENSE, Contraction, Lookup


def _general(module: nn.DenseGeneral, inputs: ArrayLike) -> Contraction:
    def axes(value: Any) -> tuple[int, ...]:
        return (value,) if isinstance(value, int) else tuple(value)

    outs = len(axes(module.features))
    batch = axes(module.batch_dims)
    return Contraction.general(inputs.ndim, axes(module.axis), batch, outs)


def _einsum(module: nn.Einsum, inputs: ArrayLike, einsum_str: str | None = None) -> str:
    return nn.merge_param("einsum_str", module.einsum_str, einsum_str)


register_layer(nn.Dense, equation=DENSE, dot_general=True)
register_layer(nn.DenseGeneral, equation=_general, dot_general=True)
register_layer(nn.Einsum, equation=_einsum)
register_layer(nn.Conv, equation=convolution)
register_layer(nn.ConvTranspose, equation=transposed_convolution)
register_layer(nn.Embed, equation=Lookup(), kernel="embedding")
register_layer(nn.Embed, equation=ATTEND, kernel="embedding", method="attend")
