"""Models as they are: their plan, and adapters put into them and taken out again."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Jaxpr

from mora_jax._common.axes import stack_places
from mora_jax._common.checks import check_seed
from mora_jax._flax.calls import Call, all_calls, errors_of
from mora_jax._flax.layer_rules import folded_kernels, planning_rules, unknown_use
from mora_jax._flax.layers import NORMS
from mora_jax._flax.planning import plan_surveyed, refuse_shared
from mora_jax._flax.proofs import Proofs
from mora_jax._flax.survey import Survey, check_call, program_of, reads_numbers
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.rounding import Rounding
from mora_jax._layer.ways import check_product
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.adapters import init
from mora_jax._tree.merge import merge
from mora_jax._tree.paths import adapters_in, named_leaves
from mora_jax._tree.plan import Plan
from mora_jax.nnx import _held
from mora_jax.nnx._classes import MARKED, Marked, adapt, subclass


def plan(
    model: nnx.Module,
    config: MoRAConfig | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for an NNX model, by what each of its layers computes.

    Kernels and default targets are those that `linen.plan` says.

    Args:
      model: Any NNX module, of arrays or (by `nnx.eval_shape`) of shapes.
      config: As in `linen.plan`.
      *args: Inputs of a call to trace, arrays or shapes. It alone tells the equation
        that an `nnx.Einsum` gets in calls, and other uses of embeddings (tied heads).
      calls: As in `linen.plan`.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError, ValueError: As `linen.plan`; a module or kernel that the model holds
        twice; a model with adapters.

    Example::

      >>> import mora_jax
      >>> model = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
      >>> {path: spec.axes for path, spec in mora_jax.nnx.plan(model).items()}
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, config, *inputs)")
    classes = {"/".join(path): type(m) for path, m in _held.named_modules(model)}
    survey = Survey(classes=classes, shared=_shared(model))
    for module, path, variable in _held.attributes(model, nnx.Variable):
        rules, name = planning_rules(module), "/".join(path)
        if isinstance(module, NORMS) and path[-1] in ("scale", "bias"):
            survey.non_kernels.add(name)
        elif (rule := rules.get(path[-1])) is None:
            if rules and not folded_kernels(type(module)):  # or methods may do anything
                survey.non_kernels.add(name)
        elif not isinstance(variable, nnx.Param):
            survey.no_params[name] = type(variable).__name__
        elif product := rule.product(module):
            survey.products[name] = product
            # By these attributes layers tell the shape of the kernel of one of a stack.
            names = "kernel_size", "in_features", "out_features"
            shape = tuple(jax.tree.leaves([getattr(module, n, ()) for n in names]))
            places = stack_places(tuple(variable.shape), shape)
            if places and len(shape) == len(product.axes):
                survey.places[name] = places
    for call in all_calls(args, kwargs, calls):
        survey.trace(functools.partial(program, model, "__call__", call))
    return plan_surveyed(_held.parameters(model), config, survey)


def _shared(model: nnx.Module) -> list[list[str]]:
    """The paths of each module and array that a model holds at several."""
    return [["/".join(map(str, p)) for p in ps] for ps in nnx.find_duplicates(model)]


def check_model(model: Any) -> None:
    """Raise unless `model` is an NNX module without adapters."""
    for _, path, _ in _held.attributes(model, _held.MoRAParam):
        raise ValueError(f"model has adapters already, the first at {'/'.join(path)!r}")


def program(model: nnx.Module, method: str, call: Call, survey: Survey | None) -> Jaxpr:
    """The program of a call, whose first inputs are the arrays of the model.

    With a survey, which it fills in, layers are marked: those that have an M, or all of
    a plain model. Without a survey it is the program of the base.
    """
    if survey is None:
        run, state = _held.traceable(_held.detached(model), method)
        return program_of(run, state, call.args, call.kwargs)
    suffix = SUFFIX if any(_held.attributes(model, _held.MoRAParam)) else ""
    twin = nnx.clone(model)
    for path, layer in list(_held.named_modules(twin)):
        names = [name + suffix for name in planning_rules(layer)]
        _held.set_class(layer, _held.plain_class(layer))
        if any(isinstance(getattr(layer, n, None), nnx.Variable) for n in names):
            adapt(layer)
            setattr(layer, MARKED, Marked(survey, "".join(f"{key}/" for key in path)))
    for module, (*_, key), copy in _held.attributes(twin, _held.TrainedParam):
        setattr(module, key, copy.plain())
    run, state = _held.traceable(twin, method)
    leaves = named_leaves(nnx.to_pure_dict(state))
    survey.leaves = {name: leaf for name, (_, leaf) in leaves.items()}
    return program_of(run, state, call.args, call.kwargs)


def wrap(
    model: _held.Model,
    config_or_plan: MoRAConfig | Plan | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    rngs: nnx.Rngs | None = None,
    seed: int = 0,
) -> _held.Model:
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
      *args: With a config, as in `nnx.plan`.
      calls: With a config, as in `nnx.plan`.
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
      >>> model, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jnp.ones((1, 16))
      >>> adapted = mora_jax.nnx.wrap(model, mora_jax.MoRAConfig(rank=2))
      >>> bool((adapted(x) == model(x)).all())
      True
      >>> adapters = mora_jax.nnx.adapters(adapted)
      >>> adapters
      {'kernel_mora': Adapter(block_diagonal, float32[4, 4, 4])}
      >>> mora_jax.nnx.set_adapters(adapted, jax.tree.map(jnp.ones_like, adapters))
      >>> merged = mora_jax.nnx.merge_adapters(adapted)
      >>> bool(jnp.allclose(merged(x), adapted(x), atol=1e-4))
      True
      >>> type(mora_jax.nnx.unwrap(adapted)) is nnx.Linear
      True
    """
    check_model(model)
    check_seed(seed)
    if not isinstance(rngs, nnx.Rngs | None):
        raise TypeError(f"rngs must be an nnx.Rngs, got {rngs!r:.80}")
    if not isinstance(chosen := config_or_plan, Plan):
        chosen = plan(model, chosen, *args, calls=calls)
    elif args or calls:
        raise TypeError("inputs must not be given with a plan: write wrap(model, plan)")
    # Names and shapes may have made the plan.
    refuse_shared(_shared(model), [*chosen, *chosen.trained])
    kinds = {spec.init for spec in chosen.values()}
    key = rngs.params() if rngs is not None and "gaussian" in kinds else None
    new = init(chosen, key, params=_held.parameters(model) if chosen.trained else None)
    model = nnx.clone(model)
    modules: dict[Any, Any] = dict(_held.named_modules(model))
    for path, adapter in adapters_in(new).items():
        name, module, spec = "/".join(path), modules.get(path[:-1]), adapter.spec
        variable = getattr(module, own := path[-1], None)
        if not adapter.of_kernel:
            _train(module, name, variable, adapter)
            continue
        shape = tuple(variable.shape) if isinstance(variable, nnx.Variable) else None
        if module is None or shape != spec.kernel_shape:
            planned = f"plan has {spec.kernel_shape} at {name!r}"
            raise ValueError(f"{planned}, the model has {shape}")
        if (rule := planning_rules(module).get(own)) is None:
            raise unknown_use(name, _held.plain_class(module), "__call__")
        if (product := rule.product(module)) is not None:
            with errors_of(name):
                check_product(spec, product)
        _held.refuse_dropout(module, name, spec)
        adapt(module)
        _held.hold_adapter(module, own, adapter, seed)
    if _held.plain_class(model) is type(model):  # a layer alone does what its rule says
        _held.set_class(model, _checked_class(type(model)))
        setattr(model, _held.PROOFS, Proofs())
    return model


def _train(module: Any, name: str, variable: Any, adapter: Adapter) -> None:
    """Replace the base's variable by a trained copy."""
    if not isinstance(variable, nnx.Variable):
        rule = "nnx.wrap trains variables that are attributes of a module"
        remedy = "take it out of train"
        raise ValueError(f"{name}: {rule}, and this one is in a container; {remedy}")
    spec = adapter.spec
    metadata = {**variable.get_metadata(), "spec": spec, "base_type": type(variable)}
    copy = _held.TrainedParam.from_metadata(adapter.m, metadata)
    setattr(module, name.rpartition("/")[2], copy)
    if spec.dtype != spec.base_dtype:
        adapt(module)


def unwrap(model: _held.Model) -> _held.Model:
    """The model without its adapters, as it was before `wrap`.

    `model`, as `wrap` makes it (see its example), stays as it is.

    Returns:
      A new model of the plain classes, with the kernels of the base.

    Raises:
      ValueError: The model lacks adapters; or it trains arrays of the base, whose old
        values only the model that `wrap` was given has.
    """
    remedy = "use the model that nnx.wrap was given, or nnx.merge_adapters"
    _held.held_adapters(model).refuse_trained(f"in place of the base's: {remedy}")
    return _held.detached(model)


def merge_adapters(
    model: _held.Model,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    any_base: bool = False,
    rounding: Rounding = "dither",
) -> _held.Model:
    r"""The model with its adapters merged into its kernels: :math:`W + \alpha\, C M D`.

    `model`, as in the example of `wrap`, stays as it is; else as in `mora_jax.merge`.

    Returns:
      A new model of the plain classes, which computes the same.

    Raises:
      TypeError, ValueError: As `mora_jax.merge`; or the model lacks adapters.
    """
    plain, adapters = _held.detached(model), _held.adapters(model)
    settings: Any = {"any_base": any_base, "rounding": rounding}
    nnx.update(plain, merge(_held.parameters(plain), adapters, dtype, **settings))
    return plain


@functools.cache
def _checked_class(cls: type) -> type:
    """The class of an adapted model: the public methods of `cls`, checked."""

    def checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        is_main = name == "__call__"
        if name[0] == "_" and not is_main:
            return method

        @functools.wraps(method)
        def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            def trace(args: Any, kwargs: Any, survey: Any = None) -> Jaxpr:
                return program(self, name, Call(*args, **kwargs), survey)

            programs = functools.partial(trace, args, kwargs)
            proofs = vars(self).get(_held.PROOFS) or Proofs()
            with proofs.proving(
                model=self,
                call=(name, args, kwargs),
                check=lambda: check_call(
                    lambda: _held.plan_of(self), programs, is_main
                ),
                reads_numbers=lambda: reads_numbers(trace, args, kwargs),
            ):
                return method(self, *args, **kwargs)

        return call

    return subclass(cls, checked)
