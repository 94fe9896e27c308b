"""The tensors of a base that adapters change, and the numbers that go into them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Shape
from mora_jax._layer.equation import delta_kernel, scaled
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import Items
from mora_jax._tree.adapters import adapter_items
from mora_jax._tree.base_digest import (
    check_digests,
    kernel_digests,
    row_numbers,
    rows_digest,
)
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._modules import Module, modules_of
from mora_jax.io._names import Names, Tensor, join_index, pairs
from mora_jax.io._suggest import suggestion
from mora_jax.io._tensors import to_numpy
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._leaf import axis_groups
from mora_jax.io.checkpoints._matching import Source


@dataclasses.dataclass(frozen=True)
class Site:
    """A tensor of the base, and the adapter whose delta is added to it.

    Attributes:
      spec: The adapter.
      m: M, of all stacked layers if `module` is None.
      module: The tensor's module; None for a tensor with the shape of the whole kernel.
      together: The tensors that are the kernel of one layer, in order.
    """

    spec: AdapterSpec
    m: np.ndarray
    module: Module | None
    together: tuple[str, ...]

    @property
    def axes(self) -> str:
        """The order of the tensor's axes, a letter each."""
        return self.module.axes if self.module else self.spec.axes

    @property
    def start(self) -> tuple[int, int]:
        """The kernel's first input and first output that the tensor has."""
        return 0, self.module.outputs.start if self.module else 0

    @property
    def shape(self) -> Shape:
        """The tensor's shape."""
        if not self.module:
            return self.spec.kernel_shape
        outputs = self.module.outputs
        widths = {"i": self.spec.in_features, "o": outputs.stop - outputs.start}
        return tuple(widths[letter] for letter in self.axes)

    def delta(self) -> np.ndarray:
        """Return the delta with the tensor's axes, in float32 or wider."""
        if not self.module:
            return np.asarray(delta_kernel(self.spec, self.m))
        delta = self.spec.operator.delta_weight(scaled(self.spec, self.m))
        delta = delta[:, self.module.outputs]
        # JAX's transpose has the memory order of the tensor. NumPy's would not, and it
        # adds arrays of different orders slowly.
        return np.asarray(delta.T if self.axes == "oi" else delta)

    def check_base(
        self, checkpoint: Checkpoint, read: Mapping[str, np.ndarray]
    ) -> None:
        """Raise if the adapter is known to be trained on another kernel.

        Args:
          checkpoint: The base.
          read: Tensors of the kernel that were read already.
        """
        if self.spec.base_digest is None:
            return
        tensors = [
            read[name] if name in read else checkpoint.place[name][name]
            for name in self.together
        ]
        if self.module:
            numbers = row_numbers(self.spec.in_features)
            kernels = [t.T if self.axes == "oi" else t for t in tensors]
            rows = np.concatenate([kernel[numbers] for kernel in kernels], axis=1)
            digests, layer = (rows_digest(rows),), self.module.layer
        else:
            digests, layer = kernel_digests(self.spec, tensors[0]), 0
        try:
            check_digests(self.spec, digests, layer)
        except ValueError as error:
            raise AdapterFileError(str(error)) from None


def sites_of(
    checkpoint: Checkpoint, adapters: Any, plan: Plan, names: Names
) -> dict[str, Site]:
    """Return the site of each tensor that an adapter changes, all of them checked."""
    known, missing = pairs(names), {}
    sites: dict[str, Site] = {}
    for spec, m in adapter_items(adapters, plan):
        m = to_numpy(spec.name, m)
        m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
        if name := _own_name(checkpoint, spec.path):
            sites[name] = Site(spec, m, None, (name,))
            continue
        modules, unnamed = modules_of(spec, known)
        missing |= dict.fromkeys(unnamed, spec.name)
        for module in modules:
            name = f"{module.name}.weight"
            if name not in checkpoint.place:
                missing[join_index(spec.name, module.index)] = name
            elif name in sites:
                raise AdapterFileError(f"two adapters go into {name!r}")
            layer = [m.name for m in modules if m.layer == module.layer]
            together = tuple(f"{other}.weight" for other in layer)
            sites[name] = Site(spec, m[module.index], module, together)
    if missing:
        kernel, name = next(iter(missing.items()))
        modules = [name.removesuffix(".weight") for name in checkpoint.place]
        raise AdapterFileError(
            f"the base has no tensor for the kernel {kernel!r}"
            f"{nearest_paths(name, checkpoint.place)}; {suggestion(missing, modules)}"
        )
    for name, site in sites.items():
        if (shape := checkpoint.entry(name).shape) != site.shape:
            raise AdapterFileError(
                f"{name!r} in the base must have shape {site.shape}, got {shape}"
            )
        checkpoint.place[name].dtype(name, "dequantise it first")
    return sites


def _own_name(checkpoint: Checkpoint, path: tuple[str, ...]) -> str | None:
    """Return the tensor that is named as an array's path is, if there is one."""
    names = (separator.join(path) for separator in "/.")
    return next((name for name in names if name in checkpoint.place), None)


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The numbers of a trained array, which replace a tensor.

    Attributes:
      name: The path of the trained array.
      copy: Its numbers, of one layer of a stack.
      tensor: The tensor; None for one with the shape of the array.
    """

    name: str
    copy: np.ndarray
    tensor: Tensor | None

    def as_tensor(self, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """Return the numbers in the layout and the dtype of a tensor.

        Raises:
          AdapterFileError: They do not fit it, or are too large for it.
        """
        array, tensor = self.copy, self.tensor
        if tensor is not None and not array.shape == shape == ():
            groups = axis_groups(array.shape, shape, tensor)
            if groups is None:
                raise AdapterFileError(
                    f"the trained array {self.name!r} of shape {array.shape} does not "
                    f"fit its tensor in the base, of shape {shape}"
                )
            array = array.transpose(tensor.order) if tensor.order else array
            array = array.reshape([math.prod(group) for group in groups])
            array = (array.T if tensor.axes == "oi" else array).reshape(shape)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array).astype(dtype).reshape(shape)
        if not np.isfinite(array).all():
            raise AdapterFileError(f"the trained array {self.name!r} overflows {dtype}")
        return array


def replacements(
    checkpoint: Checkpoint, items: Items, names: Names
) -> dict[str, Replacement]:
    """Return {tensor: the numbers that replace it}, all of them checked.

    Args:
      checkpoint: The base.
      items: The trained arrays with their copies.
      names: As in `load_peft_mora`.

    Raises:
      AdapterFileError: The base lacks a tensor for an array, or has one of another
        shape or dtype.
    """
    replaced: dict[str, Replacement] = {}
    source = Source(checkpoint, names, "trained array", tied=False)
    for array, copy in items:
        numbers, own = to_numpy(array.name, copy), _own_name(checkpoint, array.path)
        # A bias with axes for heads may have the name of its tensor by chance.
        if own and checkpoint.entry(own).shape == array.shape:
            replaced[own] = Replacement(array.name, numbers, None)
            source.taken[own] = array.name
            continue
        for index, tensor in source.stack(array.name, array.shape).items():
            part = join_index(array.name, index)
            replaced[tensor.name] = Replacement(part, numbers[index], tensor)
    source.check_missing()
    for name, replacement in replaced.items():
        checkpoint.place[name].dtype(name, "dequantise it first")
        replacement.as_tensor(checkpoint.entry(name).shape, replacement.copy.dtype)
    return replaced
