"""The equation is easy to find, and near to what users call."""

import subprocess
import sys
import textwrap

import pytest

# A process of its own: the type checks of the tests add frames to every call.
RECORD = textwrap.dedent("""
    import pathlib, sys

    import jax
    import jax.numpy as jnp
    import mora_jax
    import numpy as np
    from jax.sharding import AxisType, PartitionSpec
    from mora_jax import FrozenDense, MoRAConfig, mora_apply, plan, sharding

    HOME = str(pathlib.Path(mora_jax.__file__).parent)
    operator, way, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 4)
    kernel, m = jnp.ones((32, 32)), jnp.full((8, 8), 0.5)
    config = MoRAConfig(operator=operator, square_rank=8, execution=way)
    frozen = FrozenDense.from_config(kernel, config=config)
    if devices > 1:
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        split = {"kernel": PartitionSpec("model")}
        planned = sharding.plan_on_mesh(
            plan({"kernel": kernel}, config), split, batch_axes="data", mesh=mesh
        )
        layout = planned["kernel"].layout
        frozen = FrozenDense(
            kernel, None, frozen.operator, execution=way, layout=layout
        )

    original, depths = jax.lax.dot_general, []

    def recording(x, y, *args, **kwargs):
        if np.shape(y) == m.shape:  # by M
            frame, own = sys._getframe(1), []
            while frame is not None:
                own.append(frame.f_code)
                if frame.f_code is mora_apply.__code__:
                    files = [c for c in own if c.co_filename.startswith(HOME)]
                    depths.append(len(files))
                frame = frame.f_back
        return original(x, y, *args, **kwargs)

    jax.lax.dot_general = recording
    mora_jax._interception._DOT_GENERAL = recording  # it is no interception
    jax.jit(mora_apply)({"kernel_mora": m}, frozen, jnp.ones((4, 32)))
    print(max(depths))
""")


@pytest.mark.parametrize("operator", ["sharing", "rotation", "orthogonal"])
@pytest.mark.parametrize(
    ("way", "devices", "most"),
    [("activation", 1, 9), ("activation", 4, 12), ("auto", 4, 12)],
    ids=["one-device", "mesh", "mesh-auto"],
)
def test_few_frames_lie_between_mora_apply_and_the_product_with_m(
    operator, way, devices, most
):
    """Counted at the product itself, all frames of the library above it."""
    run = subprocess.run(
        [sys.executable, "-c", RECORD, operator, way, str(devices)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert 0 < int(run.stdout) <= most
