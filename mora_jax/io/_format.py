"""The settings of an adapter as JSON, and back."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.axes import check_axes, sizes
from mora_jax._common.checks import check_kernel
from mora_jax._common.suggestions import lacking
from mora_jax._common.types import Path
from mora_jax._plan.settings import SETTINGS, AdapterSettings
from mora_jax._plan.spec import AdapterSpec, operator_settings
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._json import dump, short
from mora_jax.operators import Operator, Subspace, make_operator

LARGEST_WIDTH = 2**22
"""The most features on either side of a kernel that a file may describe."""

LARGEST_ARRAY = 2**28
"""The most numbers in a random operator that is made from a file alone."""


def describe(spec: AdapterSpec, dtype: Any) -> dict[str, Any]:
    """The settings of `spec` and what checks them, for an M of `dtype`."""
    return {
        "path": list(spec.path),
        "kernel_shape": list(spec.kernel_shape),
        "axes": spec.axes,
        "operator": operator_settings(spec.operator),
        "operator_check": list(fingerprint(spec.operator)),
        "square_rank": spec.operator.square_rank,
        "rank": budget(spec),
        **spec.to_json(),
        "dtype": jnp.dtype(dtype).name,
    }


def budget(spec: AdapterSpec) -> int:
    """The rank of the smallest LoRA with at least as many parameters."""
    numbers = math.prod(spec.operator.m_shape)
    return math.ceil(numbers / (spec.in_features + spec.out_features))


def fingerprint(operator: Operator) -> tuple[float, ...]:
    """Four numbers that tell operators apart, computed from fixed arrays.

    They differ on a platform or in a later version of the library that has other
    random numbers or another definition of the operator.
    """
    # Those with given arrays differ from layer to layer, and would be kept for nothing.
    return _fingerprint(operator) if operator.given else _kept_fingerprint(operator)


def _fingerprint(operator: Operator) -> tuple[float, ...]:
    random = np.random.RandomState(0).standard_normal
    q, width = operator.square_rank, operator.out_features
    m, x = random(operator.m_shape) / math.sqrt(q), random(operator.in_features)
    with jax.default_matmul_precision("highest"):  # TPUs would round to bfloat16
        y = operator.apply(m.astype(np.float32), x.astype(np.float32))
    terms = np.asarray(y, np.float64) * random(width) / math.sqrt(width)
    return tuple(float(f"{terms[k::4].sum():.5g}") for k in range(4))


_kept_fingerprint = functools.lru_cache(maxsize=256)(_fingerprint)


KEYS = frozenset(
    {
        "path",
        "kernel_shape",
        "axes",
        "operator",
        "operator_check",
        "square_rank",
        "rank",
        "dtype",
        *SETTINGS,
    }
)
"""What a layer must hold."""


def layer_path(layer: Any, where: str) -> Path:
    """The path of a layer that `describe` wrote, whose keys are checked.

    Args:
      layer: The parsed layer.
      where: The place of the layer in the file, for messages.

    Raises:
      AdapterFileError: Keys are missing or unknown, or the path is not a path.
    """
    if not isinstance(layer, dict) or layer.keys() != KEYS:
        got = sorted(layer) if isinstance(layer, dict) else layer
        raise AdapterFileError(f"{where} must hold {sorted(KEYS)}, got {short(got)}")
    path = layer["path"]
    if not isinstance(path, list) or not path or not all(map(_plain, path)):
        raise AdapterFileError(f"{where} must have a path of names, got {short(path)}")
    return tuple(path)


def _plain(key: Any) -> bool:
    return isinstance(key, str) and key not in ("", ".", "..")


def restore(
    layer: Any,
    m: np.ndarray | None,
    base: Mapping[str, Any] | None,
    given: Mapping[str, np.ndarray],
) -> AdapterSpec:
    """Undo `describe`. Everything is checked, and nothing is filled in.

    Args:
      layer: The parsed layer.
      m: M as the file has it; None for a file without arrays.
      base: {path: kernel} of the model that the adapter must fit; None for any model.
      given: {name: array} of the operator's arrays, where no settings determine them.

    Raises:
      TypeError, ValueError: A setting is wrong.
    """
    shape, axes, q = layer["kernel_shape"], layer["axes"], layer["square_rank"]
    if not isinstance(shape, list) or not isinstance(axes, str):
        raise TypeError("kernel_shape must be a list, and axes letters")
    shape = tuple(shape)
    if not all(type(size) is int and size > 0 for size in (*shape, q)):
        raise ValueError(
            "kernel_shape and square_rank must be positive integers, "
            f"got {short(shape)} and {short(q)}"
        )
    check_axes(axes, len(shape))
    expected = (*sizes(shape, axes, "s"), q, q)
    if m is not None and m.shape != expected:
        raise ValueError(f"M must have shape {expected}, got {m.shape}")
    if base is not None:
        _check_base(layer, base)
    ins, outs = (math.prod(sizes(shape, axes, letter)) for letter in "io")
    if max(ins, outs) > LARGEST_WIDTH:
        raise ValueError(
            f"a kernel must have at most {LARGEST_WIDTH:,} features on either side, "
            f"got {ins:,} and {outs:,}"
        )
    operator = _operator(layer, (ins, outs, q), m, base, given)
    settings = AdapterSettings.from_json({name: layer[name] for name in SETTINGS})
    path = tuple(layer["path"])
    spec = AdapterSpec(operator, shape, axes, path, **vars(settings))
    dtype = spec.param_dtype if m is None else m.dtype
    for key, value in describe(spec, dtype).items():
        # Texts are compared, since True == 1 == 1.0.
        if key != "operator_check" and dump(value) != dump(layer[key]):
            raise ValueError(f"{key} must be {value!r}, got {short(layer[key])}")
    _check_fingerprint(spec.operator, layer["operator_check"])
    return spec


def _operator(
    layer: dict[str, Any],
    sizes: tuple[int, int, int],
    m: np.ndarray | None,
    base: Mapping[str, Any] | None,
    given: Mapping[str, np.ndarray],
) -> Operator:
    """The operator of a layer: of (in, out, q), if it does not ask for too much."""
    ins, outs, q = sizes
    if not isinstance(layer["operator"], dict):
        raise TypeError(f"operator must be an object, got {short(layer['operator'])}")
    chosen = dict(layer["operator"])
    seed = chosen.pop("seed", None)
    numbers = q * max(ins, outs) if seed is not None else 0
    if m is None:  # otherwise the size of its file has bounded the size of M
        numbers = max(numbers, 4 * q * q)
    if base is None and numbers > LARGEST_ARRAY:
        raise ValueError(
            f"a {short(chosen.get('name'))} of {ins} -> {outs} features takes too much "
            "memory for a file alone to ask for; give the model's params or plan, too"
        )
    if chosen.get("name") == Subspace.name:
        return _subspace(sizes, given)
    if given:
        name = short(chosen.get("name"))
        raise ValueError(f"a {name} has no arrays in a file, got {sorted(given)}")
    return make_operator(chosen, *sizes, seed=seed or 0)


def _subspace(sizes: tuple[int, int, int], given: Mapping[str, np.ndarray]) -> Subspace:
    if given.keys() != set(Subspace.arrays):
        raise ValueError(
            "a subspace has its directions in the file of an adapter, as mora_jax.save "
            f"writes it, and they are not there: {sorted(given)}"
        )
    return Subspace(*sizes, **given)


def _check_base(layer: dict[str, Any], base: Mapping[str, Any]) -> None:
    name, shape = "/".join(layer["path"]), tuple(layer["kernel_shape"])
    if name not in base:
        raise ValueError(f"the model has no such kernel{lacking(name, base)}")
    if tuple(base[name].shape) != shape:
        raise ValueError(
            f"the model's kernel must have shape {shape}, got {tuple(base[name].shape)}"
        )
    check_kernel(base[name], name)


def _check_fingerprint(operator: Operator, stored: Any) -> None:
    here, there = np.array(fingerprint(operator)), np.array(stored, np.float64)
    if here.shape != there.shape or not np.allclose(here, there, 1e-3, 1e-3):
        raise ValueError(
            f"{operator.name} with these settings is another operator here than where "
            f"the file was made: its check gives {here.tolist()}, got {short(stored)}"
        )
