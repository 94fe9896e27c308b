"""What Flax's own layers compute; importing this registers them."""

import string
from typing import Any

import flax.linen as nn

from mora_jax._types import ArrayLike
from mora_jax.layers import register_layer
from mora_jax.products import Convolution, Lookup

DENSE = "...i,io->...o"
ATTEND = "...d,vd->...v"


def _dense_general(module: nn.DenseGeneral, inputs: ArrayLike) -> str:
    def normalise(axes: Any) -> list[int]:
        axes = [axes] if isinstance(axes, int) else axes
        return sorted(axis % inputs.ndim for axis in axes)

    features = module.features
    count = len(features) if not isinstance(features, int) else 1
    labels = string.ascii_letters[: inputs.ndim]
    stack = "".join(labels[axis] for axis in normalise(module.batch_dims))
    ins = "".join(labels[axis] for axis in normalise(module.axis))
    outs = string.ascii_letters[inputs.ndim : inputs.ndim + count]
    batch = "".join(c for c in labels if c not in stack + ins)
    return f"{labels},{stack}{ins}{outs}->{stack}{batch}{outs}"


def _einsum(module: nn.Einsum, inputs: ArrayLike, einsum_str: str | None = None) -> str:
    return nn.merge_param("einsum_str", module.einsum_str, einsum_str)


register_layer(nn.Dense, equation=DENSE)
register_layer(nn.DenseGeneral, equation=_dense_general)
register_layer(nn.Einsum, equation=_einsum)
register_layer(nn.Conv, equation=Convolution.of)
register_layer(nn.ConvTranspose, equation=Convolution.transposed)
register_layer(nn.Embed, equation=Lookup(), kernel="embedding")
register_layer(nn.Embed, equation=ATTEND, kernel="embedding", method="attend")
