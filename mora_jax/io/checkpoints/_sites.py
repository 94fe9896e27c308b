"""The tensors of a base that adapters change, and the numbers that go into them."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Shape
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import Rounding, add_rounded, share_lost
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import Items
from mora_jax._tree.adapters import adapter_items
from mora_jax._tree.base_digest import check_digests, kernel_digests
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._modules import Module, modules_of
from mora_jax.io._names import Names, join_index, pairs
from mora_jax.io._suggest import suggestion
from mora_jax.io._tensors import to_numpy
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Source


@dataclasses.dataclass(frozen=True)
class Site:
    """A tensor of the base, and the adapter whose delta is added to it.

    The spec is of the kernel that one or several tensors are together, each with as
    many outputs; this one is number `part`. The kernel is number `layer` in the stack
    that the adapter was made for.
    """

    spec: AdapterSpec
    m: np.ndarray
    tensors: tuple[str, ...]
    part: int = 0
    layer: int = 0

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.tensors[self.part]

    @property
    def shape(self) -> Shape:
        """The tensor's shape."""
        shape, axis = list(self.spec.kernel_shape), self.spec.axes.index("o")
        shape[axis] //= len(self.tensors)
        return tuple(shape)

    def add(self, kernel: np.ndarray, rounding: Rounding) -> tuple[np.ndarray, float]:
        """Return the merged tensor, and the share of its delta that is lost."""
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        # JAX's transpose has the memory order of the tensor. NumPy's would not, and it
        # adds arrays of different orders slowly.
        delta = np.asarray(delta_kernel(self.spec, self.m))
        parts = np.split(delta, len(self.tensors), self.spec.axes.index("o"))
        before, delta = kernel.astype(dtype), parts[self.part].astype(dtype)
        if dtype == jnp.float32:
            start = 0, self.part * self.spec.out_features // len(self.tensors)
            settings = self.spec.axes, kernel.dtype, rounding, start
            merged = np.asarray(add_rounded(kernel, delta, *settings))
        else:  # JAX may lack float64, and nothing is rounded
            merged = before + delta
        after = merged.astype(dtype)
        if not np.isfinite(after).all() and np.isfinite(before).all():
            raise AdapterFileError(
                f"{self.name!r} overflows {kernel.dtype} with its delta"
            )
        return merged, float(share_lost(after - before, delta))

    def check_base(self, checkpoint: Checkpoint, own: np.ndarray | None = None) -> None:
        """Raise if the adapter is known to be trained on another kernel.

        `own` is the tensor itself, if it was read already.
        """
        if self.spec.base_digest is None:
            return
        place = checkpoint.place
        tensors = [
            place[name][name] if own is None or name != self.name else own
            for name in self.tensors
        ]
        kernel = np.concatenate(tensors, self.spec.axes.index("o"))
        try:
            check_digests(self.spec, kernel_digests(self.spec, kernel), self.layer)
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
            sites[name] = Site(spec, m, (name,))
            continue
        modules, unnamed = modules_of(spec, known)
        missing |= dict.fromkeys(unnamed, spec.name)
        for index, layer in itertools.groupby(modules, lambda module: module.index):
            for site in _layer_sites(spec, m[index], *layer):
                if site.name not in checkpoint.place:
                    missing[join_index(spec.name, index)] = site.name
                elif site.name in sites:
                    raise AdapterFileError(f"two adapters go into {site.name!r}")
                sites[site.name] = site
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
    return sites


def _layer_sites(spec: AdapterSpec, m: np.ndarray, *modules: Module) -> Iterator[Site]:
    """Yield the sites of one layer of a kernel, by the modules that are the layer."""
    axes, sizes = modules[0].axes, {"i": spec.in_features, "o": spec.out_features}
    shape = tuple(sizes[letter] for letter in axes)
    spec = dataclasses.replace(spec, kernel_shape=shape, axes=axes, layout=None)
    tensors = tuple(f"{module.name}.weight" for module in modules)
    for part, module in enumerate(modules):
        yield Site(spec, m, tensors, part, module.layer)


def _own_name(checkpoint: Checkpoint, path: tuple[str, ...]) -> str | None:
    """Return the tensor that is named as an array's path is, if there is one."""
    names = (separator.join(path) for separator in "/.")
    return next((name for name in names if name in checkpoint.place), None)


def replacements(
    checkpoint: Checkpoint, items: Items, names: Names
) -> dict[str, tuple[str, np.ndarray]]:
    """Return {tensor: name and numbers of the trained array for it}."""
    replaced: dict[str, tuple[str, np.ndarray]] = {}
    misfit = "the trained array {!r} of shape {} does not fit {} in the base"
    source = Source(checkpoint, names, "trained array", misfit, tied=False)
    for array, copy in items:
        numbers, own = to_numpy(array.name, copy), _own_name(checkpoint, array.path)
        # A bias with axes for heads may have the name of its tensor by chance.
        if own and checkpoint.entry(own).shape == array.shape:
            replaced[own] = array.name, numbers
            source.taken[own] = array.name
            continue
        for index, part in source.stack(array.name, array.shape).items():
            layer = part.transposed(numbers[index]).reshape(part.shape)
            replaced[part.name] = join_index(array.name, index), layer
    source.check_missing()
    return replaced
