"""Places of an adapter's arrays on a mesh, by the place of its kernel."""

from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._mesh.layout import mesh_axes
from mora_jax._plan.spec import AdapterSpec


def adapter_sharding(spec: AdapterSpec, kernel: NamedSharding) -> NamedSharding:
    """The sharding of an M by the sharding of its kernel; see `sharding`."""
    of_kernel = mesh_axes_of(kernel, spec)
    stack = [axes or None for axes in sizes(of_kernel, spec.axes, "s")]
    whole = [None] * len(spec.operator.m_shape)
    return NamedSharding(kernel.mesh, PartitionSpec(*stack, *whole))


def mesh_axes_of(kernel: NamedSharding, spec: AdapterSpec) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of the kernel."""
    entries = [mesh_axes(entry) for entry in kernel.spec]
    return [*entries, *[()] * (len(spec.axes) - len(entries))]
