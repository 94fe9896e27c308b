"""Leaves of trees by their paths: arrays of a base, and adapters."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.traverse_util import unflatten_dict as nest

from mora_jax._common import trees
from mora_jax._common.checks import LEAVE_OUT, as_jax_array, check_finite, check_leaf
from mora_jax._common.messages import lacking
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Spec, check_alike, many_if
from mora_jax._tree.base_digest import check_base

Tree = dict[str, Any]

trees.WHOLE += (Adapter,)
trees.REFUSED[nn.Module] += "; mora_jax.linen's plan and wrap take models"
trees.REFUSED[nnx.Module] += (
    ", and its adapters nnx.state(model, MoRAParam); mora_jax.nnx's plan, wrap and "
    "merge_adapters take models"
)


def named_leaves(tree: Any, what: str = "params") -> dict[str, tuple[Path, Any]]:
    """{slash-joined path: (path, leaf)} of a tree of arrays or shapes, unboxed."""
    leaves: dict[str, tuple[Path, Any]] = {}
    for path, leaf in trees.located_leaves(tree, what).items():
        name, leaf = "/".join(path), trees.unboxed(leaf)
        if isinstance(leaf, Adapter):
            rule = "give the base alone, as split(params)[0]"
            raise ValueError(f"{what} hold the adapter {name}: {rule}")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            kind = type(leaf).__name__
            raise TypeError(f"{what} must hold arrays only, got {kind} at {name!r}")
        leaves[name] = path, leaf
    if not leaves:
        raise ValueError(f"{what} holds no array")
    return leaves


class Found(dict[Path, Adapter]):
    """{path of its array in the base: adapter}, of a tree of adapters."""

    @property
    def kernels(self) -> "Found":
        """The adapters of kernels."""
        return Found({p: self[p] for p in self if self[p].of_kernel})

    @property
    def trained(self) -> "Found":
        """The arrays that train themselves."""
        return Found({p: self[p] for p in self if not self[p].of_kernel})

    @property
    def specs(self) -> dict[Path, Any]:
        """{path: spec}."""
        return {path: adapter.spec for path, adapter in self.items()}

    @property
    def placed(self) -> dict[Path, Adapter]:
        """{path in a tree of adapters: adapter}."""
        return {place_of(path, adapter.spec): adapter for path, adapter in self.items()}

    def tree(self) -> Tree:
        """The adapters as nested dicts."""
        return nest(self.placed)

    def in_base(
        self, params: Any, what: str = "params", *, any_base: bool = True
    ) -> dict[Path, tuple[Path, jax.Array]]:
        """{path: (path in params, array there)}; params must be the base alone."""
        # Without `any_base` they must be the base that the adapters were trained on.
        leaves = named_leaves(params, what)
        for name in leaves:
            if name.endswith(SUFFIX):
                rule = "give the base alone, as split(params)[0]"
                raise ValueError(f"{what} hold the adapter {name}: {rule}")
        if not any_base:
            check_base(self.specs, leaves)
        arrays = {}
        for path, adapter in self.items():
            place, leaf = find_array(leaves, path, adapter.spec, what)
            arrays[path] = place, as_jax_array(f"{'/'.join(path)} in {what}", leaf)
        return arrays

    def refuse_trained(self, why: str) -> None:
        """Raise if there are trained arrays; `why` it cannot be done with them."""
        for path in self.trained:
            raise ValueError(f"{'/'.join(path)}: this array is trained itself, {why}")

    def refuse_nonlinear(self, why: str) -> None:
        """Raise if a delta is not linear in what is trained; `why` it has to be."""
        for path, adapter in self.kernels.items():
            if not (op := adapter.operator).linear:
                delta = f"the delta of {op.name!r} is not linear in what is trained"
                raise ValueError(f"{'/'.join(path)}: {delta}, {why}")


def adapters_in(tree: Any) -> Found:
    """The adapters of a tree, or of variables of NNX that hold M's, checked."""
    found = Found()
    for place, leaf in trees.located_leaves(tree, "adapters").items():
        name, adapter = "/".join(place), adapter_of(leaf)
        if adapter is None:
            got = f"{type(leaf).__name__} at {name!r}"
            hint = "plan.adapters(tree) makes them of plain arrays; are params swapped?"
            raise TypeError(f"adapters must hold adapters, got {got}: {hint}")
        adapter = check_adapter(name, adapter)
        path = (*place[:-1], place[-1].removesuffix(SUFFIX))
        if place != place_of(path, adapter.spec):
            rule = f"its name must end with {SUFFIX!r}"
            raise ValueError(f"adapters hold one of a kernel at {name!r}: {rule}")
        found[path] = adapter
    if not found:
        raise ValueError("adapters hold no adapter")
    return found


def checked_adapters(tree: Any, *, finite: bool = True) -> Found:
    """`adapters_in`, all of them JAX arrays; with `finite` of finite numbers."""
    found = adapters_in(tree)
    for path, adapter in found.items():
        name = "/".join(place_of(path, adapter.spec))
        if not adapter.of_kernel:
            name += " in the adapters"
        m = as_jax_array(name, adapter.m)
        if finite:
            check_finite(m, name)
        found[path] = adapter.replace(m=m)
    return found


def alike_adapters(trees: Any) -> list[Found]:
    """`checked_adapters` of a sequence of one or more, of one meaning and one base."""
    # The first ones know the base if any do.
    rule = "adapters must be a sequence of adapters, as init makes them"
    if isinstance(trees, Mapping) or not isinstance(trees, Iterable):
        raise TypeError(f"{rule}, got {type(trees).__name__}")
    if not (found := [checked_adapters(tree) for tree in trees]):
        raise ValueError("adapters must be one at least, such as init(plan), got none")
    first = found[0]
    for other in found[1:]:
        check_alike(other.specs, first.specs, "the first ones")
        for path, adapter in other.kernels.items():
            if digest := adapter.spec.base_digest:
                spec = dataclasses.replace(first[path].spec, base_digest=digest)
                first[path] = first[path].replace(spec=spec)
    return found


def adapter_of(leaf: Any) -> Adapter | None:
    """The adapter that a leaf is, or that a variable of NNX holds; None for others."""
    if isinstance(leaf, Adapter):
        return leaf
    spec = getattr(leaf, "spec", None) if isinstance(leaf, nnx.Variable) else None
    return None if spec is None else Adapter.of_model(trees.unboxed(leaf), spec)


def place_of(path: Path, spec: Spec) -> Path:
    """The path in a tree of adapters of what belongs to the base's array at `path`."""
    return (*path[:-1], path[-1] + SUFFIX) if isinstance(spec, AdapterSpec) else path


def find_array(
    leaves: Mapping[str, tuple[Path, Any]], path: Path, spec: Spec, tree: str = "params"
) -> tuple[Path, Any]:
    """The path and the array of the base that a trained array belongs to, checked."""
    name = "/".join(path)
    if isinstance(spec, AdapterSpec):
        what, shape, otherwise = f"the kernel {name!r}", spec.kernel_shape, LEAVE_OUT
    else:
        what, shape, otherwise = f"{name!r}, which is trained itself", spec.shape, ""
    if name not in leaves:  # or it is quantized: several arrays, below its path
        raise ValueError(f"{tree} lack {what}{lacking(name, leaves)}")
    path, leaf = leaves[name]
    if many := many_if(shape, leaf.shape):
        shapes = f"of shape {tuple(leaf.shape)} in {tree}, and {shape} in the adapters"
        raise ValueError(f"{name} is {shapes}{many}")
    check_leaf(leaf, f"{name} in {tree}", shape, otherwise)
    return path, leaf


def reboxed(box: Any, value: Any) -> Any:
    """`value`, an array or an adapter, where `box` is: in a variable, or as a node."""
    if not isinstance(value, Adapter):
        return trees.reboxed(box, value)
    if isinstance(box, nnx.Variable):
        return box.replace(value.in_model(), spec=value.spec)
    return value  # Linen's metadata are of arrays


replace_leaves = functools.partial(trees.replace_leaves, put=reboxed)


def replace_adapters(tree: Any, new: Mapping[Path, Adapter]) -> Any:
    """A tree of adapters with others, by the paths of their arrays in the base."""
    return replace_leaves(tree, Found(new).placed)
