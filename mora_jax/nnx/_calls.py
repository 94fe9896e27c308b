"""Programs of an NNX model's calls, which are checked when they are first traced."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr

from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.calls import arrays_of, kind_of_call, program_of, proving
from mora_jax._flax.layer_rules import folded_kernels, planning_rules
from mora_jax._flax.survey import Survey, check_call
from mora_jax._layer.slots import Selected
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.paths import named_leaves, unboxed
from mora_jax.nnx._classes import derived, detached, plain_class, set_class, subclass
from mora_jax.nnx._param import MoRAParam, TrainedParam, held
from mora_jax.nnx._state import attributes, named_modules, plan_of, traceable


def program(
    model: nnx.Module, method: str, args: Any, kwargs: Any, survey: Survey | None
) -> Jaxpr:
    """The program of a call, whose first inputs are the arrays of the model.

    With a survey, which it fills in, layers are marked: those that have an M, or all of
    a plain model. Without a survey it is the program of the base.
    """
    suffix = SUFFIX if any(attributes(model, MoRAParam)) else ""
    twin = detached(model) if survey is None else nnx.clone(model)
    for path, layer in list(named_modules(twin)) if survey is not None else ():
        names = [name + suffix for name in planning_rules(layer)]
        variables = (getattr(layer, name, None) for name in names)
        set_class(layer, plain_class(layer))
        if survey is not None and any(isinstance(v, nnx.Variable) for v in variables):
            prefix = "".join(f"{key}/" for key in path)
            set_class(layer, _marked_class(type(layer), prefix, survey))
    for module, (*_, key), m in attributes(twin, MoRAParam):
        if isinstance(m, TrainedParam):
            setattr(module, key, m.plain())
        elif isinstance(unboxed(m), Selected):  # one for each row: any will do
            m.copy_from(m.replace(jnp.zeros(m.shape, m.dtype)))
    call, state = traceable(twin, method)
    if survey is not None:
        leaves = named_leaves(nnx.to_pure_dict(state))
        survey.leaves = {name: leaf for name, (_, leaf) in leaves.items()}
        parameters = set(named_leaves(nnx.to_pure_dict(nnx.state(twin, nnx.Param))))
        batched = [False if name in parameters else None for name in leaves]
        survey.batched = [*batched, *(True for _ in arrays_of((args, kwargs)))]
    return program_of(call, state, args, kwargs)


def _marked_class(cls: type, prefix: str, survey: Survey) -> type:
    """The class of a layer whose calls `survey` records; `prefix` is its path."""

    def run(layer: nnx.Module, call: LayerCall) -> Any:
        name = call.rule.name(call.module)
        _, m = held(layer, name) or (None, None)
        return survey.record_call(prefix + name, call, m)

    def read(layer: nnx.Module, name: str, kernel: Any) -> Any:
        _, m = held(layer, name) or (None, None)
        own = prefix + name, folded_kernels(cls)[name], cls.__name__
        return survey.record_read(*own, kernel, m)

    return derived(cls, run, read)


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
def checked_class(cls: type) -> type:
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

    return subclass(cls, checked)
