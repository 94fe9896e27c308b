"""What qwix has no public names for, in this file alone.

Versions 0.1.5 to 0.1.8 have all of it; from one to the next only places differed.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from mora_jax._paths import Path
from mora_jax._spec import SUFFIX

OLDEST, NEWEST = "0.1.5", "0.1.8"

try:
    import qwix
    from qwix._src.core import qarray
    from qwix._src.providers.ptq import WithAux as WithAux

    try:
        from qwix._src.utils import flax_util
    except ImportError:  # before 0.1.8
        from qwix._src import flax_util  # type: ignore[no-redef]
except ImportError as error:
    try:
        found = f"qwix {version('qwix')} is installed and lacks them"
    except PackageNotFoundError:
        found = "it is not installed"
    raise ImportError(
        f"mora_jax.qwix needs names of qwix {OLDEST} to {NEWEST}, and {found}: "
        "pip install mora-jax[qwix]"
    ) from error


def module_of_call() -> Any:
    """The Flax module whose method runs now."""
    return flax_util.get_current_module()


def rules_of(provider: qwix.QuantizationProvider) -> Sequence[qwix.QuantizationRule]:
    """The rules that a provider goes by: its own copies."""
    return provider._rules


def rule_of_call(
    provider: qwix.QuantizationProvider, op: str
) -> qwix.QuantizationRule | None:
    """The rule for an operation of the module that runs now, if any."""
    return provider._get_current_rule_and_op_id(op, only_rule=True)[0]


def rule_of_module(
    provider: qwix.QuantizationProvider, path: str
) -> qwix.QuantizationRule | None:
    """The first rule for the products of a module at a slash-joined path, if any."""
    for rule in provider._rules:
        if re.fullmatch(rule.module_path, path):
            return rule
    return None


def path_of(module: Any) -> Path:
    """The path of a module in its model."""
    path = module.path if isinstance(module, nn.Module) else module.qwix_path
    return tuple(map(str, path))


def is_first_call(module: nnx.Module) -> bool:
    """Whether qwix calls an NNX model to see what it multiplies."""
    return module.disable_quant_stats_update  # type: ignore[attr-defined]


def rngs_of(module: nnx.Module) -> nnx.Rngs:
    """The generators that `apply_lora_to_model` was given; in its first call only."""
    return module.qwix_rngs  # type: ignore[attr-defined]


def forget_call(model: nnx.Module) -> None:
    """Remove what qwix keeps of its first call, as for a model that it never saw."""
    for _, module in nnx.iter_graph(model):
        for name in ("qwix_path", "disable_quant_stats_update", "qwix_rngs"):
            if isinstance(module, nnx.Module) and name in vars(module):
                delattr(module, name)


def plain_class(model: Any) -> type:
    """The class that a model had before qwix intercepted its methods."""
    return getattr(type(model), "_unquantized_type", type(model))


def parameters_of(module: Any) -> Mapping[str, Any]:
    """The parameters of a module itself, boxed or quantized as they are, by name."""
    if isinstance(module, nn.Module):
        return module.variables.get("params", {})
    kinds = nnx.Param | WithAux
    return {name: v for name, v in vars(module).items() if isinstance(v, kinds)}


def name_of(module: Any, array: Any) -> str | None:
    """The name that `array` has among the parameters of the module that runs, if any.

    qwix goes by identity, and by shape where a parameter was converted. M, which is
    never an operand here, may have the shape of a kernel that was.
    """
    name = flax_util.find_param(array, WithAux)
    if name is not None and not name.endswith(SUFFIX):
        return name
    alike = [
        name
        for name, value in parameters_of(module).items()
        if not name.endswith(SUFFIX) and _shape(value) == tuple(array.shape)
    ]
    return alike[0] if len(alike) == 1 else None


def is_mistaken(array: Any) -> bool:
    """Whether qwix takes an input for an M, since it has its shape."""
    return (flax_util.find_param(array, WithAux) or "").endswith(SUFFIX)


def _shape(value: Any) -> tuple[int, ...] | None:
    value = flax_util.unbox(value)
    return tuple(value.shape) if hasattr(value, "shape") else None


def values_of(parameter: Any) -> Any:
    """The variable of a parameter, or that of the integers of a quantized one."""
    return parameter.array.qvalue if isinstance(parameter, WithAux) else parameter


def boxed_as(like: Any, array: Any) -> Any:
    """`array` with the metadata of a parameter, all of its axes replicated."""
    replicated = (None,) * array.ndim
    return flax_util.update_boxed(values_of(like), value=array, transpose=replicated)


def dequantized(parameter: WithAux) -> jax.Array:
    """The numbers that a quantized parameter stands for."""
    return qwix.dequantize(flax_util.unbox(parameter.array))


def plain(parameter: WithAux, values: jax.Array) -> Any:
    """`values` in the box of a quantized parameter, as it was before."""
    return flax_util.update_boxed(parameter.array.qvalue, value=values)


def requantized(parameter: WithAux, values: jax.Array) -> WithAux:
    """A parameter with other values, quantized and boxed as it is.

    Raises:
      ValueError: It was quantized in another shape than it has.
    """
    quantize = functools.partial(qarray.quantize, how=parameter.how)
    old = flax_util.unbox(parameter.array)
    values = values.astype(old.scale.dtype)
    for _ in range(values.ndim - 1):
        found = jax.eval_shape(quantize, values)
        if jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, old):
            break
        quantize = jax.vmap(quantize)  # a scanned layer quantizes one kernel of a stack
    else:
        raise ValueError(f"no way to quantize {values.shape} as {parameter.how}")

    def put(box: Any, value: jax.Array) -> Any:
        return flax_util.update_boxed(box, value=value)

    array = jax.tree.map(put, parameter.array, quantize(values), is_leaf=_is_box)
    return parameter.replace(array=array)  # type: ignore[attr-defined]


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata | nnx.Variable)


UNCHANGED = {"convert_element_type", "copy", "optimization_barrier"} | {
    "sharding_constraint",
    "reshard",
}
"""JAX's primitives after which a kernel has the features it had, in the same order."""


Link = Literal["itself", "made of it", "another", "unknown"]


def link(module: Any, name: str, array: Any) -> Link:
    """How an array that qwix takes for a parameter is linked to it.

    Returns:
      "itself" for the parameter as it stands, perhaps in another dtype; "made of it"
      for what was computed of it; "another" for an array that only has its shape;
      "unknown" in a function that JAX compiles for itself.
    """
    if isinstance(array, WithAux | qwix.QArray):
        return "itself"
    parameter = flax_util.unbox(parameters_of(module)[name])
    if isinstance(array, Tracer):
        return _traced_link(parameter, array)
    alike = array is parameter or (
        array.shape == parameter.shape
        and not isinstance(parameter, Tracer)
        and bool((array == parameter.astype(array.dtype)).all())
    )
    return "itself" if alike else "made of it"


def _traced_link(parameter: Any, array: Any) -> Link:
    """By the operations that lead from the one to the other."""
    steps, seen, waiting, joined = set(), set(), [array], False
    while waiting:
        node = waiting.pop()
        if node is parameter:
            return "itself" if steps <= UNCHANGED else "made of it"
        if id(node) in seen:
            continue
        seen.add(id(node))
        made_by = getattr(node, "parent", None)
        if made_by is None:
            if hasattr(node, "get_const") and node.get_const() is parameter:
                return "itself" if steps <= UNCHANGED else "made of it"
            continue
        steps.add(str(made_by.primitive))
        joined |= len(made_by.in_tracers) != 1
        waiting += made_by.in_tracers
    return "another" if joined else "unknown"
