"""A plan as JSON, for checkpoints that other libraries write."""

from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import check_alike
from mora_jax._tree.paths import Found
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.io import _files, _json
from mora_jax.io.native import _records

FORMAT, WHERE = "mora_jax plan", "the plan"  # the format, and the text in messages

PLAN: _json.Fields = {  # the fields of a plan beside the record of its adapters
    "base_parameters": _json.Field(int, lambda plan: plan.base_parameters),
    "traced": _json.Field(bool, lambda plan: plan.traced),
}


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON, for `plan_from_json`; see its example.

    Files of `save` hold what their adapters mean. Where another library stores the
    arrays alone (Orbax, Tunix), keep this text in the checkpoint's metadata: with the
    plan of it `plan.adapters(tree)` makes adapters of them again.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: An operator has arrays that no settings determine, as a subspace.
    """
    for name, spec in check_plan(plan).items():
        if spec.operator.given:
            why = f"JSON cannot hold the directions of a {spec.operator.name}"
            raise ValueError(f"{name}: {why}; keep its adapters with mora_jax.save")
    parts = Found({path: Adapter(None, spec) for path, spec in plan.parts.items()})
    return _records.text_of(parts, {"format": FORMAT} | _json.record_of(plan, PLAN))


def plan_from_json(text: str, like: Plan | None = None) -> Plan:
    """The plan that `plan_to_json` wrote.

    It lacks a layout on a mesh: see `sharding.on_mesh`.

    Args:
      text: The text that `plan_to_json` returned.
      like: The plan of the model that the arrays are for; None for any model.

    Raises:
      TypeError: `text` is not a string, or `like` is not a plan.
      io.AdapterFileError: The text is not a plan, or as in `load`; or M's mean another
        delta with this plan than with `like`. The message names the settings.

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
    known = {} if like is None else check_plan(like, "like")
    shapes = (spec.kernel_shape for spec in known.values())
    parts = _records.restore(content, WHERE, shapes).specs
    if like is not None:
        try:
            check_alike(parts, like.parts, "the plan")
        except ValueError as error:
            raise _files.AdapterFileError(str(error)) from error
    return Plan(parts, content["base_parameters"], content["traced"])
