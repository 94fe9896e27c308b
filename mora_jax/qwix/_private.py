"""Models and params as qwix has them, and as it never saw them.

Names of qwix that are not public are in this file alone. Versions 0.1.5 to 0.1.8 have
all of them; from one to the next only places differed.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax._common.trees import is_end, located_leaves, path_of
from mora_jax._common.types import ArrayLike, Path
from mora_jax._layer.adapter import delta_of, wide
from mora_jax._layer.rounding import dithered_steps
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.merge import merge
from mora_jax._tree.paths import checked_adapters, reboxed
from mora_jax.nnx import _held

try:
    import qwix
    from qwix._src.providers.ptq import WithAux, flax_util
except ImportError as error:
    remedy = "mora_jax needs qwix 0.1.5 to 0.1.8: pip install 'mora-jax[qwix]'"
    raise ImportError(f"{remedy} ({error})") from error


module_of_call = flax_util.get_current_module  # the Flax module whose method runs now


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
    for _, module in _held.named_modules(model):
        for name, parameter in parameters_of(module).items():
            if is_quantized(parameter):
                setattr(module, name, dequantized(parameter))
        for name in ("qwix_path", "disable_quant_stats_update", "qwix_rngs"):
            vars(module).pop(name, None)
    _held.set_class(model, getattr(type(model), "_unquantized_type", type(model)))


def parameters_of(module: Any) -> dict[str, Any]:
    """The parameters of a module itself except M's, boxed or quantized as they are."""
    if isinstance(module, nnx.Module):
        kinds, own = nnx.Param | WithAux, vars(module)
    else:
        kinds, own = object, module.variables.get("params", {})
    # A list of older versions of Flax has numbers for names, of modules alone.
    found = {name: value for name, value in own.items() if isinstance(value, kinds)}
    return {name: found[name] for name in found if not name.endswith(SUFFIX)}


def named_parameters(model: Any) -> dict[str, Any]:
    """{slash-joined path: parameter} of a model that runs, or of any NNX model."""
    if not isinstance(model, nnx.Module):
        named, _ = parameters_in(model.variables.get("params", {}))
        return {"/".join((*model.path, name)): leaf for name, leaf in named.items()}
    return {
        "/".join((*path, name)): parameter
        for path, module in _held.named_modules(model)
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


def dequantize(params: Any) -> Any:
    """Params with an array instead of each quantized kernel.

    It is the base that adapters were trained on, for `mora_jax.save(..., params=)` and
    `mora_jax.merge`, or to compute with without qwix. Shapes give shapes.

    Args:
      params: Nested dicts that qwix quantized, without adapters; or an NNX model, with
        adapters or without. A state of it does not say how its numbers are to be read.

    Returns:
      The params, in the same structure; for a model their `nnx.State` without adapters.

    Raises:
      TypeError: A Linen model, a state of a quantized model, or not a tree of arrays.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax, qwix
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="int8")
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> variables = model.init(jax.random.key(0), x := jnp.ones((1, 16)))
      >>> params, adapters = mora_jax.split(variables["params"])
      >>> merged = mora_jax.merge(mora_jax.qwix.dequantize(params), adapters)
      >>> y = nn.Dense(16).apply({"params": merged}, x)
      >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
      True
    """
    if isinstance(params, nnx.Module):
        forget(model := nnx.clone(params))
        return nnx.state(model, nnx.All(nnx.Param, nnx.Not(_held.MoRAParam)))
    if not located_leaves(params) and not isinstance(params, Mapping):
        rule = f"params must be a tree of arrays, got {type(params).__name__}"
        raise TypeError(f"{rule}: give variables['params'], or an NNX model")
    named, structure = parameters_in(params)
    for name in named:
        if name.endswith("/array/qvalue"):
            parts = f"parts of the quantized kernel {name[:-13]!r}"
            why = "which do not say how it is quantized"
            raise TypeError(f"params hold {parts}, {why}: write dequantize(model)")
    return structure.unflatten(map(dequantized, named.values()))


def merge_quantized(params: Any, adapters: Any, shift: ArrayLike | int = 0) -> Any:
    r"""Params whose quantized kernels have the deltas, rounded to whole steps.

    .. math:: Q' = \lfloor Q + \alpha s\, C M D / scale + u \rfloor, \quad 0 \le u < 1

    A delta is far smaller than a step. The dither u, a hash of a number's place and of
    `shift`, keeps it in the mean of many numbers. Scales stay, so that the largest
    numbers of a kernel cannot grow. It is for `remora.renewing(merge=)`; what is to be
    kept is better merged by `merge(dequantize(params), adapters)`.

    Args:
      params: Nested dicts that qwix quantized to int4 or int8, without adapters.
      adapters: The adapters of quantized kernels; trained arrays stay in them alone.
      shift: An integer; another one is another dither.

    Raises:
      TypeError, ValueError: A kernel is not there, of another shape, or not of whole
        numbers, as nf4 is; or an M holds NaN or infinity.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax, qwix
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="int8")
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 16)))
      >>> params, adapters = mora_jax.split(variables["params"])
      >>> merged = mora_jax.qwix.merge_quantized(params, adapters)
      >>> bool((merged["kernel"].array.qvalue == params["kernel"].array.qvalue).all())
      True
    """
    named, structure = parameters_in(params)
    for path, adapter in checked_adapters(adapters).kernels.items():
        old: Any = named.get(name := "/".join(path))
        rule = f"{name}: merge_quantized needs kernels of signed integers, as int8"
        if not is_quantized(old):
            raise TypeError(f"{rule}; this one is not quantized")
        array = flax_util.unbox(old.array)
        if not jnp.issubdtype(array.qvalue.dtype, jnp.signedinteger):
            raise TypeError(f"{rule}, got {array.qtype}")
        if array.shape != (shape := adapter.spec.kernel_shape):
            raise ValueError(f"{name} is {array.shape}, and {shape} in the adapters")
        of = (jnp.full_like(array.qvalue, number) for number in (0, 1))
        zero, one = (wide(qwix.dequantize(array.replace(qvalue=q))) for q in of)
        steps = delta_of(adapter) / jnp.where(one > zero, one - zero, 1)
        sums = array.qvalue.astype(steps.dtype) + steps
        sums = dithered_steps(sums, (shift, shift), adapter.spec.axes)
        limits = jnp.iinfo(array.qvalue.dtype)
        new = jnp.clip(sums, limits.min, limits.max).astype(array.qvalue.dtype)
        array = old.array.replace(qvalue=reboxed(old.array.qvalue, new))
        named[name] = old.replace(array=array)
    return structure.unflatten(named.values())


def merge_adapters(model: _held.Model, *, any_base: bool = False) -> _held.Model:
    """An NNX model with its adapters merged into its kernels, which qwix never saw.

    `model`, as a `MoRAProvider` makes it, stays as it is. `any_base` is as in `merge`.

    Returns:
      A new model of floating-point kernels, of the class that the base has.

    Raises:
      TypeError, ValueError: As `merge`; `model` is not of NNX, or lacks adapters.
    """
    forget(plain := _held.detached(model))
    params, adapters = nnx.state(plain, nnx.Param), _held.adapters(model)
    nnx.update(plain, merge(params, adapters, any_base=any_base))
    return plain
