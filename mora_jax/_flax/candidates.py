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
from mora_jax._plan.plan import LeftOut
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._trace_check import Uses
from mora_jax.products import Lookup

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

    def left_out(self, taken: Collection[str]) -> tuple[LeftOut, ...]:
        """The arrays that are not `taken`, by kinds, with reasons."""
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
        pattern, dense = DEFAULT_TARGETS[0], kernels
        if self.survey is not None:
            pattern, dense = default_targets("[^/]+"), filter(self._is_dense, kernels)
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

    def _is_dense(self, name: str) -> bool:
        """True for a kernel that is adapted by default, whatever its layer's name."""
        product = self.survey.products.get(name) if self.survey is not None else None
        if product is None or not product.adapted_by_default:
            return False
        return not is_too_narrow(product, tuple(self.arrays[name].shape))

    def adapter(self, name: str) -> AdapterSpec:
        """The adapter of the kernel at `name`.

        Raises:
          TypeError, ValueError: The kernel cannot have it, or the model does something
            with the kernel that an adapter would miss.
        """
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
            kind, tied = "kernel", ""
            if isinstance(self.survey.products[name], Lookup):
                kind, tied = "embedding", " (a tied head?)"
            by = f", by {uses.outside[name]}" if uses.outside[name] else ""
            raise ValueError(
                f"the model also reads this {kind} outside of its layer's known methods"
                f"{tied}{by}, where the adapter would have no effect; exclude it"
            )
        if fault := uses.faults.get(name):
            raise ValueError(
                f"{fault}, so that the adapted and the merged model would differ; "
                "exclude it, or teach its class with mora_jax.register_layer (scale= "
                "where a layer scales its kernel)"
            )

    def trained(self, targets: Sequence[str]) -> tuple[TrainedArray, ...]:
        """The arrays that `config.train` names, in the order of their paths."""
        names = _select("train", self.config.train, self.leaves)
        for name in sorted(names):
            if name in targets:
                raise ValueError(
                    f"train: {name!r} also gets an adapter, and one array cannot do "
                    f"both; say exclude={name!r} to train the array itself, or take it "
                    "out of train"
                )
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
        trained = []
        for name in self._in_order(names):
            dtype = self.config.settings(name)[0].param_dtype
            trained.append(TrainedArray.of(*self.leaves[name], dtype))
        return tuple(trained)

    def refuse_idle_overrides(
        self, targets: Sequence[str], trained: Sequence[TrainedArray]
    ) -> None:
        """Raise if an override matches nothing, or has settings without an effect."""
        names = [*targets, *(array.name for array in trained)]
        _select("overrides", self.config.overrides, names)
        for pattern, settings in self.config.overrides.items():
            adapted = any(re.fullmatch(pattern, name) for name in targets)
            if not adapted and (idle := sorted(settings.keys() - {"param_dtype"})):
                raise ValueError(
                    f"overrides[{pattern!r}] matches arrays that train themselves "
                    f"alone, whose only setting is param_dtype, got {idle}"
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
    field: str, patterns: Any, names: Iterable[str], known: Iterable[str] = ()
) -> set[str]:
    """Return the names that the patterns match; each pattern must match one.

    Args:
      field: The setting that holds the patterns.
      patterns: The patterns.
      names: The names to choose from.
      known: Other names, for the message if there are none to choose from.
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
