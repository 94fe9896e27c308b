"""Arrays that train themselves: their descriptions, and their tensors in a base."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mora_jax._common.types import Shape
from mora_jax._plan.trained_arrays import Items, TrainedArray
from mora_jax._tree.paths import nearest_paths
from mora_jax.io._arrays import to_numpy
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._names import Pair, Tensor, join_index
from mora_jax.io._tensors import DTYPES
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._leaf import axis_groups
from mora_jax.io.checkpoints._matching import finder_of


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A tensor of a base that a trained array takes the place of.

    Attributes:
      name: The path of the trained array.
      copy: Its numbers, of one layer of a stack.
      tensor: The tensor; None for one with the shape of the array.
    """

    name: str
    copy: np.ndarray
    tensor: Tensor | None

    def in_layout(self, shape: Shape) -> np.ndarray:
        """The numbers in the layout of a tensor of `shape`.

        Raises:
          AdapterFileError: They do not fit it.
        """
        array, tensor = self.copy, self.tensor
        groups = None
        if tensor is None or array.shape == shape == ():
            groups = () if array.shape == shape else None
            tensor = None
        elif not tensor.order or len(tensor.order) == array.ndim:
            array = array.transpose(tensor.order) if tensor.order else array
            groups = axis_groups(array.shape, shape, tensor.axes)
        if groups is None:
            raise AdapterFileError(
                f"the trained array {self.name!r} of shape {self.copy.shape} does not "
                f"fit its tensor in the base, of shape {shape}"
            )
        if tensor is None:
            return array
        array = array.reshape([math.prod(group) for group in groups])
        return (array.T if tensor.axes == "oi" else array).reshape(shape)

    def as_tensor(self, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """The numbers in the layout and the dtype of a tensor."""
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(self.in_layout(shape)).astype(dtype)
        if not np.isfinite(array).all():
            raise AdapterFileError(f"the trained array {self.name!r} overflows {dtype}")
        return array


def replacements(
    checkpoint: Checkpoint, items: Items, known: tuple[Pair, ...]
) -> dict[str, Replacement]:
    """{tensor: what takes its place}, all of them checked.

    Args:
      checkpoint: The base.
      items: The trained arrays with their copies.
      known: The templates of names.

    Raises:
      AdapterFileError: The base has no tensor for an array, or one of another shape or
        dtype.
    """
    found: dict[str, Replacement] = {}
    if not items:
        return found
    find = finder_of(checkpoint, known)
    for one, copy in items:
        numbers = to_numpy(one.name, copy)
        for name, new in _tensors(checkpoint, one, numbers, find).items():
            entry = checkpoint.place[name].entries[name]
            if name in found:
                raise AdapterFileError(f"two trained arrays take the place of {name!r}")
            if entry.dtype not in DTYPES:
                raise AdapterFileError(
                    f"{name!r} in the base must be one of {list(DTYPES)}, got "
                    f"{entry.dtype}: dequantise it first"
                )
            new.in_layout(entry.shape)
            found[name] = new
    return found


def _tensors(
    checkpoint: Checkpoint,
    one: TrainedArray,
    copy: np.ndarray,
    find: Callable[[str], Tensor | None],
) -> dict[str, Replacement]:
    """The tensors of one trained array, one for each layer if it is a stack."""
    joined = [separator.join(one.path) for separator in "/."]
    if same := [name for name in joined if name in checkpoint.place]:
        entry = checkpoint.place[same[0]].entries[same[0]]
        # A bias with axes for heads may have the name of its tensor by chance.
        if entry.shape == copy.shape or not find(one.name):
            return {same[0]: Replacement(one.name, copy, None)}
    for depth in range(copy.ndim + 1):
        if find(join_index(one.name, (0,) * depth)):
            break
    else:
        raise AdapterFileError(
            f"the base has no tensor for the trained array {one.name!r}, or has it "
            f"only as another one that it is tied to"
            f"{nearest_paths(one.name.replace('/', '.'), checkpoint.place)}; names= "
            "says what its tensor is called"
        )
    found = {}
    for index in np.ndindex(copy.shape[:depth]):
        part = join_index(one.name, index)
        tensor = find(part)
        if tensor is None:
            raise AdapterFileError(f"the base has no tensor for {part!r}")
        found[tensor.name] = Replacement(part, copy[index], tensor)
    if len(found) < math.prod(copy.shape[:depth]):
        raise AdapterFileError(f"several layers of {one.name!r} have the same tensor")
    return found
