"""Layers that read the same input, such as queries, keys and values."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.chips import roofline, topologies
from benchmarks.chips.programs import shape
from mora_jax import FrozenDense, MoRAConfig, mora_apply

PLACE = topologies.on_first(topologies.devices("v5e"))
# So many that an input does not stay on the chip.
ROWS, INS, OUTS = 32768, 4096, (1024, 256, 256)


def bytes_moved(square_ranks):
    """Of the output and both gradients of all layers together, on a TPU."""
    layers = [
        FrozenDense.from_config(
            shape(INS, outs, dtype=jnp.bfloat16),
            config=MoRAConfig(operator="sharing", square_rank=q),
        )
        for outs, q in zip(OUTS, square_ranks, strict=True)
    ]

    def run(adapters, kernels, x, cotangents):
        def forward(adapters, x):
            each = zip(adapters, layers, kernels, strict=True)
            return [
                mora_apply({"kernel_mora": m}, dataclasses.replace(layer, kernel=w), x)
                for m, layer, w in each
            ]

        y, backward = jax.vjp(forward, adapters, x)
        return y, backward(cotangents)

    args = (
        [shape(*layer.spec.shape, dtype=jnp.float32) for layer in layers],
        [layer.kernel for layer in layers],
        shape(ROWS, INS, dtype=jnp.bfloat16),
        [shape(ROWS, outs, dtype=jnp.bfloat16) for outs in OUTS],
    )
    args = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=PLACE), args
    )
    return roofline.measure(jax.jit(run).lower(*args).compile(), "v5e").moved


def test_layers_of_one_q_share_their_sums_of_the_input():
    """C(x) is computed once for all of them: x is read once less."""
    x = 2 * ROWS * INS  # bytes
    assert bytes_moved((128, 128, 128)) + 0.9 * x < bytes_moved((256, 128, 128))
