"""Names of qwix that are not public, in this file alone.

Versions 0.1.5 to 0.1.8 have all of it; from one to the next only places differed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax._common.trees import is_end, path_of
from mora_jax._common.types import Path
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.paths import reboxed
from mora_jax.nnx._held import named_modules, set_class

try:
    import qwix
    from qwix._src.providers.ptq import WithAux as WithAux
    from qwix._src.providers.ptq import flax_util
except ImportError as error:
    remedy = "mora_jax needs qwix 0.1.5 to 0.1.8: pip install 'mora-jax[qwix]'"
    raise ImportError(f"{remedy} ({error})") from error


module_of_call = flax_util.get_current_module
"""The Flax module whose method runs now."""


def path_of_call() -> Path:
    """The path of that module in its model."""
    return tuple(map(str, flax_util.get_current_module_path()))


def first_call_of(model: Any) -> tuple[str, nnx.Rngs | None] | None:
    """The method and the generators of qwix's own call of an NNX model, else None."""
    if isinstance(model, nn.Module) or not model.disable_quant_stats_update:
        return None
    methods = vars(type(model)).items()
    name = next(name for name, method in methods if hasattr(method, "__wrapped__"))
    return name, model.qwix_rngs


def forget(model: nnx.Module) -> None:
    """Make a model one that qwix never saw, of arrays."""
    for _, module in named_modules(model):
        for name, parameter in parameters_of(module).items():
            if is_quantized(parameter):
                setattr(module, name, dequantized(parameter))
        for name in ("qwix_path", "disable_quant_stats_update", "qwix_rngs"):
            vars(module).pop(name, None)
    set_class(model, getattr(type(model), "_unquantized_type", type(model)))


def parameters_of(module: Any) -> dict[str, Any]:
    """The parameters of a module itself except M's, boxed or quantized as they are."""
    if isinstance(module, nnx.Module):
        kinds, own = nnx.Param | WithAux, vars(module)
    else:
        kinds, own = object, module.variables.get("params", {})
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, kinds) and not name.endswith(SUFFIX)
    }


def named_parameters(model: Any) -> dict[str, Any]:
    """{slash-joined path: parameter} of a model that runs, or of any NNX model."""
    if not isinstance(model, nnx.Module):
        named, _ = parameters_in(model.variables.get("params", {}))
        return {"/".join((*model.path, name)): leaf for name, leaf in named.items()}
    return {
        "/".join((*path, name)): parameter
        for path, module in named_modules(model)
        for name, parameter in parameters_of(module).items()
    }


def parameters_in(params: Any) -> tuple[dict[str, Any], Any]:
    """{slash-joined path: parameter} of a tree, and its structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, WithAux) or is_end(node)
    )
    return {"/".join(path_of(keys)): leaf for keys, leaf in pairs}, structure


def is_taken(array: Any) -> bool:
    """True if qwix takes an operand for a parameter, by its shape at least."""
    try:
        return flax_util.find_param(array) is not None
    except ValueError:  # for one of several
        return True


def is_quantized(parameter: Any) -> bool:
    """True for a parameter or an operand that qwix has quantized."""
    return isinstance(parameter, WithAux | qwix.QArray)


def dequantized(parameter: Any) -> Any:
    """The numbers of a quantized parameter, or their shape, in its box; or itself."""
    if not isinstance(parameter, WithAux):
        return parameter
    array = flax_util.unbox(parameter.array)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(array)):
        values = jax.eval_shape(qwix.dequantize, array)
    else:
        values = qwix.dequantize(jax.tree.map(jnp.asarray, array))
    return reboxed(parameter.array.qvalue, values)
