"""Leaves of trees by their paths: arrays of a base, and adapters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mora_jax._common import trees
from mora_jax._common.checks import LEAVE_OUT, check_leaf
from mora_jax._common.suggestions import lacking
from mora_jax._common.trees import is_boxed as is_boxed
from mora_jax._common.trees import key_name as key_name
from mora_jax._common.trees import reboxed as reboxed
from mora_jax._common.trees import refuse_variables as refuse_variables
from mora_jax._common.trees import replace_leaves as replace_leaves
from mora_jax._common.trees import unboxed as unboxed
from mora_jax._common.types import Path
from mora_jax._layer.slots import Selected, Slots
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Part, check_same

trees.count_whole(Plan, Slots, Selected)


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of any pytree but a model or a plan; arrays stay in their boxes."""
    return trees.located_leaves(tree, what, refuse_model)


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
    if isinstance(leaf, Plan):
        raise TypeError(
            f"{what} must be a tree of arrays, got the Plan: adapters are init(plan), "
            "and of a pair (adapters, plan) give pair[0]"
        )
    hint = "; mora_jax.linen's plan and wrap take models"
    if isinstance(leaf, nnx.Module):
        hint = ", and its adapters nnx.state(model, MoRAParam); mora_jax.nnx's plan, "
        hint += "wrap and merge_adapters take models"
    trees.refuse_model(leaf, what, hint)


def adapter_path(spec: AdapterSpec) -> Path:
    """The path of M, in the adapters and in a combined tree."""
    return (*spec.path[:-1], spec.path[-1] + SUFFIX)
