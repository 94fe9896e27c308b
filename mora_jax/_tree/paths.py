"""Leaves of trees by their paths, out of their boxes and into them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from mora_jax._common.checks import LEAVE_OUT, check_leaf
from mora_jax._common.suggestions import lacking
from mora_jax._common.types import Path
from mora_jax._layer.slots import Selected, Slots
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Part, check_same


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of any pytree but a model; arrays stay in their boxes."""

    def is_end(node: Any) -> bool:
        # JAX would go on into these, and take what is in them for arrays.
        return is_boxed(node) or isinstance(node, nnx.Module | Plan | Slots | Selected)

    leaves: dict[Path, Any] = {}
    names: set[str] = set()  # a key may hold a slash, and plans go by joined paths
    for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_end):
        path = tuple(map(key_name, keys))
        refuse_model(leaf, what)
        if not path:
            kind = type(leaf).__name__
            if hasattr(leaf, "shape"):
                kind = f"an array of shape {tuple(leaf.shape)} without a name"
            raise TypeError(f"{what} must be a tree of arrays, got {kind}")
        if (name := "/".join(path)) in names:
            raise ValueError(f"{what} must not have two leaves of the path {name!r}")
        names.add(name)
        leaves[path] = leaf
    return leaves


def named_leaves(tree: Any, what: str = "params") -> dict[str, tuple[Path, Any]]:
    """{slash-joined path: (path, leaf)} of a tree of arrays or shapes, unboxed."""
    leaves: dict[str, tuple[Path, Any]] = {}
    for path, leaf in located_leaves(tree, what).items():
        name, leaf = "/".join(path), unboxed(leaf)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{what} must hold arrays only, got {type(leaf).__name__} at {name!r}"
            )
        leaves[name] = path, leaf
    if not leaves:
        raise ValueError(f"{what} holds no array")
    return leaves


def find_part(leaves: Mapping[str, tuple[Path, Any]], part: Part) -> tuple[Path, Any]:
    """The path and the array that a part of a plan has in the base, checked."""
    name = part.name
    if isinstance(part, AdapterSpec):
        what, shape, otherwise = f"the kernel {name!r}", part.kernel_shape, LEAVE_OUT
    else:
        what, shape, otherwise = f"{name!r}, which the plan trains", part.shape, ""
    if name not in leaves:  # or it is quantized: several arrays, below its path
        raise ValueError(f"params lack {what}{lacking(name, leaves)}")
    path, leaf = leaves[name]
    check_leaf(leaf, f"{name} in params", shape, otherwise)
    return path, leaf


def refuse_variables(params: Any, what: str = "params") -> None:
    """Raise if `params`, the argument `what`, are all variables of a Linen model."""
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        if not isinstance(params, nnx.State):  # a model may have an attribute `params`
            raise ValueError(
                f"{what} must not hold 'params' at its top, got {sorted(params)}: "
                "pass variables['params'], not all variables"
            )


def replace_leaves(tree: Any, new: Mapping[Path, Any]) -> Any:
    """`tree` with the values of `new` at their paths, in the boxes that are there."""

    def replace(keys: Any, leaf: Any) -> Any:
        path = tuple(map(key_name, keys))
        return reboxed(leaf, new[path]) if path in new else leaf

    return jax.tree.map_with_path(replace, tree, is_leaf=is_boxed)


def with_specs(tree: Any, plan: Plan) -> Any:
    """A state of NNX, or of an optimizer for one, whose M's are for `plan`."""
    specs = {adapter_path(spec): spec for spec in plan.specs}

    def follow(keys: Any, leaf: Any) -> Any:
        spec = getattr(leaf, "spec", None) if isinstance(leaf, nnx.Variable) else None
        if not isinstance(spec, AdapterSpec):
            return leaf
        names = tuple(map(key_name, keys))  # they end with the path of the M
        ends = (names[k:] for k in range(len(names)))
        if (new := next((specs[end] for end in ends if end in specs), None)) is None:
            return leaf
        changed = {n: getattr(new, n) for n in ("operator", "scale", "init")}
        digest = new.base_digest and spec.base_digest  # its own: it may be of a stack
        spec = dataclasses.replace(spec, base_digest=digest, **changed)
        return leaf.replace(unboxed(leaf), spec=spec)

    return jax.tree.map_with_path(follow, tree, is_leaf=is_boxed)


def key_name(key: Any) -> str:
    """The name of a pytree key in a path."""
    return jax.tree_util.keystr((key,), simple=True)


def is_boxed(leaf: Any) -> bool:
    """True for an array in a box: Linen's metadata, or an NNX variable."""
    if not isinstance(leaf, nnx.Variable):
        return isinstance(leaf, AxisMetadata)
    # A variable that holds a structure, such as a quantized kernel, is not a box: the
    # parts of the structure are leaves themselves. But M's for rows count as one array.
    held = leaf.get_raw_value()
    return jax.tree_util.all_leaves([held]) or isinstance(held, Selected)


def unboxed(leaf: Any) -> Any:
    """The array in `leaf`, if that is a box; otherwise `leaf` itself."""
    if not is_boxed(leaf):
        return leaf
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf.unbox()


def reboxed(box: Any, value: Any) -> Any:
    """`value` in a box like `box`, if that is a box; otherwise `value` itself."""
    if not is_boxed(box):
        return value
    is_variable = isinstance(box, nnx.Variable)
    return box.replace(value) if is_variable else box.replace_boxed(value)


def adapter_of(box: Any, spec: AdapterSpec, by_row: bool = False) -> Any:
    """The M that `box` holds or is; with `by_row`, each row of a batch may have one."""
    m, name = unboxed(box), f"{spec.name}{SUFFIX}"
    if isinstance(m, Slots):
        raise TypeError(
            f"{name} must be an M, got those of {m.number} slots: say which row of the "
            "batch has which, by serving.select(stacked, index)"
        )
    if isinstance(m, Selected) and not by_row:
        raise TypeError(
            f"{name} must be an M, got one for each row of a batch, which only "
            "linen.wrap and nnx.set_adapters take"
        )
    check_leaf(m, name, spec.shape)
    # A variable of an NNX model knows the adapter that its M was made for, whose delta
    # must be the delta of `spec`.
    made_for = getattr(box, "spec", None)
    if isinstance(made_for, AdapterSpec):
        check_same(made_for.stacked(m.shape, spec.path), spec)
    return m


def refuse_model(leaf: Any, what: str) -> None:
    """Raise if `leaf` is a model or a plan, which may be pytrees as well."""
    if isinstance(leaf, nnx.Module):
        kind = "adapters are nnx.state(model, MoRAParam)"
        kind = kind if what == "adapters" else "params are nnx.state(model, nnx.Param)"
        hint = f"its {kind}; mora_jax.nnx's plan, wrap and merge_adapters take models"
    elif isinstance(leaf, nn.Module):
        hint = "its params are model.init(...)['params']; mora_jax.linen's plan and "
        hint += "wrap take models"
    elif isinstance(leaf, Plan):
        hint = "adapters are init(plan), and of a pair (adapters, plan) give pair[0]"
    else:
        return
    got = f"the {'' if isinstance(leaf, Plan) else 'model '}{type(leaf).__name__}"
    raise TypeError(f"{what} must be a tree of arrays, got {got}: {hint}")


def adapter_path(spec: AdapterSpec) -> Path:
    """The path of M, in the adapters and in a combined tree."""
    return (*spec.path[:-1], spec.path[-1] + SUFFIX)
