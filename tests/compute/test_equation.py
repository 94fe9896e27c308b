"""The equation is easy to find, and near to what users call."""

import json

from processes import python

# A process of its own, since the type checks of the tests add frames to every call.
RECORD = """
import json, pathlib, sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

jax.config.update("jax_num_cpu_devices", 4)
original, depths = jax.lax.dot_general, []

def recording(x, y, *args, **kwargs):
    if np.shape(y) == (8, 8):  # by M
        frame, own = sys._getframe(1), 0
        while frame is not None:
            own += frame.f_code.co_filename.startswith(HOME)
            if frame.f_code is outermost:
                break
            frame = frame.f_back
        depths.append(own)
    return original(x, y, *args, **kwargs)

jax.lax.dot_general = recording  # before the library, or it would be intercepted
import flax.linen as nn
from flax import nnx
import mora_jax
from mora_jax import FrozenDense, MoRAConfig, mora_apply, sharding

HOME = str(pathlib.Path(mora_jax.__file__).parent)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
split, x = {"kernel": PartitionSpec("model")}, jnp.ones((4, 32))
params, kernel = {"kernel_mora": jnp.full((8, 8), 0.5)}, jnp.ones((32, 32))
dense, variables = nn.Dense(32), {"params": {"kernel": kernel, "bias": kernel[0]}}
linear, found = nnx.Linear(32, 32, rngs=nnx.Rngs(0)), {}

def deepest(jitted, *args):
    depths.clear(), jax.clear_caches()
    jitted.lower(*args)
    return max(depths)

for operator in ("sharing", "rotation", "orthogonal"):
    for way in ("activation", "auto"):
        config = MoRAConfig(operator=operator, square_rank=8, execution=way)
        planned = mora_jax.plan({"kernel": kernel}, config)
        on_mesh = sharding.on_mesh(planned, split, batch_axes="data", mesh=mesh)
        outermost = mora_apply.__code__
        for where, spec in ("", planned["kernel"]), (" on a mesh", on_mesh["kernel"]):
            settings = dict(execution=way, layout=spec.layout)
            frozen = FrozenDense(kernel, None, spec.operator, **settings)
            name = f"mora_apply{where}, {operator}, {way}"
            found[name] = deepest(jax.jit(mora_apply), params, frozen, x)
        outermost, own = None, f"{operator}, {way}"
        apply = mora_jax.linen.wrap(dense, config, variables, x)
        adapters = mora_jax.init(apply.plan)
        found[f"linen, {own}"] = deepest(jax.jit(apply), adapters, variables, x)
        adapted = mora_jax.nnx.wrap(linear, config)
        found[f"nnx, {own}"] = deepest(nnx.jit(lambda m, x: m(x)), adapted, x)
print(json.dumps(found))
"""


def test_few_frames_lie_between_what_users_call_and_the_product_with_m():
    """Counted at the product itself: all frames of the library on the stack."""
    found = json.loads(python("-c", RECORD))
    assert len(found) == 24
    for name, frames in found.items():
        assert 0 < frames <= (9 if name.startswith("mora_apply,") else 12), found
