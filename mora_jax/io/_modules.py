"""The modules of PyTorch that a kernel is: one, one for each layer, or several.

Gemma's keys and values are one kernel (2, heads, in, width) in JAX and two modules in
PyTorch. M belongs to both. But its delta is a sum over outputs like any other, and each
module has some of them.
"""

import dataclasses
import re

import numpy as np

from mora_jax._common.axes import sizes
from mora_jax._common.types import Shape
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._families import Pair
from mora_jax.io._names import is_table, join_index, to_module


@dataclasses.dataclass(frozen=True)
class Module:
    """A module, and its part of a kernel.

    Attributes:
      name: The module's name, such as "model.layers.0.self_attn.k_proj".
      axes: The order of the axes of its weight, "oi" or "io". Weights of layers are the
        other way round in PyTorch, but its embeddings are not.
      table: True if it looks up rows of its weight.
      index: The index of its layer in the kernel's stack.
      layer: The same as one number.
      outputs: The kernel's outputs that it has.
    """

    name: str
    axes: str
    table: bool
    index: Shape
    layer: int
    outputs: slice


def modules_of(
    spec: AdapterSpec, known: tuple[Pair, ...]
) -> tuple[list[Module], list[str]]:
    """Return the modules of a kernel, and its layers that lack one."""
    modules, missing = [], []
    first, *others = sizes(spec.kernel_shape, spec.axes, "o")
    inner = spec.axes.replace("s", "")
    table_axes = re.sub(r"(.)\1+", r"\1", inner)
    for layer, index in enumerate(np.ndindex(spec.stack_shape)):
        kernel = join_index(spec.name, index)
        names = [to_module(kernel, known)]
        if names == [None] and inner.startswith("o") and others:
            # The first axis may tell modules apart.
            kernels = (join_index(spec.name, (*index, k)) for k in range(first))
            names = [to_module(part, known) for part in kernels]
        width = spec.out_features // len(names)
        if None in names:
            missing.append(kernel)
            continue
        for k, (name, axes) in enumerate(filter(None, names)):
            table = is_table(name, spec.name)
            outputs = slice(k * width, (k + 1) * width)
            order = table_axes if table else axes
            modules.append(Module(name, order, table, index, layer, outputs))
    return modules, missing
