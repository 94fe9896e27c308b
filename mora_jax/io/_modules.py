"""Which modules of PyTorch a kernel is: one, one for each layer, or several together.

Gemma's keys and values are one kernel (2, heads, in, width) in JAX and two modules in
PyTorch. M belongs to both. But its delta is a sum over outputs like any other, and each
module has some of them.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from mora_jax._common.axes import sizes
from mora_jax._common.types import Shape
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._families import Pair
from mora_jax.io._names import is_table, join_index, to_module


@dataclasses.dataclass(frozen=True)
class Module:
    """A module, and what it is of a kernel.

    Attributes:
      name: The module's name, such as "model.layers.0.self_attn.k_proj".
      axes: The order of the axes of its weight, "oi" or "io".
      table: Whether it looks up rows of its weight.
      index: The index of its layer in the kernel's stack.
      layer: The same as one number.
      outputs: Which of the kernel's outputs it has.
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
    """The modules of a kernel, and its layers for which there is none."""
    found, missing = [], []
    first, *others = sizes(spec.kernel_shape, spec.axes, "o")
    apart = spec.axes.replace("s", "").startswith("o") and others
    for layer, index in enumerate(np.ndindex(spec.stack_shape)):
        kernel = join_index(spec.name, index)
        names = [to_module(kernel, known)]
        if names == [None] and apart:  # the first axis may tell modules apart
            kernels = (join_index(spec.name, (*index, k)) for k in range(first))
            names = [to_module(part, known) for part in kernels]
        width = spec.out_features // len(names)
        modules = [
            _module(spec, *name, index, layer, slice(k * width, (k + 1) * width))
            for k, name in enumerate(names)
            if name is not None
        ]
        if len(modules) == len(names):
            found += modules
        else:
            missing.append(kernel)
    return found, missing


def _module(spec: AdapterSpec, name: str, axes: str, *place: Any) -> Module:
    """A module, with the axes of the array here if it is a table.

    Weights of layers are the other way round in PyTorch, but its embeddings are not.
    """
    table = is_table(name, spec.name)
    if table:
        axes = re.sub(r"(.)\1+", r"\1", spec.axes.replace("s", ""))
    return Module(name, axes, table, *place)
