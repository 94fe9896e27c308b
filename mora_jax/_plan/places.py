"""Places of an adapter's arrays on a mesh, by the place of its kernel."""

from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._mesh.layout import mesh_axes
from mora_jax._mesh.on_mesh import OnMesh
from mora_jax._plan.spec import AdapterSpec


def adapter_sharding(spec: AdapterSpec, kernel: NamedSharding) -> NamedSharding:
    """The sharding of an M by the sharding of its kernel; see `sharding`."""
    of_kernel = mesh_axes_of(kernel, spec)
    stack = [axes or None for axes in sizes(of_kernel, spec.axes, "s")]
    layout = spec.layout
    features = layout and layout.for_activations(spec.axes, spec.kernel_shape)
    own = OnMesh(spec.operator, features).m_spec if features else ()
    own = [*own, *[None] * len(spec.operator.m_shape)][: len(spec.operator.m_shape)]
    return NamedSharding(kernel.mesh, PartitionSpec(*stack, *own))


def mesh_axes_of(kernel: NamedSharding, spec: AdapterSpec) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of the kernel."""
    entries = [mesh_axes(entry) for entry in kernel.spec]
    return [*entries, *[()] * (len(spec.axes) - len(entries))]
