"""What qwix has no public names for, in this file alone.

Versions 0.1.5 to 0.1.8 have all of it; from one to the next only places differed.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax._common.types import Path

OLDEST, NEWEST = "0.1.5", "0.1.8"

try:
    import qwix
    from qwix._src.core import numerics, qarray
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


def is_taken(array: Any) -> bool:
    """Whether qwix takes an operand for a parameter, by its shape at least."""
    try:
        return flax_util.find_param(array) is not None
    except ValueError:  # for one of several
        return True


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter or an operand is one that qwix has quantized."""
    return isinstance(parameter, WithAux | qwix.QArray)


def first_array(parameter: Any) -> Any:
    """The array in a parameter; the integers of a quantized one."""
    return jax.tree.leaves(parameter)[0]


def quantized(module: Any, name: str, dtype: Any) -> WithAux:
    """A quantized parameter of a module, as an operand of a product."""
    found = flax_util.unbox(parameters_of(module)[name])
    scale = found.array.scale.astype(dtype)
    return found.replace(array=found.array.replace(scale=scale))


def dtype_of(operand: Any) -> Any:
    """The dtype of an array; of a quantized one, that of the numbers it stands for."""
    array = operand.array if isinstance(operand, WithAux) else operand
    return array.scale.dtype if isinstance(array, qwix.QArray) else array.dtype


def values_of(parameter: Any) -> Any:
    """The variable of a parameter, or that of the integers of a quantized one."""
    return parameter.array.qvalue if isinstance(parameter, WithAux) else parameter


def boxed_as(like: Any, array: Any) -> Any:
    """`array` with the metadata of a parameter, all of its axes replicated."""
    box, replicated = values_of(like), (None,) * array.ndim
    if not _is_box(box):
        return array
    return flax_util.update_boxed(box, value=array, transpose=replicated)


def dequantized(parameter: WithAux) -> jax.Array:
    """The numbers that a quantized parameter stands for; or their shape."""
    array = flax_util.unbox(parameter.array)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(array)):
        return jax.eval_shape(qwix.dequantize, array)
    return qwix.dequantize(jax.tree.map(jnp.asarray, array))


def plain(parameter: WithAux, values: jax.Array) -> Any:
    """`values` in the box of a quantized parameter, as it was before."""
    return _boxed(parameter.array.qvalue, values)


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

    array = jax.tree.map(_boxed, parameter.array, quantize(values), is_leaf=_is_box)
    return parameter.replace(array=array)  # type: ignore[attr-defined]


def _boxed(box: Any, value: Any) -> Any:
    return flax_util.update_boxed(box, value=value) if _is_box(box) else value


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata | nnx.Variable)


def check_qtype(name: str, qtype: Any) -> None:
    """Raise unless qwix knows a type of quantized numbers.

    Raises:
      ValueError: It does not.
    """
    try:
        numerics.get_symmetric_bound(qtype)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a type that qwix quantizes to, such as 'int8', 'int4', "
            f"'nf4' or 'float8_e4m3fn', got {qtype!r}"
        ) from error
