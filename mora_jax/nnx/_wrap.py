"""Put adapters into unmodified models, and take them out again."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from mora_jax._flax.calls import kind_of_call, proving
from mora_jax._flax.layer_rules import planning_rules, unknown_use
from mora_jax._flax.survey import check_call
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.per_row import Selected
from mora_jax._layer.rounding import Rounding
from mora_jax._layer.ways import check_product
from mora_jax._plan.settings import MoRAConfig
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import init, refuse_trained
from mora_jax._tree.merge import merge
from mora_jax._tree.paths import adapters_in, unboxed
from mora_jax._tree.plan import Plan
from mora_jax.nnx import _classes
from mora_jax.nnx._classes import Model, detached, plain_class, set_class
from mora_jax.nnx._param import MoRAParam, TrainedParam, hold_adapter, refuse_dropout
from mora_jax.nnx._plan import check_model, program, refuse_unfit
from mora_jax.nnx._plan import plan as plan_model
from mora_jax.nnx._state import adapters, attributes, named_modules, parameters, plan_of


def wrap(
    model: Model,
    config_or_plan: MoRAConfig | Plan | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    seed: int = 0,
) -> Model:
    """An unmodified model, with adapters.

    The model's own code runs. Each planned layer gets a `MoRAParam` next to its kernel,
    and a subclass of its class, which adds the adapter's delta to what its methods
    return. Names, types and paths stay, so that a checkpoint of the base still loads.

    With `MoRAConfig(dropout=...)` the model drops until `model.eval()`, which sampling
    and evaluation need; `model.train()` turns it on again. The masks follow from
    `seed`, M and the kernel: calls with the same M's, such as the microbatches of one
    step, drop the same positions.

    Args:
      model: Any NNX module. It stays as it is, and shares its arrays with the result: a
        step that donates all of the result's state deletes them (docs/training-nnx.md).
      config_or_plan: A config, None for the defaults, or a plan of `nnx.plan`.
      rngs: The source of the key for `init="gaussian"`.
      seed: The seed of the dropout masks.

    Returns:
      A new model. Its trainable state is `nnx.state(model, MoRAParam)`, which also has
      the arrays that the plan trains themselves, instead of the base's. An M is on the
      mesh of its kernel, as `sharding.adapter_shardings` says.

    Raises:
      TypeError, ValueError: As `nnx.plan`; a plan that does not fit the model; an
        adapter on a layer class that is not known (see `register_layer`); a Gaussian
        start without `rngs`; a `seed` that is not an integer from 0 to 2^32 - 1.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> from flax import nnx
      >>> model, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jnp.ones((1, 16))
      >>> adapted = mora_jax.nnx.wrap(model, mora_jax.MoRAConfig(rank=2))
      >>> bool((adapted(x) == model(x)).all())
      True
      >>> adapters = mora_jax.nnx.adapters(adapted)
      >>> adapters
      {'kernel_mora': Adapter(rotation, float32[8, 8])}
      >>> mora_jax.nnx.set_adapters(adapted, jax.tree.map(jnp.ones_like, adapters))
      >>> merged = mora_jax.nnx.merge_adapters(adapted)
      >>> bool(jnp.allclose(merged(x), adapted(x), atol=1e-4))
      True
      >>> type(mora_jax.nnx.unwrap(adapted)) is nnx.Linear
      True
    """
    check_model(model)
    plan = config_or_plan
    plan = plan if isinstance(plan, Plan) else plan_model(model, plan)
    refuse_unfit(model, plan)  # names and shapes may have made it
    is_random = any(spec.init == "gaussian" for spec in plan.values())
    key = rngs.params() if rngs and is_random else None
    new = init(plan, key, params=parameters(model) if plan.trained else None)
    model = nnx.clone(model)
    modules: dict[Any, Any] = dict(named_modules(model))
    for path, adapter in adapters_in(new).items():
        name, module, own = "/".join(path), modules.get(path[:-1]), path[-1]
        variable = getattr(module, own, None)
        if not isinstance(adapter.spec, AdapterSpec):
            _train(module, name, variable, adapter)
            continue
        spec, shape = adapter.spec, None
        if isinstance(variable, nnx.Variable):
            shape = tuple(variable.shape)
        if module is None or shape != spec.kernel_shape:
            raise ValueError(
                f"plan has {spec.kernel_shape} at {name!r}, the model has {shape}"
            )
        _check_layer(module, name, spec)
        set_class(module, _classes.adapted_class(plain_class(module)))
        hold_adapter(module, own, adapter, seed)
    if plain_class(model) is type(model):  # a layer alone does what its rule says
        set_class(model, _checked_class(type(model)))
    return model


def _train(module: Any, name: str, variable: Any, adapter: Adapter) -> None:
    """Put a trained copy in the place of the base's variable."""
    if not isinstance(variable, nnx.Variable):
        raise ValueError(
            f"{name}: nnx.wrap trains variables that are attributes of a module, and "
            "this one is in a container; take it out of train"
        )
    spec = adapter.spec
    copy = TrainedParam.in_place_of(variable, spec, adapter.m)
    setattr(module, name.rpartition("/")[2], copy)
    if spec.dtype != spec.base_dtype:
        set_class(module, _classes.adapted_class(plain_class(module)))


def _check_layer(module: nnx.Module, name: str, spec: AdapterSpec) -> None:
    """Raise if an adapter would change nothing in a layer, or something else."""
    cls, kernel = plain_class(module), name.rpartition("/")[2]
    if (rule := planning_rules(module).get(kernel)) is None:
        raise unknown_use(name, cls, "__call__")
    if (product := rule.product(module)) is not None:
        try:
            check_product(spec, product)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    refuse_dropout(module, name, spec)


def unwrap(model: Model) -> Model:
    """The model without its adapters, as it was before `wrap`.

    Args:
      model: An adapted model, as `wrap` makes it. It stays as it is.

    Returns:
      A new model of the plain classes, with the kernels of the base.

    Raises:
      ValueError: The model lacks adapters; or it trains arrays of the base, whose old
        values only the model that `wrap` was given has.

    Example: see `wrap`.
    """
    refuse_trained(
        plan_of(model).parts,
        "in place of the base's: use the model that nnx.wrap was given, or "
        "nnx.merge_adapters",
    )
    return detached(model)


def merge_adapters(
    model: Model,
    dtype: DTypeLike | None = None,
    *,
    any_base: bool = False,
    rounding: Rounding = "dither",
) -> Model:
    r"""The model with its adapters merged into its kernels: :math:`W + \alpha\, C M D`.

    Args:
      model: An adapted model, as `wrap` makes it. It stays as it is.
      dtype: As in `mora_jax.merge`.
      any_base: As in `mora_jax.merge`.
      rounding: As in `mora_jax.merge`.

    Returns:
      A new model of the plain classes, which computes the same.

    Raises:
      TypeError, ValueError: As `mora_jax.merge`; or the model lacks adapters.

    Example: see `wrap`.
    """
    plain, settings = detached(model), {"any_base": any_base, "rounding": rounding}
    merged = merge(parameters(plain), adapters(model), dtype, **settings)
    nnx.update(plain, merged)
    return plain


_proven: dict[Hashable, str] = {}
"""The calls that were checked, as `proving` has them.

Not in the model, since nnx.jit makes a new one for each trace.
"""


def _settings(model: nnx.Module) -> Hashable:
    """Key of all that a model holds beside its arrays, such as its flags."""
    graph = nnx.graphdef(model)
    try:
        hash(graph)
    except TypeError:  # an attribute cannot be hashed, such as a config
        return repr(graph)
    return graph


@functools.cache
def _checked_class(cls: type) -> type:
    """The class of an adapted model: the public methods of `cls`, checked."""

    def checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        is_main = name == "__call__"
        if name[0] == "_" and not is_main:
            return method

        @functools.wraps(method)
        def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            rows = {
                "/".join(path).removesuffix(SUFFIX): unboxed(m).rows
                for _, path, m in attributes(self, MoRAParam)
                if isinstance(unboxed(m), Selected)
            }
            kind = _settings(self), name, kind_of_call(rows, args, kwargs)
            programs = functools.partial(program, self, name, args, kwargs)
            check = check_call, lambda: plan_of(self), programs, rows, is_main
            with proving(_proven, kind, *check):
                return method(self, *args, **kwargs)

        return call

    return _classes.subclass(cls, checked)
