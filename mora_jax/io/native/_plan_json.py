"""A plan as text, without its adapters, for the metadata of any checkpoint."""

from mora_jax._plan.plan import Plan, check_plan, refuse_other_plan
from mora_jax.io._files import AdapterFileError
from mora_jax.io._json import dump, parse
from mora_jax.io.native._records import (
    PLAN,
    check_plan_record,
    record_of,
    restore_plan,
    shapes_of,
)

FORMAT = "mora_jax plan"


def plan_to_json(plan: Plan) -> str:
    """Return a plan as JSON, for `plan_from_json`.

    Adapters are only numbers. With another operator, seed or alpha they have the same
    shapes and mean another delta. `save` stores the plan with them. If another library
    stores them (Orbax, Tunix), keep this text in the checkpoint's metadata.

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
    content = {"format": FORMAT} | record_of(plan, PLAN)
    return dump(content | {"digest": plan.digest()}).decode()


def plan_from_json(text: str, like: Plan | None = None) -> Plan:
    """Return the plan that `plan_to_json` wrote.

    Everything is checked, and nothing is filled in. The plan lacks a layout on a mesh:
    see `sharding.plan_on_mesh`.

    Args:
      text: The text that `plan_to_json` returned.
      like: The plan of the model that the adapters are for; None for any model.

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
    where, hint = "the plan", "io.plan_to_json writes it"
    content = parse(text.encode(), where)
    content = check_plan_record(content, FORMAT, {"digest": (str,)}, where, hint)
    # With a model, operators are made only for its shapes.
    base = None if like is None else shapes_of(check_plan(like, "like"))
    plan, _ = restore_plan(content, where, base, None)
    if plan.digest() != content["digest"]:
        raise AdapterFileError("the plan is damaged or edited: its digest differs")
    if like is not None:
        try:
            refuse_other_plan(plan, like)
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
    return plan
