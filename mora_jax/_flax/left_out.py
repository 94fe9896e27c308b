"""Arrays of a model that get no adapter, and the reasons."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from mora_jax._common.alike import starred
from mora_jax._common.axes import features
from mora_jax._common.types import Shape
from mora_jax._common.warnings import LeftOutWarning, warn
from mora_jax._flax.survey import Survey
from mora_jax._plan.config import DEFAULT_TARGETS, MoRAConfig
from mora_jax._plan.plan import LeftOut
from mora_jax.products import Convolution, Lookup, Product

NO_KERNEL = re.compile(r"(?i).*(bias|scale|norm|pos|embed|token|mean|var|cache)[^/]*$")
"""Names of arrays that rarely multiply inputs, for models that were not traced."""


def left_out_of(
    arrays: Mapping[str, Any],
    excluded: Collection[str],
    config: MoRAConfig,
    survey: Survey | None,
) -> tuple[LeftOut, ...]:
    """The arrays that get no adapter, by kinds.

    Args:
      arrays: {path: array} of those that have two or more axes and no adapter.
      excluded: The paths that `config.exclude` names.
      config: The settings.
      survey: The layers and the trace of a call; None if only shapes are known.
    """
    default = config.targets == DEFAULT_TARGETS
    quantized = {
        name.rpartition("/")[0]
        for name, leaf in arrays.items()
        if jnp.issubdtype(leaf.dtype, jnp.integer)
    }
    kinds: dict[tuple[str, str, bool], list[str]] = {}
    for name, leaf in arrays.items():
        if name in excluded:
            why, multiplied = "excluded", False
        elif name.rpartition("/")[0] in quantized:
            why, multiplied = "quantized; see mora_jax.qwix", True
        elif survey is None or not (default or _matched(name, config)):
            why, multiplied = "no target", False
        else:
            why, multiplied = _by_survey(name, tuple(leaf.shape), survey)
        kinds.setdefault((starred(name), why, multiplied), []).append(name)
    return tuple(
        LeftOut(names[0] if len(names) == 1 else pattern, len(names), why, multiplied)
        for (pattern, why, multiplied), names in kinds.items()
    )


def warn_of(left_out: Iterable[LeftOut]) -> None:
    """Warn of arrays that multiply inputs, since the user may not know of them."""
    surprising = [str(kind) for kind in left_out if kind.multiplied]
    if surprising:
        warn(
            "arrays that multiply inputs get no adapter: "
            + "; ".join(surprising)
            + ". Name them in exclude if that is meant",
            LeftOutWarning,
        )


def _matched(name: str, config: MoRAConfig) -> bool:
    """True if a pattern of the user names the array; then that is not the reason."""
    return any(re.fullmatch(pattern, name) for pattern in config.targets)


def _by_survey(name: str, shape: Shape, survey: Survey) -> tuple[str, bool]:
    """The reason why the default targets lack an array, and if it multiplies inputs."""
    uses = survey.uses
    if name in survey.products:
        product = survey.products[name]
        if product.adapted_by_default and is_too_narrow(product, shape):
            return "too narrow for a square; targets and operator may name it", False
        return f"{_kind(product)}; targets may name it", False
    if survey.no_kernels([name]):
        return "never multiplied with an input", False
    if uses is not None and name not in uses.reached:
        return "the call that was traced does not use it", True
    matrix = sum(size > 1 for size in shape) > 1  # not a token or a row of scales
    guess = matrix and not NO_KERNEL.fullmatch(name)
    return survey.why_unknown(name), uses is not None or guess


def is_too_narrow(product: Product, shape: Shape) -> bool:
    """True if a kernel has a single input or output feature, as a head of one number.

    The default operator's M cannot be as narrow, and the M of another operator would
    hold a single number.
    """
    axes = "s" * (len(shape) - len(product.axes)) + product.axes
    return 1 in features(shape, axes)


def _kind(product: Product) -> str:
    if isinstance(product, Convolution):
        return "a convolution"
    if isinstance(product, Lookup):
        return "an embedding"
    return "a head, router or embedding by its name"
