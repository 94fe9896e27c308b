"""Which kernels get an adapter, and which adapter each of them gets."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax

from mora_jax._common.checks import check_kernel
from mora_jax._flax.survey import Survey
from mora_jax._plan.config import (
    DEFAULT_TARGETS,
    MoRAConfig,
    check_config,
    default_targets,
)
from mora_jax._plan.left_out import is_too_narrow, left_out_of, warn_of
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._trace_check import Uses
from mora_jax._tree.paths import Path, named_leaves, pattern_hint, refuse_variables

ATTENTION_AXES = (
    (r"(.*/)?(query|key|value)/kernel", "ioo"),
    (r"(.*/)?out/kernel", "iio"),
)
"""Kernels of three axes in Flax's own attention modules, known by name."""


def plan(params_or_shapes: Any, config: MoRAConfig | None = None) -> Plan:
    """Choose the kernels to adapt, and an operator and square rank for each.

    The plan goes by names and shapes alone: a kernel of two axes is (in, out), and
    Flax's attention kernels of three axes are known by name. `linen.plan` and
    `nnx.plan` ask the model itself.

    Args:
      params_or_shapes: The model's params, any pytree of arrays, or its
        `jax.eval_shape`. Paths are the slash-joined keys.
      config: What to adapt, and how; None for the defaults.

    Raises:
      TypeError: A leaf is not an array, or a target or an array to train is not
        floating-point.
      ValueError: A pattern matches nothing, the meaning of a kernel's axes is not
        known, an array is found twice or shared by two paths, or is to be adapted and
        trained, or a rank does not fit.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
      >>> print(mora_jax.plan(params, mora_jax.MoRAConfig(rank=2)))
      path       in -> out  operator    r   q  scale  parameters  of base
      fc/kernel   64 -> 64  rotation  2.0  16      4         256    6.15%
      1 adapter: 256 trainable parameters, 6.15% of 4,160
    """
    config = check_config(config, "plan(params, config)")
    refuse_variables(params_or_shapes)
    return _plan(params_or_shapes, config, None)


def plan_surveyed(params: Any, config: MoRAConfig | None, survey: Survey) -> Plan:
    """`plan` for a model of which it is known what the layers compute.

    Args:
      params: The model's params or their shapes, as in `plan`.
      config: What to adapt, and how. Its default targets are the dense layers.
      survey: What is known of the arrays.
    """
    return _plan(params, check_config(config), survey)


def _plan(params: Any, config: MoRAConfig, survey: Survey | None) -> Plan:
    leaves = named_leaves(params)
    arrays = {n: leaf for n, (_, leaf) in leaves.items() if len(leaf.shape) >= 2}
    targets, excluded = _targets(leaves, arrays, config, survey)
    trained = _trained(leaves, targets, config)
    _refuse_idle_overrides(targets, trained, config)
    specs = tuple(_adapter(name, *leaves[name], config, survey) for name in targets)
    if survey is not None:
        _refuse_unproven(targets, survey)
    size = sum(math.prod(leaf.shape) for _, leaf in leaves.values())
    taken = {*targets, *(one.name for one in trained)}
    rest = {name: leaf for name, leaf in arrays.items() if name not in taken}
    left_out = left_out_of(rest, excluded, config, survey)
    if config.targets == DEFAULT_TARGETS:
        warn_of(left_out)
    return Plan(
        specs,
        size,
        traced=survey is not None and survey.uses is not None,
        left_out=left_out,
        unproven=survey.unproven(targets) if survey is not None else (),
        trained=trained,
    )


def _trained(
    leaves: Mapping[str, tuple[Path, Any]], targets: Sequence[str], config: MoRAConfig
) -> tuple[TrainedArray, ...]:
    """The arrays that `config.train` names, in the order of their paths."""
    names = _select("train", config.train, leaves, leaves)
    if both := sorted(names & set(targets)):
        raise ValueError(
            f"train: {both[0]!r} also gets an adapter, and one array cannot do both; "
            f"say exclude={both[0]!r} to train the array itself, or take it out of "
            "train"
        )
    trained = []
    for name in sorted(names, key=lambda name: leaves[name][0]):
        path, leaf = leaves[name]
        if name.endswith(SUFFIX):
            raise ValueError(f"train: {name!r} is an M, which is trained in any case")
        dtype = config.settings(name)[0].param_dtype
        trained.append(TrainedArray.of(path, leaf, dtype))
    _refuse_shared(
        leaves,
        names,
        "the array",
        "a trained copy of the first would not reach the second; take both out of "
        "train, or copy the array",
    )
    return tuple(trained)


def _refuse_idle_overrides(
    targets: Sequence[str], trained: Sequence[TrainedArray], config: MoRAConfig
) -> None:
    """Raise if an override matches nothing, or has settings without an effect."""
    names = [*targets, *(one.name for one in trained)]
    _select("overrides", config.overrides, names, names)
    for pattern, settings in config.overrides.items():
        adapted = any(re.fullmatch(pattern, name) for name in targets)
        if not adapted and (idle := sorted(settings.keys() - {"param_dtype"})):
            raise ValueError(
                f"overrides[{pattern!r}] matches arrays that train themselves alone, "
                f"whose only setting is param_dtype, got {idle}"
            )


def _targets(
    leaves: Mapping[str, tuple[Path, Any]],
    arrays: Mapping[str, Any],
    config: MoRAConfig,
    survey: Survey | None,
) -> tuple[list[str], set[str]]:
    """The paths of the kernels to adapt, in order, and the paths to leave out."""
    kernels = list(arrays)
    if survey is not None:
        no_kernels = survey.no_kernels(arrays)
        kernels = [name for name in arrays if name not in no_kernels]
    if config.targets == DEFAULT_TARGETS:
        targets = _default_targets(arrays, kernels, config, survey)
    else:
        targets = _select("targets", config.targets, kernels, leaves)
    excluded = _select("exclude", config.exclude, leaves, leaves)
    targets = sorted(targets - excluded, key=lambda name: leaves[name][0])
    if not targets:
        raise ValueError("exclude leaves no kernel to adapt")
    _refuse_shared(
        leaves,
        targets,
        "the kernel",
        "an adapter on the first would not reach the second; exclude both, or copy the "
        "kernel",
    )
    return targets, excluded


def _default_targets(
    arrays: Mapping[str, Any],
    kernels: Sequence[str],
    config: MoRAConfig,
    survey: Survey | None,
) -> set[str]:
    """The paths that the default targets choose among those of `kernels`."""
    if survey is None:
        found = {name for name in kernels if re.fullmatch(DEFAULT_TARGETS[0], name)}
    else:
        products, any_name = survey.products, default_targets("[^/]+")
        found = {
            name
            for name in kernels
            if name in products
            and products[name].adapted_by_default
            and not is_too_narrow(products[name], tuple(arrays[name].shape))
            and re.fullmatch(any_name, name)
        }
    if found:
        return found
    why = "no array has two or more axes"
    if arrays and survey is not None:
        why = "; ".join(map(str, left_out_of(arrays, (), config, survey)))
    elif arrays:
        why = (
            "it is arrays that are called 'kernel' and are no head or embedding, got "
            f"{_some(kernels)}; name yours, as in targets='.*/w'"
        )
    raise ValueError(
        "targets: the default matches no path of a kernel that can be adapted: " + why
    )


def _some(names: Sequence[str]) -> str:
    """The first few names, quoted, and how many there are."""
    shown = ", ".join(map(repr, names[:3]))
    return shown + f" and {len(names) - 3} more" * (len(names) > 3)


def _adapter(
    name: str, path: Path, leaf: Any, config: MoRAConfig, survey: Survey | None
) -> AdapterSpec:
    check_kernel(leaf, name)
    settings, override = config.settings(name)
    try:
        axes = override or _axes(name, leaf, survey)
        return AdapterSpec.from_config(
            settings, tuple(leaf.shape), axes, path=path, kernel_dtype=leaf.dtype
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _select(
    field: str, patterns: Any, candidates: Iterable[str], known: Iterable[str]
) -> set[str]:
    """The names that the patterns match; a pattern that matches none is an error."""
    selected: set[str] = set()
    for pattern in patterns:
        regex = re.compile(pattern)
        matched = {name for name in candidates if regex.fullmatch(name)}
        if not matched:
            which = {
                "targets": " of a kernel that can be adapted (two or more axes, in a "
                "layer of which it is known what it computes)",
                "overrides": " that is adapted",
            }
            raise ValueError(
                f"{field}: {pattern!r} matches no path{which.get(field, '')}"
                + pattern_hint(pattern, candidates or known)
            )
        selected |= matched
    return selected


def _axes(name: str, leaf: Any, survey: Survey | None) -> str:
    """A kernel's axes, by what its layer computes or by its name and shape."""
    ndim = len(leaf.shape)
    if survey is not None:
        if name not in survey.products:
            raise ValueError(survey.why_unknown(name))
        axes = survey.products[name].axes
        return "s" * (ndim - len(axes)) + axes
    if ndim == 2:
        return "io"
    for pattern, axes in ATTENTION_AXES:
        if ndim == 3 and re.fullmatch(pattern, name):
            return axes
    raise ValueError(
        f"it is not known which of its axes {tuple(leaf.shape)} are features; plan "
        "with mora_jax.linen.plan or mora_jax.nnx.plan, or say "
        f"overrides={{{name!r}: {{'axes': ...}}}}"
    )


def _refuse_unproven(targets: Sequence[str], survey: Survey) -> None:
    """Raise if the model does something with a kernel that an adapter would miss."""
    uses = survey.uses or Uses()
    faults = {**survey.faults, **uses.faults}
    for name in targets:
        if name not in survey.products:  # an override of axes is taken at its word
            continue
        if name in uses.outside:
            kind, tied = "kernel", ""
            if survey.products[name].needs_trace:
                kind, tied = "embedding", " (a tied head?)"
            by = f", by {uses.outside[name]}" if uses.outside[name] else ""
            raise ValueError(
                f"{name}: the model also reads this {kind} outside of its layer's "
                f"known methods{tied}{by}, where the adapter would have no effect; "
                "exclude it"
            )
        if name in faults:
            raise ValueError(
                f"{name}: {faults[name]}, so that the adapted and the merged "
                "model would differ; exclude it, or teach its class with "
                "mora_jax.register_layer (scale= where a layer scales its kernel)"
            )


def _refuse_shared(
    leaves: Mapping[str, tuple[Path, Any]], chosen: Collection[str], kind: str, why: str
) -> None:
    """Raise if one of the arrays `chosen` is at two paths; `why` ends the message."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, (_, leaf) in leaves.items():
        if not isinstance(leaf, jax.ShapeDtypeStruct):  # those are often reused
            owners[id(leaf)].append(name)
    for names in owners.values():
        if len(names) > 1 and any(name in chosen for name in names):
            raise ValueError(
                f"{kind} at {names[0]!r} is shared with {names[1]!r}: {why}"
            )
