"""A plan as text, without its adapters, for the metadata of any checkpoint."""

from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._plan.plan import Plan, check_plan, refuse_other_plan
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._format import describe, layer_path, restore
from mora_jax.io._json import dump, parse, short
from mora_jax.io._trained import describe_trained, restore_trained

FORMAT, VERSION, VERSION_WITHOUT_TRAINED = "mora_jax plan", 2, 1
"""Version 2 added arrays that train themselves; plans without them are version 1."""
KINDS = {
    "format": str,
    "format_version": int,
    "library_version": str,
    "base_parameters": int,
    "traced": bool,
    "layers": list,
    "digest": str,
}


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON, to keep with adapters that another library stores.

    Adapters are only numbers. With another operator, seed or alpha they have the same
    shapes and mean another delta. `save` stores the plan with them. If another library
    stores them (Orbax, Tunix), keep this text in the checkpoint's metadata.

    Args:
      plan: The plan.

    Returns:
      The text, for `plan_from_json`.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: An operator has arrays that no settings determine, as a subspace.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> text = mora_jax.io.plan_to_json(plan)
      >>> mora_jax.io.plan_from_json(text) == plan
      True
    """
    for spec in check_plan(plan).specs:
        if spec.operator.given:
            raise ValueError(
                f"{spec.name}: JSON cannot hold the directions of a "
                f"{spec.operator.name}; keep the plan with mora_jax.save"
            )
    content = {
        "format": FORMAT,
        "format_version": VERSION if plan.trained else VERSION_WITHOUT_TRAINED,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": [describe(spec, spec.param_dtype) for spec in plan.specs],
        "digest": plan.digest(),
    }
    if plan.trained:
        content["trained"] = [describe_trained(one) for one in plan.trained]
    return dump(content).decode()


def plan_from_json(text: str, like: Plan | None = None) -> Plan:
    """The plan that `plan_to_json` wrote.

    Everything is checked, and nothing is filled in.

    Args:
      text: The text that `plan_to_json` returned.
      like: The plan of the model that the adapters are for; None for any model.

    Returns:
      The plan, without a layout on a mesh: see `sharding.plan_on_mesh`.

    Raises:
      TypeError: `text` is not a string, or `like` is not a plan.
      io.AdapterFileError: The text is not a plan, is damaged or of a newer format, or
        this platform computes an operator differently; or M's mean another delta with
        this plan than with `like`. The message names the layer and the settings.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> doubled = mora_jax.plan(params, mora_jax.MoRAConfig(alpha=2.0))
      >>> text = mora_jax.io.plan_to_json(doubled)
      >>> mora_jax.io.plan_from_json(text, like=mora_jax.plan(params))
      Traceback (most recent call last):
      mora_jax.io.AdapterFileError: fc/kernel_mora was made for alpha 2.0, not 1.0
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    base = None
    if like is not None:  # operators are then made only for shapes of a real model
        base = {
            spec.name: jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
            for spec in check_plan(like, "like").specs
        }
        base |= {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in like.trained}
    content, specs = _content(text), {}
    for number, layer in enumerate(content["layers"]):
        path = layer_path(layer, f"layers[{number}] of the plan")
        name = "/".join(path)
        if name in specs:
            raise AdapterFileError(f"the plan has {name!r} twice")
        try:
            specs[name] = restore(layer, None, base, {})
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{name} of the plan: {error}") from error
    trained = ()
    if "trained" in content:
        trained = restore_trained(content["trained"], "trained of the plan", base)
    found, traced = tuple(specs.values()), content["traced"]
    plan = Plan(found, content["base_parameters"], traced, trained=trained)
    if plan.digest() != content["digest"]:
        raise AdapterFileError("the plan is damaged or edited: its digest differs")
    if like is not None:
        try:
            refuse_other_plan(plan, like)
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
    return plan


def _content(text: str) -> dict[str, Any]:
    """The parsed text, with its format, version and types checked."""
    content = parse(text.encode(), "the plan")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterFileError(
            f"the text is not a plan: its format must be {FORMAT!r}, as "
            "io.plan_to_json writes it"
        )
    kinds = KINDS | ({"trained": list} if content.get("format_version") == 2 else {})
    if content.keys() != kinds.keys():
        raise AdapterFileError(
            f"the plan must hold {sorted(kinds)}, got {short(sorted(content))}"
        )
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} of the plan must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    if content["format_version"] not in (VERSION, VERSION_WITHOUT_TRAINED):
        raise AdapterFileError(
            f"the plan is of format version {content['format_version']}, and this "
            f"mora_jax reads up to {VERSION}"
        )
    if content["base_parameters"] < 1:
        raise AdapterFileError(
            "base_parameters of the plan must be a positive integer, "
            f"got {short(content['base_parameters'])}"
        )
    return content
