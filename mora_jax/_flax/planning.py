"""Choice of the kernels that get an adapter, and of the adapter for each of them."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax

from mora_jax._common.checks import check_kernel
from mora_jax._common.suggestions import pattern_hint
from mora_jax._common.types import Path
from mora_jax._flax.left_out import is_too_narrow, left_out_of, warn_of
from mora_jax._flax.survey import Survey
from mora_jax._plan.config import (
    DEFAULT_TARGETS,
    MoRAConfig,
    check_config,
    default_targets,
)
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._trace_check import Uses
from mora_jax._tree.paths import named_leaves, refuse_variables
from mora_jax.products import Lookup

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
      config: The settings; None for the defaults.

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
    return plan_surveyed(params_or_shapes, config)


def plan_surveyed(
    params: Any, config: MoRAConfig | None, survey: Survey | None = None
) -> Plan:
    """`plan` for a model whose layers are known.

    Args:
      params: The model's params or their shapes, as in `plan`.
      config: The settings, whose default targets are the dense layers.
      survey: The layers, and the trace of a call; None to go by names and shapes.
    """
    model = _Model(named_leaves(params), check_config(config), survey)
    targets = model.targets()
    trained = model.trained(targets)
    model.refuse_idle_overrides(targets, trained)
    specs = tuple(map(model.adapter, targets))
    if survey is not None:
        _refuse_unproven(targets, survey)
    left_out = model.left_out({*targets, *(array.name for array in trained)})
    if model.by_default:
        warn_of(left_out)
    return Plan(
        specs,
        base_parameters=sum(math.prod(a.shape) for _, a in model.leaves.values()),
        traced=survey is not None and survey.uses is not None,
        left_out=left_out,
        unproven=survey.unproven(targets) if survey is not None else (),
        trained=trained,
    )


@dataclasses.dataclass(frozen=True)
class _Model:
    """Arrays of a model, and what is asked of them and known of them."""

    leaves: dict[str, tuple[Path, Any]]
    config: MoRAConfig
    survey: Survey | None

    @property
    def by_default(self) -> bool:
        return self.config.targets == DEFAULT_TARGETS

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """{name: array} of two or more axes."""
        return {n: leaf for n, (_, leaf) in self.leaves.items() if len(leaf.shape) > 1}

    @functools.cached_property
    def excluded(self) -> set[str]:
        return _select("exclude", self.config.exclude, self.leaves, self.leaves)

    def left_out(self, taken: Collection[str]) -> Any:
        arrays = {n: leaf for n, leaf in self.arrays.items() if n not in taken}
        return left_out_of(arrays, self.excluded, self.config, self.survey)

    def targets(self) -> list[str]:
        """The names of the kernels to adapt, in the order of their paths."""
        known = self.survey.no_kernels(self.arrays) if self.survey is not None else ()
        kernels = [name for name in self.arrays if name not in known]
        if self.by_default:
            names = self._default_targets(kernels)
        else:
            names = _select("targets", self.config.targets, kernels, self.leaves)
        targets = self._in_order(names - self.excluded)
        if not targets:
            raise ValueError("exclude leaves no kernel to adapt")
        self._refuse_shared(
            targets,
            "the kernel",
            "an adapter on the first would not reach the second; exclude both, or copy "
            "the kernel",
        )
        return targets

    def _default_targets(self, kernels: Sequence[str]) -> set[str]:
        """The names that the default targets choose among `kernels`."""
        if self.survey is None:
            pattern, dense = DEFAULT_TARGETS[0], set(kernels)
        else:
            pattern = default_targets("[^/]+")
            products = self.survey.products
            dense = {
                name
                for name in kernels
                if name in products
                and products[name].adapted_by_default
                and not is_too_narrow(products[name], tuple(self.arrays[name].shape))
            }
        if names := {name for name in dense if re.fullmatch(pattern, name)}:
            return names
        why = "no array has two or more axes"
        if self.arrays and self.survey is not None:
            why = "; ".join(map(str, self.left_out(())))
        elif self.arrays:
            some = ", ".join(map(repr, kernels[:3]))
            some += f" and {len(kernels) - 3} more" * (len(kernels) > 3)
            why = (
                "it is arrays that are called 'kernel' and are no head or embedding, "
                f"got {some}; name yours, as in targets='.*/w'"
            )
        raise ValueError(
            "targets: the default matches no path of a kernel that can be adapted: "
            + why
        )

    def trained(self, targets: Sequence[str]) -> tuple[TrainedArray, ...]:
        """The arrays that `config.train` names, in the order of their paths."""
        names = _select("train", self.config.train, self.leaves, self.leaves)
        if both := sorted(names & set(targets)):
            raise ValueError(
                f"train: {both[0]!r} also gets an adapter, and one array cannot do "
                f"both; say exclude={both[0]!r} to train the array itself, or take it "
                "out of train"
            )
        for name in names:
            if name.endswith(SUFFIX):
                raise ValueError(
                    f"train: {name!r} is an M, which is trained in any case"
                )
        self._refuse_shared(
            names,
            "the array",
            "a trained copy of the first would not reach the second; take both out of "
            "train, or copy the array",
        )
        return tuple(
            TrainedArray.of(
                *self.leaves[name], self.config.settings(name)[0].param_dtype
            )
            for name in self._in_order(names)
        )

    def refuse_idle_overrides(
        self, targets: Sequence[str], trained: Sequence[TrainedArray]
    ) -> None:
        """Raise if an override matches nothing, or has settings without an effect."""
        names = [*targets, *(array.name for array in trained)]
        _select("overrides", self.config.overrides, names, names)
        for pattern, settings in self.config.overrides.items():
            adapted = any(re.fullmatch(pattern, name) for name in targets)
            if not adapted and (idle := sorted(settings.keys() - {"param_dtype"})):
                raise ValueError(
                    f"overrides[{pattern!r}] matches arrays that train themselves "
                    f"alone, whose only setting is param_dtype, got {idle}"
                )

    def adapter(self, name: str) -> AdapterSpec:
        """The adapter of the kernel at `name`."""
        path, leaf = self.leaves[name]
        check_kernel(leaf, name)
        config, axes = self.config.settings(name)
        try:
            return AdapterSpec.from_config(
                config,
                tuple(leaf.shape),
                axes or self._axes(name, len(leaf.shape)),
                path,
                kernel_dtype=leaf.dtype,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _axes(self, name: str, ndim: int) -> str:
        """The axes of a kernel, by its layer's product or by its name and shape."""
        if self.survey is not None:
            if name not in self.survey.products:
                raise ValueError(self.survey.why_unknown(name))
            axes = self.survey.products[name].axes
            return "s" * (ndim - len(axes)) + axes
        if ndim == 2:
            return "io"
        for pattern, axes in ATTENTION_AXES:
            if ndim == 3 and re.fullmatch(pattern, name):
                return axes
        raise ValueError(
            f"it is not known which of its axes {tuple(self.arrays[name].shape)} are "
            "features; plan with mora_jax.linen.plan or mora_jax.nnx.plan, or say "
            f"overrides={{{name!r}: {{'axes': ...}}}}"
        )

    def _in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: self.leaves[name][0])

    def _refuse_shared(self, chosen: Collection[str], kind: str, why: str) -> None:
        """Raise if an array of `chosen` is at two paths; `why` ends the message."""
        owners: dict[int, list[str]] = defaultdict(list)
        for name, (_, leaf) in self.leaves.items():
            if not isinstance(leaf, jax.ShapeDtypeStruct):  # shapes are often reused
                owners[id(leaf)].append(name)
        for names in owners.values():
            if len(names) > 1 and not set(names).isdisjoint(chosen):
                raise ValueError(
                    f"{kind} at {names[0]!r} is shared with {names[1]!r}: {why}"
                )


_KINDS = {
    "targets": " of a kernel that can be adapted (two or more axes, in a layer whose "
    "product is known)",
    "overrides": " that is adapted",
}


def _select(
    field: str, patterns: Any, candidates: Iterable[str], known: Iterable[str]
) -> set[str]:
    """The names that the patterns match; a pattern that matches none is an error."""
    selected: set[str] = set()
    for pattern in patterns:
        matched = {name for name in candidates if re.fullmatch(pattern, name)}
        if not matched:
            raise ValueError(
                f"{field}: {pattern!r} matches no path{_KINDS.get(field, '')}"
                + pattern_hint(pattern, candidates or known)
            )
        selected |= matched
    return selected


def _refuse_unproven(targets: Sequence[str], survey: Survey) -> None:
    """Raise if the model does something with a kernel that an adapter would miss."""
    uses = survey.uses or Uses()
    faults = {**survey.faults, **uses.faults}
    for name in targets:
        if name not in survey.products:  # an override of axes is taken at its word
            continue
        if name in uses.outside:
            kind, tied = "kernel", ""
            if isinstance(survey.products[name], Lookup):
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
