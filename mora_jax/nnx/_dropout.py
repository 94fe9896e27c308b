"""Flax's own dropout, for its keys and its train and eval modes."""

from typing import Any

import jax
from flax import nnx

from mora_jax.spec import AdapterSpec


def make_dropout(
    spec: AdapterSpec, rngs: nnx.Rngs | None, lifted: tuple[int, ...] = ()
) -> nnx.Dropout:
    """The dropout of one adapter; a stack of them for layers that are scanned.

    Args:
      spec: the adapter.
      rngs: forked, one stream for each layer.
      lifted: sizes of the axes that lifted transformations take off.
    """
    if rngs is None:
        raise ValueError(f"dropout={spec.dropout} needs rngs, got None")

    dropout = nnx.Dropout(spec.dropout, rngs=rngs)
    if lifted:
        stream: Any = dropout.rngs
        keys = jax.random.split(stream(), lifted)
        dropout.rngs = nnx.RngStream(keys, tag=stream.tag)
    return dropout
