"""JAX's primitives by what they do to a kernel."""

IDENTITIES = frozenset(
    "convert_element_type copy copy_p device_put layout_constraint mesh_cast "
    "optimization_barrier pbroadcast pvary reduce_precision reshard "
    "sharding_constraint stop_gradient".split()
)
"""Primitives that leave numbers as they are, apart from rounding."""

PRODUCTS = frozenset(
    "dot_general conv_general_dilated gather ragged_dot_general".split()
)
"""Primitives by which layers multiply an input with a kernel."""

PREPARING = frozenset(
    "concatenate div dynamic_slice gather mul reduce_sum slice".split()
)
"""Primitives that a kernel may pass before it multiplies."""

OPAQUE = frozenset("pure_callback io_callback shard_map custom_partitioning".split())
"""Primitives whose inside says nothing about whole arrays, as do all `*_call`."""
