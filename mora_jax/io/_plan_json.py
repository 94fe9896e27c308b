"""A plan without its adapters, as text for the metadata of any checkpoint."""

from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._plan import Plan, check_plan, refuse_other_plan
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._format import describe, layer_path, restore
from mora_jax.io._json import dump, parse, short

FORMAT, VERSION = "mora_jax plan", 1
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
    """A plan as JSON, to keep beside adapters that another library stores.

    Adapters are numbers alone: with another operator, seed or alpha they have the same
    shapes and are another update. `save` stores the plan with them. Where something
    else stores them (Orbax, Tunix), keep this text in the checkpoint's metadata.

    Args:
      plan: the plan.

    Returns:
      The text, for `plan_from_json`.

    Raises:
      TypeError: `plan` is no plan.

    Example::

      >>> from mora_jax import io, plan
      >>> layers = plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> io.plan_from_json(io.plan_to_json(layers)) == layers
      True
    """
    content = {
        "format": FORMAT,
        "format_version": VERSION,
        "library_version": version("mora-jax"),
        "base_parameters": check_plan(plan).base_parameters,
        "traced": plan.traced,
        "layers": [describe(spec, spec.param_dtype) for spec in plan.specs],
        "digest": plan.digest(),
    }
    return dump(content).decode()


def plan_from_json(text: str, like: Plan | None = None) -> Plan:
    """The plan that `plan_to_json` wrote.

    Everything is checked, and nothing is filled in.

    Args:
      text: what `plan_to_json` returned.
      like: the plan of the model that the adapters are to be used with.

    Returns:
      The plan. Where it is on a mesh is not in the text: see `sharding.plan_on_mesh`.

    Raises:
      TypeError: `text` is no text, or `like` no plan.
      io.AdapterFileError: a text that is no plan, damaged, of a newer format or of an
        operator that this platform computes otherwise; or a plan for which M's mean
        another update than for `like`. The message names the layer and the settings.

    Example::

      >>> from mora_jax import MoRAConfig, io, plan
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> text = io.plan_to_json(plan(params, MoRAConfig(alpha=2.0)))
      >>> io.plan_from_json(text, like=plan(params))
      Traceback (most recent call last):
      mora_jax.io.AdapterFileError: fc/kernel_mora was made for alpha 2.0, not 1.0
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    base = None
    if like is not None:  # operators are made for shapes that a model really has
        base = {
            spec.name: jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
            for spec in check_plan(like, "like").specs
        }
    content, specs = _content(text), {}
    for number, layer in enumerate(content["layers"]):
        path = layer_path(layer, f"layers[{number}] of the plan")
        name = "/".join(path)
        if name in specs:
            raise AdapterFileError(f"the plan has {name!r} twice")
        try:
            specs[name] = restore(layer, None, base)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{name} of the plan: {error}") from error
    plan = Plan(tuple(specs.values()), content["base_parameters"], content["traced"])
    if plan.digest() != content["digest"]:
        raise AdapterFileError("the plan is damaged or edited: its digest differs")
    if like is not None:
        try:
            refuse_other_plan(plan, like)
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
    return plan


def _content(text: str) -> dict[str, Any]:
    """The parsed text: of our format and version, of the right types."""
    content = parse(text.encode(), "the plan")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterFileError(
            f"the text is no plan: its format must be {FORMAT!r}, as "
            "io.plan_to_json writes it"
        )
    if content.keys() != KINDS.keys():
        raise AdapterFileError(
            f"the plan must hold {sorted(KINDS)}, got {short(sorted(content))}"
        )
    for key, kind in KINDS.items():
        if type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} of the plan must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    if content["format_version"] != VERSION:
        raise AdapterFileError(
            f"the plan is of format version {content['format_version']}, and this "
            f"mora_jax reads {VERSION}"
        )
    if content["base_parameters"] < 1:
        raise AdapterFileError(
            "base_parameters of the plan must be a positive integer, "
            f"got {short(content['base_parameters'])}"
        )
    return content
