"""Models as they are: their plan, by what layers compute, and `apply` with adapters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend.core import Jaxpr

from mora_jax._common.axes import to_model
from mora_jax._common.messages import matching, warn
from mora_jax._common.types import Path
from mora_jax._flax.calls import Call, LayerCall, adapt_call, all_calls
from mora_jax._flax.planning import plan_surveyed
from mora_jax._flax.proofs import Proofs
from mora_jax._flax.survey import Survey, check_call, program_of, reads_numbers
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import SUFFIX, AdapterSpec, check_alike
from mora_jax._tree.adapters import split, with_ms
from mora_jax._tree.merge import merged
from mora_jax._tree.paths import adapters_in, named_leaves, place_of, replace_leaves
from mora_jax._tree.plan import Plan
from mora_jax.linen._bound import layer_calls, params_of
from mora_jax.operators._pytree import by_layer

Specs = Mapping[Path, AdapterSpec | None]


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: MoRAConfig | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for a Linen model, by what each of its layers computes.

    A call of the model is traced, or several. Kernels may have any number of axes, and
    be stacked (`nn.scan`, `nn.vmap`). The default targets are the kernels of all dense
    layers, except those whose names say head, classifier, embedding and the like.

    Args:
      model: Any Linen module.
      variables: The model's variables, arrays or shapes.
      config: The kernels to adapt and the settings; None for the defaults.
      *args: The inputs of a call, arrays or shapes, as for `model.apply`.
      calls: More calls to trace, such as of another method or with `train=False`.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError, ValueError: As `mora_jax.plan`; a target whose layer class is not known
        (see `register_layer`), or whose layer computes something that its rule does not
        say; an embedding that is read outside of its layer.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> plan = mora_jax.linen.plan(model, variables, mora_jax.MoRAConfig(rank=2), x)
      >>> {path: spec.axes for path, spec in plan.items()}
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, variables, config, *inputs)")
    calls = all_calls(args, kwargs, calls) or (Call(),)
    params, survey = params_of(variables), Survey()
    leaves, modules = named_leaves(params), flatten_dict(dict(params))
    excluded = matching("exclude", config.exclude, leaves)
    # The parts of a quantized kernel are in no module.
    kept = [leaf for name, leaf in leaves.items() if name not in excluded]
    kernels = [path for path, leaf in kept if leaf.ndim > 1 and path in modules]
    for call in calls:
        given = model, variables, call, dict.fromkeys(kernels)
        survey.trace(functools.partial(program, *given))
    return plan_surveyed(params, config, survey)


def program(
    model: nn.Module, variables: Any, call: Call, kernels: Specs, survey: Survey | None
) -> Jaxpr:
    """The program of a call, whose first inputs are the params, and M's if any.

    With a survey, which it fills in, the layers of `kernels` are marked, and those that
    have a spec have an M. Without a survey it is the program of the base.
    """
    shape, kernels = jax.ShapeDtypeStruct, {} if survey is None else kernels
    ms = {p: s and shape(s.shape_in_model, s.param_dtype) for p, s in kernels.items()}
    known = survey or Survey()

    def see(module: Any) -> None:
        known.classes.setdefault("/".join(module.scope.path), type(module))

    def record(call: LayerCall, adapter: Adapter) -> Callable[[], Any]:
        _, name, spec = adapter.spec
        adapter = Adapter.of_model(adapter.m, spec)
        return functools.partial(known.record_call, name, call, adapter)

    # A new one in each call: in an earlier trace of nn.jit no call would be recorded.
    mark = object()

    def run(tree: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        params, values = tree
        bound = {}
        for path, m in zip(ms, values, strict=True):
            known_as = mark, "/".join(path), kernels[path]
            bound[(*path[:-1], path[-1] + SUFFIX)] = Adapter(m, known_as)
        variables = {**variables, "params": with_ms(params, bound)}
        with nn.intercept_methods(layer_calls(record, see)):
            result = model.apply(variables, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result  # the params in it are not computed
        return output, {k: value for k, value in updated.items() if k != "params"}

    leaves = named_leaves(params_of(variables)).items()
    own = {"/".join(path) + SUFFIX: m for path, m in ms.items() if m is not None}
    known.leaves = {name: leaf for name, (_, leaf) in leaves} | own
    tree = variables["params"], list(ms.values())
    return program_of(run, tree, {**variables}, call.args, call.kwargs)


def check_model(model: Any) -> None:
    """Raise unless `model` is a Linen module."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"model must be a flax.linen.Module, got {got}")


@dataclasses.dataclass(eq=False)
class AdaptedApply:
    """A model's `apply` with adapters, as `wrap` makes it."""

    model: nn.Module
    plan: Plan
    proofs: Proofs = dataclasses.field(default_factory=Proofs, repr=False)
    _warned: bool = dataclasses.field(default=False, init=False, repr=False)

    def __call__(
        self,
        adapters: Any,
        variables: Mapping[str, Any],
        *args: Any,
        adapter_deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's `apply` with adapters; see `wrap`."""
        found = adapters_in(adapters)
        check_alike(found.specs, self.plan.parts, "the plan", meaning=False)
        bound, drops = {}, False
        for path, adapter in found.kernels.items():
            m, spec = adapter.m, adapter.spec
            drops |= spec.dropout > 0
            if "s" in spec.axes:  # lifted transformations slice M, and what is given
                m, arrays = adapter.in_model(), by_layer(spec.operator)[0]
                given = [to_model(jnp.asarray(array), spec.axes) for array in arrays]
                m = (m, *given) if given else m
            bound[place_of(path, spec)] = Adapter(m, spec)
        if drops and adapter_deterministic is None:
            rule = "adapter_deterministic must be True or False"
            raise ValueError(f"the adapters have dropout: {rule}, got None")
        base = params_of(variables)
        params = merged(base, found.trained) if found.trained else base
        given = {**variables, "params": params}

        def trace(variables: Any, args: Any, kwargs: Any, survey: Any = None) -> Jaxpr:
            call = Call(*args, **kwargs)
            return program(self.model, variables, call, self.plan.specs, survey)

        programs = functools.partial(trace, given, args, kwargs)
        proving = self.proofs.proving(
            model=self.model,
            call=(variables, args, kwargs),
            check=lambda: check_call(
                lambda: self.plan, programs, "method" not in kwargs
            ),
            reads_numbers=lambda: reads_numbers(trace, given, args, kwargs),
        )
        variables = {**variables, "params": with_ms(params, bound)}
        adapt = functools.partial(_adapting, bool(adapter_deterministic))
        with (
            proving,
            nn.intercept_methods(layer_calls(adapt)),
        ):
            result = self.model.apply(variables, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result
        kept = sorted((updated.keys() & variables.keys()) - {"params", "cache"})
        if kept and not self._warned:
            self._warned = True
            warn(
                f"the call updates {', '.join(kept)} of the base, which save and merge "
                f"know nothing of: keep updated[{kept[0]!r}] next to the adapters and "
                "pass it in variables, or freeze it (use_running_average=True)"
            )
        if "params" in updated:  # with the base's arrays for the trained copies
            new, leaves = split(updated["params"])[0], named_leaves(base)
            old = dict(leaves[name] for name in self.plan.trained)
            updated = {**updated, "params": replace_leaves(new, old)}
        return output, updated


def wrap(
    model: nn.Module,
    config_or_plan: MoRAConfig | Plan | None = None,
    variables: Mapping[str, Any] | None = None,
    *args: Any,
    calls: Sequence[Call] = (),
    **kwargs: Any,
) -> AdaptedApply:
    """The `apply` of an unmodified model, with adapters.

    The model's own code runs. Each planned layer adds its adapter's delta to what its
    methods return, also in `nn.scan`, `nn.remat`, `nn.vmap` and `nn.jit`.

    With `MoRAConfig(dropout=...)` each call must be given `adapter_deterministic=True`,
    or False and `rngs={"dropout": key}` to drop.

    Args:
      model: Any Linen module. It stays as it is.
      config_or_plan: A config, None for the defaults, or a plan of `linen.plan`.
      variables: With a config, as in `linen.plan`.
      *args: With a config, as in `linen.plan`.
      calls: With a config, as in `linen.plan`.
      **kwargs: Further inputs, by name.

    Returns:
      A function `apply(adapters, variables, *args, **kwargs)`: `model.apply` with the
      adapters first, so that `jax.grad` differentiates by them alone. It computes what
      the given adapters say: others of the same kernels, with another operator or
      rank, need no other wrap. Arrays that are trained themselves are read from the
      adapters, and not from `variables`. Its attribute `plan` is for `mora_jax.init`.
      Collections that a call updates, such as BatchNorm's statistics, are not among
      the adapters; a `MoRAWarning` says so.

    Raises:
      TypeError, ValueError: As `linen.plan`; a config without variables, or variables
        with a plan. In a call: adapters of other kernels than the plan's; an adapter on
        a layer class that is not known (see `register_layer`).

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> model, x = nn.Sequential([nn.Dense(16), nn.Dense(16)]), jnp.ones((1, 16))
      >>> variables = model.init(jax.random.key(0), x)
      >>> apply = mora_jax.linen.wrap(model, mora_jax.MoRAConfig(rank=2), variables, x)
      >>> adapters = mora_jax.init(apply.plan)
      >>> bool((apply(adapters, variables, x) == model.apply(variables, x)).all())
      True
    """
    check_model(model)
    if isinstance(config_or_plan, Plan):
        if variables is not None or args or calls or kwargs:
            rule = "variables and inputs must not be given with a plan"
            raise TypeError(f"{rule}: the call is wrap(model, plan)")
        return AdaptedApply(model, config_or_plan)
    if variables is None:
        check_config(config_or_plan, call := "wrap(model, config, variables, *inputs)")
        rule = "variables must be given with a config, got None"
        raise TypeError(f"{rule}: the call is {call}, or wrap(model, plan)")
    chosen = plan(model, variables, config_or_plan, *args, calls=calls, **kwargs)
    return AdaptedApply(model, chosen)


def _adapting(deterministic: bool, call: LayerCall, adapter: Adapter) -> Any:
    """A function that makes the output of a layer's call, with its delta added."""
    path, key = (*call.module.scope.path, call.rule.name(call.module)), None
    if adapter.spec.dropout > 0 and not deterministic:
        key = call.module.make_rng("dropout")
    # Not called here: that would be one more frame between a layer and M.
    return functools.partial(adapt_call, call, "/".join(path), lambda: adapter, key)
