"""A small model as large ones are: scanned, rematerialised layers in bfloat16."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from mora_jax import MoRAConfig, linen, sharding

WIDTH, HIDDEN, LAYERS, ROWS = 512, 1024, 4, 16384
KERNELS = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
NAMES = {"up": P(None, None, "model"), "down": P(None, "model", None)}
"""How a mesh splits the kernels, whose first axis is that of the layers."""


class Block(nn.Module):
    """Two dense layers around a nonlinearity, and the way past them."""

    @nn.compact
    def __call__(self, x, _):
        settings = {"use_bias": False, "dtype": jnp.bfloat16}
        h = nn.Dense(HIDDEN, **settings, name="up")(x)
        return x + nn.Dense(WIDTH, **settings, name="down")(nn.silu(h)), None


class Model(nn.Module):
    """(rows, width) -> (rows, width)."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers(name="layers")(x, None)[0]


MODEL = Model()


def on_mesh(devices):
    """A mesh of four devices with the axes "data" and "model"."""
    return Mesh(np.array(devices).reshape(2, 2), ("data", "model"))


def arrays(devices, rows=ROWS):
    """The shapes of parameters and of an input: on one device, or on a mesh of four."""
    mesh = on_mesh(devices) if len(devices) == 4 else Mesh(np.array(devices), ("data",))

    def shape(spec, *sizes):
        split = spec if len(devices) == 4 else P()
        place = NamedSharding(mesh, split)
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    kernels = {
        name: {"kernel": shape(NAMES[name], LAYERS, *size)}
        for name, size in KERNELS.items()
    }
    return {"layers": kernels}, shape(P("data"), rows, WIDTH)


def frozen_step(params, x):
    """The output, and the gradient of the input: no method can do with less."""

    def loss(x):
        y = MODEL.apply({"params": params}, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return jax.value_and_grad(loss)(x)


def adapted(operator, execution, devices, rows=ROWS, rank=16):
    """A training step by gradient descent with adapters, and its arguments.

    `traces` counts how often it was traced.
    """
    params, x = arrays(devices, rows)
    config = MoRAConfig(rank=rank, operator=operator, execution=execution)
    plan = linen.plan(MODEL, {"params": params}, config, x)
    if len(devices) == 4:
        plan = sharding.on_mesh(plan, params, batch_axes="data")
    adapters = jax.eval_shape(lambda: mora_jax.init(plan))
    places = sharding.adapter_shardings(plan, params)
    adapters = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        adapters,
        places,
    )
    apply, traces = linen.wrap(MODEL, plan), []

    def loss(adapters, x, params):
        y = apply(adapters, {"params": params}, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    def step(adapters, params, x):
        traces.append(None)
        value, (gradient, back) = jax.value_and_grad(loss, (0, 1))(adapters, x, params)
        adapters = jax.tree.map(lambda m, g: m - 0.1 * g, adapters, gradient)
        return adapters, value, back

    args = adapters, params, x
    return SimpleNamespace(
        run=jax.jit(step), args=args, plan=plan, places=places, traces=traces
    )
