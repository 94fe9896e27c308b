"""Places of an adapter's arrays on a mesh, by the place of its kernel."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._common.types import Shape
from mora_jax._mesh.layout import mesh_axes
from mora_jax._plan.spec import AdapterSpec


def adapter_sharding(
    spec: AdapterSpec, kernel: NamedSharding, square: Any = (None, None)
) -> NamedSharding:
    """The sharding of an M by the sharding of its kernel; see `sharding`."""
    of_kernel = mesh_axes_of(kernel, spec)
    stack = [axes or None for axes in sizes(of_kernel, spec.axes, "s")]
    # More axes than two: some operators train several squares.
    whole = [None] * (len(spec.shape) - len(stack) - len(square))
    name = f"square, with q of {spec.operator.square_rank},"
    return named_sharding(kernel.mesh, [*stack, *whole, *square], spec.shape, name)


def mesh_axes_of(kernel: NamedSharding, spec: AdapterSpec) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of the kernel."""
    entries = [mesh_axes(entry) for entry in kernel.spec]
    return [*entries, *[()] * (len(spec.axes) - len(entries))]


def named_sharding(mesh: Any, axes: Any, shape: Shape, name: str) -> NamedSharding:
    """The sharding of an array of `shape`; `name` is for error messages."""
    try:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        sharding.shard_shape(shape)
    except Exception as error:  # some of JAX's errors are not ValueErrors
        raise ValueError(
            f"{name} must be split evenly by axes of the mesh, each used once: {error}"
        ) from error
    return sharding
