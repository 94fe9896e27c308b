"""A program takes the way of the platform that it is lowered for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import close, random
from jax import export
from platforms import as_if_on

from mora_jax import FrozenDense, MoRAConfig, mora_apply
from mora_jax._jax.tracing import current_platform


def apply(m, frozen, x):
    return mora_apply({"kernel_mora": m}, frozen, x)


def layer(features, rows):
    """A layer of bfloat16, M and an input, of which a chip folds the layer."""
    kernel = jnp.ones((features, features), jnp.bfloat16)
    config = MoRAConfig(operator="rotation", square_rank=128)
    frozen = FrozenDense.from_config(kernel, config=config)
    x = jnp.ones((rows, features), jnp.bfloat16)
    return jnp.full((128, 128), 1e-2), frozen, x


def test_an_exported_program_takes_each_platforms_way():
    """A fold, which updates blocks in a loop, on chips alone."""
    args = layer(256, 1024)
    traced, loops = jax.jit(apply).trace(*args), {}
    for platform in ("cpu", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        loops[platform] = text.count("stablehlo.while")
    assert loops == {"cpu": 0, "tpu": 1}
    platforms = "tpu", "cuda", "cpu"
    exported = export.export(jax.jit(apply), platforms=platforms)(*args)
    assert exported.platforms == platforms
    close(exported.call(*args), apply(*args))


@pytest.mark.parametrize("operator", ["rotation", "hadamard"])
def test_a_program_of_any_number_of_rows(operator, unchecked):
    """It computes with activations, since how many are worth a fold is not known."""
    config = MoRAConfig(operator=operator, square_rank=8)
    frozen = FrozenDense.from_config(jnp.ones((24, 16)), config=config)
    (rows,) = export.symbolic_shape("rows")
    m, x = random(0, 8, 8), jax.ShapeDtypeStruct((rows, 24), jnp.float32)
    run = export.export(jax.jit(lambda m, x: apply(m, frozen, x)))(m, x).call
    for number in (1, 300):
        x = random(1, number, 24)
        close(run(m, x), apply(m, frozen, x), 1e-5)


def test_programs_for_tpus_do_not_grow_with_the_number_of_blocks():
    def loss(m, kernel, frozen, x):
        return apply(m, dataclasses.replace(frozen, kernel=kernel), x).sum()

    def lines(features):
        m, frozen, x = layer(features, 4096)
        traced = jax.jit(jax.grad(loss)).trace(m, frozen.kernel, frozen, x)
        return len(traced.lower(lowering_platforms=("tpu",)).as_text().splitlines())

    assert abs(lines(4096) - lines(2048)) < 0.1 * lines(2048)


def test_what_was_traced_for_one_platform_is_not_used_on_another():
    """Or tests as if on others would hold one program against the oracle again."""
    seen, x = [], jnp.ones(3)

    @jax.jit
    def double(x):
        seen.append(current_platform())
        return 2 * x

    double(x)
    for name in ("tpu", "cuda", "tpu"):
        with as_if_on(name):
            double(x)
    double(x)
    assert seen == [jax.default_backend(), "tpu", "cuda"]
