"""A plan from what a model's layers are, and from what they do."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from flax import nnx

from mora_jax._config import MoRAConfig, check_config
from mora_jax._flax.layer_rules import LayerRule, planning_rules
from mora_jax._flax.survey import Survey, refuse_untraced
from mora_jax._paths import named_leaves
from mora_jax._plan import Plan
from mora_jax._planning import plan_surveyed
from mora_jax._proof import mark
from mora_jax.nnx._adapters import layers
from mora_jax.nnx._classes import subclass
from mora_jax.nnx._param import MoRAParam


def plan(
    model: nnx.Module, config: MoRAConfig | None = None, *args: Any, **kwargs: Any
) -> Plan:
    """`mora_jax.plan` for an NNX model, of which it asks what each layer computes.

    So kernels of any number of axes are understood, stacked ones too (`nnx.vmap`,
    `nnx.scan`), and the default targets are the kernels of all dense layers but for
    those whose names say head, classifier, embedding and the like.

    Args:
      model: any NNX module, of arrays or (by `nnx.eval_shape`) of shapes.
      config: What to adapt, and how; None for the defaults.
      *args: arguments of a call, arrays or shapes. Only needed where the modules do not
        tell enough: an `nnx.Einsum` that gets its equation in the call, and embeddings,
        which a model might read elsewhere (a tied head).
      **kwargs: the same.

    Raises:
      TypeError, ValueError: as `mora_jax.plan`; a target whose layer class is not known
        (see `register_layer`); a module or a kernel that the model holds twice; a model
        with adapters; an embedding that is read outside of its layer, or might be.

    Example::

      >>> from flax import nnx
      >>> from mora_jax import MoRAConfig
      >>> from mora_jax.nnx import plan
      >>> attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
      >>> chosen = plan(attention, MoRAConfig(rank=2))
      >>> {path: spec.axes for path, spec in chosen.items()}
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    check_model(model)
    config = check_config(config, "plan(model, config, *inputs)")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    survey = Survey()
    for path, module in layers(model):
        survey.classes["/".join(path)] = type(module).__name__
        rules = planning_rules(module)
        for name, value in vars(module).items() if rules else ():
            if isinstance(value, nnx.Variable) and name not in rules:
                survey.others.add("/".join((*path, name)))
    for name, layer, rule in _known(model):
        product = rule.product(layer)
        if product is not None:
            survey.products[name] = product
    survey.faults |= normalised(model, survey.products)
    if args or kwargs:
        _trace(model, survey, args, kwargs)
    chosen = plan_surveyed(params, config, survey)
    _refuse_shared(model, chosen)
    for spec in () if chosen.traced else chosen.specs:
        refuse_untraced(spec.name, survey.products.get(spec.name))
    return chosen


NORMALISING = tuple(
    getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name)
)
"""Flax's modules that change the kernels of the layer that they hold, if it has them.

Flax 0.12.0 has neither.
"""


def normalised(model: nnx.Module, kernels: Iterable[str]) -> dict[str, str]:
    """{path: what is done to it} for those of `kernels` that are changed before use."""
    inside = {
        "/".join((*path, "layer_instance", "")): type(module).__name__
        for path, module in layers(model)
        if isinstance(module, NORMALISING)
    }
    return {
        kernel: f"{cls} changes it before its layer multiplies"
        for kernel in kernels
        for start, cls in inside.items()
        if kernel.startswith(start)
    }


def check_model(model: Any) -> None:
    """Raise unless `model` is an NNX module without adapters."""
    if not isinstance(model, nnx.Module):
        is_class = isinstance(model, type)
        got = f"the class {model.__name__}" if is_class else type(model).__name__
        raise TypeError(f"model must be a flax.nnx.Module, got {got}")
    for path, node in nnx.iter_graph(model):
        if isinstance(node, MoRAParam):
            name = "/".join(map(str, path))
            raise ValueError(f"model has adapters already, the first at {name!r}")


def _known(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, LayerRule]]:
    """Layers of known classes: their kernel's path, they, the first rule of it."""
    for path, module in layers(model):
        for kernel, rule in planning_rules(module).items():
            if isinstance(getattr(module, kernel, None), nnx.Variable):
                yield "/".join((*path, kernel)), module, rule


def _trace(model: nnx.Module, survey: Survey, args: Any, kwargs: Any) -> None:
    """Add to `survey` what a call tells."""
    marked = nnx.clone(model)
    found = list(_known(marked))

    def record(
        path: str, rule: LayerRule, module: Any, args: Any, kwargs: Any, call: Any
    ) -> Any:
        name = path + rule.name(module)
        noted, x = survey.note(name, rule, module, args, kwargs)
        x = mark(x, noted, end=False)
        args, kwargs = rule.with_input(x, module, args, kwargs)
        return mark(call(*args, **kwargs), noted, end=True)

    for path, layer in {name.rpartition("/")[0]: m for name, m, _ in found}.items():
        around = functools.partial(record, f"{path}/" if path else "")
        cls = subclass(type(layer), around, strict=False)
        object.__setattr__(layer, "__class__", cls)
    graph, state = nnx.split(marked)

    def call(state: Any, args: Any, kwargs: Any) -> Any:
        return nnx.merge(graph, state)(*args, **kwargs)  # type: ignore[operator]

    leaves = named_leaves(nnx.to_pure_dict(state))
    arrays = {name: leaf for name, (_, leaf) in leaves.items()}
    survey.trace(call, arrays, state, args, kwargs)


def _refuse_shared(model: nnx.Module, plan: Plan) -> None:
    """Raise if the model holds an adapted kernel, or what holds it, in two places."""
    adapted = [spec.name for spec in plan.specs]
    for paths in nnx.find_duplicates(model):
        first, second, *_ = names = ["/".join(map(str, path)) for path in paths]
        for spec in adapted:
            if any(spec == name or spec.startswith(f"{name}/") for name in names):
                raise ValueError(
                    f"{spec} is shared: the model holds {first!r} also as {second!r}; "
                    "exclude it, or copy it"
                )
