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
            if frame.f_code is mora_apply.__code__:
                depths.append(own)
            frame = frame.f_back
    return original(x, y, *args, **kwargs)

jax.lax.dot_general = recording  # before the library, or it would be intercepted
import mora_jax
from mora_jax import FrozenDense, MoRAConfig, mora_apply, plan, sharding

HOME = str(pathlib.Path(mora_jax.__file__).parent)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
split, x = {"kernel": PartitionSpec("model")}, jnp.ones((4, 32))
params, kernel = {"kernel_mora": jnp.full((8, 8), 0.5)}, jnp.ones((32, 32))
found = {}
for operator in ("sharing", "rotation", "orthogonal"):
    for way in ("activation", "auto"):
        config = MoRAConfig(operator=operator, square_rank=8, execution=way)
        planned = plan({"kernel": kernel}, config)
        on_mesh = sharding.plan_on_mesh(planned, split, batch_axes="data", mesh=mesh)
        for devices, spec in (1, planned["kernel"]), (4, on_mesh["kernel"]):
            settings = dict(execution=way, layout=spec.layout)
            frozen = FrozenDense(kernel, None, spec.operator, **settings)
            depths.clear(), jax.clear_caches()
            jax.jit(mora_apply).lower(params, frozen, x)
            found[f"{operator}, {way}, {devices}"] = max(depths)
print(json.dumps(found))
"""


def test_few_frames_lie_between_mora_apply_and_the_product_with_m():
    """Counted at the product itself: all frames of the library on the stack."""
    found = json.loads(python("-c", RECORD))
    assert len(found) == 12
    for name, frames in found.items():
        assert 0 < frames <= (9 if name.endswith("1") else 12), found


SHELLS = """
import json, pathlib, sys

import jax
import jax.numpy as jnp
import numpy as np

original, depths = jax.lax.dot_general, []

def recording(x, y, *args, **kwargs):
    if np.shape(y) == (8, 8):  # by M
        frame, own = sys._getframe(1), 0
        while frame is not None:
            own += frame.f_code.co_filename.startswith(HOME)
            frame = frame.f_back
        depths.append(own)
    return original(x, y, *args, **kwargs)

jax.lax.dot_general = recording  # before the library, or it would be intercepted
import flax.linen as nn
from flax import nnx
import mora_jax

HOME = str(pathlib.Path(mora_jax.__file__).parent)
x, model, found = jnp.ones((4, 32)), nn.Dense(32), {}
variables = model.init(jax.random.key(0), x)
for operator in ("sharing", "rotation", "orthogonal"):
    for way in ("activation", "auto"):
        config = mora_jax.MoRAConfig(operator=operator, square_rank=8, execution=way)
        apply = mora_jax.linen.wrap(model, config, variables, x)
        adapters = mora_jax.init(apply.plan)
        depths.clear(), jax.clear_caches()
        jax.jit(apply).lower(adapters, variables, x)
        found[f"linen, {operator}, {way}"] = max(depths)
        adapted = mora_jax.nnx.wrap(nnx.Linear(32, 32, rngs=nnx.Rngs(0)), config)
        depths.clear(), jax.clear_caches()
        nnx.jit(lambda model, x: model(x)).lower(adapted, x)
        found[f"nnx, {operator}, {way}"] = max(depths)
print(json.dumps(found))
"""


def test_few_frames_lie_between_a_wrapped_layer_and_the_product_with_m():
    found = json.loads(python("-c", SHELLS))
    assert len(found) == 12
    for frames in found.values():
        assert 0 < frames <= 12, found
