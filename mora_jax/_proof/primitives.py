"""JAX's primitives by what they do to a kernel."""

SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "optimization_barrier",
    "pbroadcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
}
"""Primitives that leave numbers as they are, except for rounding."""

PRODUCTS = {"dot_general", "conv_general_dilated", "gather", "ragged_dot_general"}
"""Primitives by which layers multiply an input with a kernel."""

PART = {"concatenate", "div", "dynamic_slice", "gather", "mul", "reduce_sum", "slice"}
"""What may be done to an array before inputs are multiplied with it."""

UNSEEN = {"pure_callback", "io_callback", "shard_map", "custom_partitioning"}
"""Primitives whose inside says nothing about whole arrays, beside all `*_call`."""
