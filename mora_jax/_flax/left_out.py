"""Arrays of a model that get no adapter, and the reasons."""

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import jax.numpy as jnp

from mora_jax._common.alike import alike, starred
from mora_jax._common.axes import features
from mora_jax._common.types import Shape
from mora_jax._common.warnings import LeftOutWarning, warn
from mora_jax._flax.survey import Survey
from mora_jax._plan.plan import LeftOut
from mora_jax.products import Product

if TYPE_CHECKING:
    from mora_jax._flax.candidates import Candidates

NO_KERNEL = re.compile(r"(?i).*(bias|scale|norm|pos|embed|token|mean|var|cache)[^/]*$")
"""Names of arrays that rarely multiply inputs, for models that were not traced."""


def left_out_of(model: "Candidates", taken: Collection[str]) -> tuple[LeftOut, ...]:
    """The kinds of the arrays of two or more axes that are not `taken`."""
    arrays = {n: leaf for n, leaf in model.arrays.items() if n not in taken}
    quantized = {
        name.rpartition("/")[0]
        for name, leaf in arrays.items()
        if jnp.issubdtype(leaf.dtype, jnp.integer)
    }

    def reason(name: str, shape: Shape) -> tuple[str, bool]:
        if name in model.excluded:
            return "excluded", False
        if name.rpartition("/")[0] in quantized:
            return "quantized; see mora_jax.qwix", True
        named = any(re.fullmatch(p, name) for p in model.config.targets)
        if model.survey is None or not (model.by_default or named):
            return "no target", False
        return _by_survey(name, shape, model.survey)

    reasons = [(name, *reason(name, leaf.shape)) for name, leaf in arrays.items()]
    kinds = []
    for kind in alike(reasons, lambda reason: reason):
        name, why, multiplied = kind[0]
        pattern = name if len(kind) == 1 else starred(name)
        kinds.append(LeftOut(pattern, len(kind), why, multiplied))
    return tuple(kinds)


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


def _by_survey(name: str, shape: Shape, survey: Survey) -> tuple[str, bool]:
    """The reason why the default targets lack an array, and if it multiplies inputs."""
    uses = survey.uses
    if name in survey.products:
        product = survey.products[name]
        if product.adapted_by_default and is_too_narrow(product, shape):
            return "too narrow for a square; targets and operator may name it", False
        kind = product.label or "a head, router or embedding by its name"
        return f"{kind}; targets may name it", False
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
