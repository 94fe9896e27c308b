"""A plan as JSON, for checkpoints that other libraries write."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._common.types import ArrayLike
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import check_alike
from mora_jax._tree import paths
from mora_jax._tree.paths import Found
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.io import _files, _json
from mora_jax.io.native import _records
from mora_jax.io.native._records import given_arrays

FORMAT, WHERE = "mora_jax plan", "the plan"  # the format, and the text in messages

PLAN: _json.Fields = {  # the fields of a plan beside the record of its adapters
    "base_parameters": _json.Field(int, lambda plan: plan.base_parameters),
    "traced": _json.Field(bool, lambda plan: plan.traced),
}


def plan_to_json(plan_or_adapters: Plan | Any) -> str:
    """A plan as JSON, for `plan_from_json`; see its example.

    Files of `save` hold what their adapters mean. Where another library stores the
    arrays alone (Orbax, Tunix), keep this text in the checkpoint's metadata: with the
    plan of it `plan.adapters(tree)` makes adapters of them again. Of directions, as of
    damped inputs, the text has the digests; store `plan_arrays` beside it.

    Args:
      plan_or_adapters: A plan, or adapters, which know what they mean.

    Raises:
      TypeError: `plan_or_adapters` is neither, or a trace has the directions.
      io.AdapterFileError: A path has more than 100 names, or one that a file cannot
        have, such as "..".
    """
    plan = _plan_of("plan_or_adapters", plan_or_adapters)
    given_arrays(spec.operator for spec in plan.values())  # raises if they are traced
    for path in plan.parts:
        _records.check_path([*path], f"a layer of {WHERE}")
    parts = Found({path: Adapter(None, spec) for path, spec in plan.parts.items()})
    return _records.text_of(parts, {"format": FORMAT} | _json.record_of(plan, PLAN))


def plan_arrays(plan_or_adapters: Plan | Any) -> dict[str, dict[str, np.ndarray]]:
    """The directions of a plan: arrays that no settings determine.

    `input_damping`, `directions` and `gradient_bases` make such adapters. Store these
    arrays beside the text of `plan_to_json`, for instance as an item of Orbax, and give
    them to `plan_from_json`.

    Args:
      plan_or_adapters: A plan, or adapters.

    Returns:
      {operator: {digest: array}}, each array once; empty if there are none.

    Raises:
      TypeError: `plan_or_adapters` is neither, or a trace has the directions.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> mora_jax.io.plan_arrays(plan)
      {}
      >>> call = lambda adapters: adapters["fc"]["kernel_mora"](jnp.eye(8)[:3])
      >>> adapters = mora_jax.input_damping(call, mora_jax.init(plan))
      >>> arrays = mora_jax.io.plan_arrays(adapters)
      >>> [array.shape for array in arrays["damped"].values()]
      [(8, 1)]
      >>> text = mora_jax.io.plan_to_json(adapters)
      >>> plan = mora_jax.io.plan_from_json(text, arrays=arrays)
      >>> plan["fc/kernel"].operator.label
      'block_diagonal, damped (diagonal)'
    """
    plan = _plan_of("plan_or_adapters", plan_or_adapters)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name, array in given_arrays(spec.operator for spec in plan.values()).items():
        kind, _, digest = name.partition("/")
        arrays.setdefault(kind, {})[digest] = array
    return arrays


def plan_from_json(
    text: str,
    like: Plan | Any = None,
    arrays: Mapping[str, Mapping[str, ArrayLike]] | None = None,
) -> Plan:
    """The plan that `plan_to_json` wrote.

    It lacks a layout on a mesh: see `sharding.on_mesh`.

    Args:
      text: The text that `plan_to_json` returned.
      like: The plan of the model that the arrays are for, or its adapters; None for any
        model.
      arrays: The directions, as `plan_arrays` returned them and as another library
        restored them; None if there are none, or if `like` has them.

    Raises:
      TypeError: `text` is not a string, `like` neither a plan nor adapters, or `arrays`
        are not such a mapping.
      io.AdapterFileError: The text is not a plan, or as in `load`; or M's mean another
        delta with this plan than with `like`; or the directions are not those that M's
        were trained with. The message names the layer.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> doubled = mora_jax.plan(params, mora_jax.MoRAConfig(alpha=2.0))
      >>> text = mora_jax.io.plan_to_json(doubled)
      >>> mora_jax.io.plan_from_json(text) == doubled
      True
      >>> mora_jax.io.plan_from_json(text, like=mora_jax.plan(params))
      Traceback (most recent call last):
      mora_jax.io.AdapterFileError: fc/kernel_mora was made for alpha 2.0, not 1.0
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    hint = "io.plan_to_json writes it"
    content = _records.parse_record(text, FORMAT, PLAN, WHERE, hint)
    known = None if like is None else _plan_of("like", like)
    specs = [] if known is None else [*known.values()]
    shapes = [spec.kernel_shape for spec in specs]
    given = given_arrays(spec.operator for spec in specs) | _named(arrays)
    parts = _records.restore(content, WHERE, shapes, given=given).specs
    if known is not None:
        try:
            check_alike(parts, known.parts, "the plan")
        except ValueError as error:
            raise _files.AdapterFileError(str(error)) from error
    return Plan(parts, content["base_parameters"], content["traced"])


def _plan_of(name: str, plan_or_adapters: Any) -> Plan:
    """The plan itself, or the plan that adapters follow."""
    leaves = jax.tree.leaves(
        plan_or_adapters, is_leaf=lambda leaf: paths.adapter_of(leaf) is not None
    )
    if isinstance(plan_or_adapters, Plan) or not any(map(paths.adapter_of, leaves)):
        return check_plan(plan_or_adapters, name)
    return Plan(paths.adapters_in(plan_or_adapters).specs)


def _named(arrays: Any) -> dict[str, Any]:
    """The `arrays` of `plan_from_json` by their names in files."""
    if arrays is None:
        return {}
    rule = "arrays must be {operator: {digest: array}}, as io.plan_arrays returns them"
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{rule}, got {type(arrays).__name__}")
    named = {}
    for kind, own in arrays.items():
        if not isinstance(own, Mapping):
            raise TypeError(f"{rule}, got {type(own).__name__} at {kind!r}")
        for digest, array in own.items():
            named[f"{kind}/{digest}"] = array
    return named
