"""Arrays of a model, among which a config chooses those to adapt and those to train."""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax

from mora_jax._common.checks import check_kernel
from mora_jax._common.suggestions import pattern_hint
from mora_jax._common.types import Path
from mora_jax._flax.left_out import is_too_narrow, left_out_of
from mora_jax._flax.survey import Survey
from mora_jax._plan.config import DEFAULT_TARGETS, MoRAConfig, default_targets
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._trace_check import Uses

ATTENTION_AXES = (
    (r"(.*/)?(query|key|value)/kernel", "ioo"),
    (r"(.*/)?out/kernel", "iio"),
)
"""Kernels of three axes in Flax's own attention modules, known by name."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Arrays of a model, among which a config chooses.

    Attributes:
      leaves: {name: (path, array)} of the params, as `named_leaves` gives them.
      config: The settings.
      survey: The layers and the trace of a call; None to go by names and shapes.
    """

    leaves: dict[str, tuple[Path, Any]]
    config: MoRAConfig
    survey: Survey | None

    @property
    def by_default(self) -> bool:
        """True if the user named no targets."""
        return self.config.targets == DEFAULT_TARGETS

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """{name: array} of two or more axes."""
        return {n: leaf for n, (_, leaf) in self.leaves.items() if len(leaf.shape) > 1}

    @functools.cached_property
    def excluded(self) -> set[str]:
        """The names that `config.exclude` matches."""
        return _select("exclude", self.config.exclude, self.leaves)

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
        self._refuse_shared(targets, "exclude both")
        return targets

    def _default_targets(self, kernels: Sequence[str]) -> set[str]:
        """The names that the default targets choose among `kernels`."""
        pattern, dense = DEFAULT_TARGETS[0], kernels
        if self.survey is not None:  # then a layer may call its kernel as it likes
            pattern, products = default_targets("[^/]+"), self.survey.products
            dense = [
                name
                for name in kernels
                if (product := products.get(name)) and product.adapted_by_default
                if not is_too_narrow(product, self.arrays[name].shape)
            ]
        if names := {name for name in dense if re.fullmatch(pattern, name)}:
            return names
        why = "no array has two or more axes"
        if self.arrays and self.survey is not None:
            why = "; ".join(map(str, left_out_of(self, ())))
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

    def adapter(self, name: str) -> AdapterSpec:
        """The adapter of the kernel at `name`, if the model needs nothing beside it."""
        path, leaf = self.leaves[name]
        check_kernel(leaf, name)
        config, axes = self.config.settings(name)
        try:
            axes = axes or self._axes(name, len(leaf.shape))
            spec = AdapterSpec.from_config(
                config, tuple(leaf.shape), axes, path, kernel_dtype=leaf.dtype
            )
            self._refuse_unproven(name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return spec

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

    def _refuse_unproven(self, name: str) -> None:
        # A kernel of an unknown layer has axes by an override, taken at its word.
        if self.survey is None or name not in self.survey.products:
            return
        uses = self.survey.uses or Uses()
        if name in uses.outside:
            table = self.survey.products[name].takes_indices
            kind, tied = ("embedding", " (a tied head?)") if table else ("kernel", "")
            by = f", by {uses.outside[name]}" if uses.outside[name] else ""
            raise ValueError(
                f"the model also reads this {kind} outside of its layer's known methods"
                f"{tied}{by}, where the adapter would have no effect; exclude it"
            )
        if fault := uses.faults.get(name):
            raise ValueError(
                f"{fault}, so that adapted and merged model would differ; exclude it, "
                "or teach its class by register_layer (scale= for a scaled kernel)"
            )

    def trained(self, targets: Sequence[str]) -> tuple[TrainedArray, ...]:
        """The arrays that `config.train` names, in the order of their paths."""
        names = _select("train", self.config.train, self.leaves)
        for name in sorted(names):
            if name in targets:
                raise ValueError(
                    f"train: {name!r} also gets an adapter; say exclude={name!r} to "
                    "train the array itself, or take it out of train"
                )
            if name.endswith(SUFFIX):
                raise ValueError(f"train: {name!r} is an M, which is always trained")
        self._refuse_shared(names, "take both out of train")
        settings = self.config.settings
        return tuple(
            TrainedArray.of(*self.leaves[name], settings(name)[0].param_dtype)
            for name in self._in_order(names)
        )

    def refuse_idle_overrides(
        self, targets: Sequence[str], trained: Sequence[TrainedArray]
    ) -> None:
        """Raise if an override matches nothing, or has settings without an effect."""
        names = [*targets, *(array.name for array in trained)]
        _select("overrides", self.config.overrides, names)
        for pattern, settings in self.config.overrides.items():
            idle = sorted(settings.keys() - {"param_dtype"})
            if idle and not any(re.fullmatch(pattern, name) for name in targets):
                raise ValueError(
                    f"overrides[{pattern!r}] matches arrays that train themselves "
                    f"alone, whose only setting is param_dtype, got {idle}"
                )

    def _in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: self.leaves[name][0])

    def _refuse_shared(self, chosen: Collection[str], remedy: str) -> None:
        """Raise if an array of `chosen` is at two paths, where one would be missed."""
        owners: dict[int, list[str]] = defaultdict(list)
        for name, (_, leaf) in self.leaves.items():
            if not isinstance(leaf, jax.ShapeDtypeStruct):  # shapes are often reused
                owners[id(leaf)].append(name)
        for names in owners.values():
            if len(names) > 1 and not set(names).isdisjoint(chosen):
                raise ValueError(
                    f"the array at {names[0]!r} is shared with {names[1]!r}, which "
                    f"training for the first would miss; {remedy}, or copy the array"
                )


_KINDS = {
    "targets": " of a kernel that can be adapted (two or more axes, in a layer whose "
    "product is known)",
    "overrides": " that is adapted",
}


def _select(
    field: str, patterns: Any, names: Iterable[str], known: Iterable[str] = ()
) -> set[str]:
    """Return the names that the patterns of a setting match; each must match one.

    The names in `known` are for the message, where `names` is empty.
    """
    selected: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            raise ValueError(
                f"{field}: {pattern!r} matches no path{_KINDS.get(field, '')}"
                + pattern_hint(pattern, names or known)
            )
        selected |= matched
    return selected
