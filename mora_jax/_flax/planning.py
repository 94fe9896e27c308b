"""A plan: the choice of kernels to adapt, and of the adapter for each of them."""

import dataclasses
import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.axes import axes_by_name, features, interleaved
from mora_jax._common.checks import check_kernel
from mora_jax._common.messages import LeftOutWarning, alike, matching, patterns, warn
from mora_jax._common.trees import refuse_variables
from mora_jax._common.types import Path
from mora_jax._flax.calls import errors_of
from mora_jax._flax.survey import DROPPED, NOT_USED, Survey
from mora_jax._layer.ways import check_product
from mora_jax._plan import settings
from mora_jax._plan.budget import balanced
from mora_jax._plan.spec import SUFFIX, AdapterSpec, TrainedArray
from mora_jax._tree.paths import named_leaves
from mora_jax._tree.plan import LeftOut, Plan
from mora_jax.operators import BlockDiagonal

IF_NAMED = "targets adapt it if they name it, train all of it"


def plan(params_or_shapes: Any, config: settings.MoRAConfig | None = None) -> Plan:
    """Choose the kernels to adapt, and an operator and square rank for each.

    The plan goes by names and shapes alone: a kernel of two axes is (in, out), one of
    GPT-2's names as the shape of its c_attn tells, and Flax's attention kernels of
    three axes are known by name. `linen.plan` and `nnx.plan` ask the model itself.

    Args:
      params_or_shapes: The model's params, any pytree of arrays, or its
        `jax.eval_shape`. Paths are the slash-joined keys.
      config: The settings; None for the defaults.

    Raises:
      TypeError: A leaf is not an array, or one to adapt or train not floating-point.
      ValueError: A pattern matches nothing, a kernel's axes are not known, a rank does
        not fit, or an array is at two paths, or is to be both adapted and trained.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
      >>> print(mora_jax.plan(params, mora_jax.MoRAConfig(rank=2)))
      path       in -> out  operator          r           q  scale  parameters  of base
      fc/kernel   64 -> 64  block_diagonal  2.0  16 x 4 x 4      8         256    6.15%
      1 adapter: 256 trainable parameters, 6.15% of 4,160; LoRAs of the same rank have
      256
    """
    config = settings.check_config(config, "plan(params, config)")
    refuse_variables(params_or_shapes)
    return plan_surveyed(params_or_shapes, config, Survey(by_names=True))


def plan_surveyed(params: Any, config: settings.MoRAConfig, survey: Survey) -> Plan:
    """`plan` for a model that is known by a survey."""
    leaves = dict(sorted(named_leaves(params).items(), key=lambda item: item[1][0]))
    model = Candidates(leaves, config, survey)
    targets = model.targets()
    trained = model.trained(targets)
    adapted = sorted({*targets, *trained})
    matching("overrides", config.overrides, adapted, "path that is adapted")
    for pattern, own in config.overrides.items():
        extra = sorted(own.keys() - {"param_dtype"})
        if extra and not any(re.fullmatch(pattern, name) for name in targets):
            what = f"overrides[{pattern!r}] matches arrays that train themselves alone"
            raise ValueError(f"{what}, whose only setting is param_dtype, got {extra}")
    owners: dict[int, list[str]] = defaultdict(list)
    for name, (_, leaf) in leaves.items():
        if not isinstance(leaf, jax.ShapeDtypeStruct):  # shapes are often reused
            owners[id(leaf)].append(name)
    refuse_shared([*owners.values(), *survey.shared], adapted)
    parts = model.adapters(targets) | trained
    left_out = model.left_out(parts)
    surprising = [str(kind) for kind in left_out if model.surprises(kind)]
    if surprising:
        known = survey.traced or survey.by_names
        multiply = "multiply" if known else "may multiply"
        warn(
            f"arrays that {multiply} inputs get no adapter: {'; '.join(surprising)}. "
            "Name them in exclude if that is meant",
            LeftOutWarning,
        )
    unproven = () if survey.by_names else survey.unproven(targets)
    without_effect = [name for name, why in unproven if why == NOT_USED]
    if without_effect:
        names = patterns(without_effect)
        warn(f"adapters without an effect: {names}: {NOT_USED}; exclude them")
    not_used = [name for name in trained if survey.not_used(name)]
    if not_used:
        names = patterns(not_used)
        warn(f"train: {names}: {NOT_USED}, so training does not change them")
    return Plan(
        {leaves[name][0]: spec for name, spec in parts.items()},
        base_parameters=sum(math.prod(a.shape) for _, a in leaves.values()),
        traced=survey.traced,
        left_out=left_out,
        unproven=unproven,
    )


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Arrays of a model, as `named_leaves`, and what decides which are adapted."""

    leaves: dict[str, tuple[Path, Any]]
    config: settings.MoRAConfig
    survey: Survey

    @property
    def by_default(self) -> bool:
        """True if the user named no targets."""
        return self.config.targets == settings.DEFAULT_TARGETS

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """{name: array} of two or more axes."""
        return {n: leaf for n, (_, leaf) in self.leaves.items() if len(leaf.shape) > 1}

    @functools.cached_property
    def excluded(self) -> set[str]:
        return matching("exclude", self.config.exclude, self.leaves)

    def targets(self) -> list[str]:
        """The names of the kernels to adapt."""
        kernels = [name for name in self.arrays if not self.survey.no_kernel(name)]
        if self.by_default:
            names = {name for name in kernels if self._is_default(name)}
            names = {name for name in names if not self.survey.not_used(name)}
        else:
            kind = "path of a kernel that can be adapted (two or more axes, in a layer "
            kind += "whose product is known, in NNX held by an nnx.Param)"
            names = matching("targets", self.config.targets, kernels, kind, self.leaves)
            self._refuse_not_used(names)
        if not names:
            why = "no array has two or more axes"
            if not self.survey.by_names and (left_out := self.left_out(())):
                why = "; ".join(map(str, left_out))
            elif self.arrays:
                named = "arrays that are called 'kernel' and are no head or embedding"
                remedy = "name yours, as in targets='.*/w'"
                why = f"it is {named}, got {patterns(kernels)!r}; {remedy}"
            told = "targets: the default matches no path of a kernel that can be "
            raise ValueError(f"{told}adapted: {why}")
        names -= self.excluded
        names = {name for name in names if not self.survey.not_used(name)}
        if not names:
            raise ValueError("exclude leaves no kernel to adapt")
        return [name for name in kernels if name in names]

    def _refuse_not_used(self, kernels: Collection[str]) -> None:
        """Raise if one of `targets` matches only kernels that no traced call uses."""
        for pattern in self.config.targets:
            named = [name for name in kernels if re.fullmatch(pattern, name)]
            named = [name for name in named if name not in self.excluded]
            if named and all(map(self.survey.not_used, named)):
                raise ValueError(
                    f"targets: {pattern!r} must match a kernel that is used, got only "
                    f"{patterns(named)!r}: {NOT_USED}; plan with inputs for which its "
                    "layer runs, or take the pattern out"
                )

    def _is_default(self, name: str) -> bool:
        if self.survey.by_names:
            return re.fullmatch(settings.DEFAULT_TARGETS[0], name) is not None
        # The layers tell which arrays are kernels, whatever they are called.
        product = self.survey.products.get(name)
        by_default = product is not None and product.adapted_by_default
        return by_default and not self._why_no_default(name)

    def _why_no_default(self, name: str) -> str:
        """The reason why the default leaves a dense layer's kernel out, or ""."""
        if new := re.fullmatch(settings.NEW_HEAD, name, re.IGNORECASE):
            return f"a new head by its name; train='{new[1]}/.*' trains all of it"
        widths = features(self.arrays[name].shape, self._axes(name))
        if 1 in widths:
            # As is a head of one number: M would be wider than it, or one number too.
            return "too narrow for a square; targets and operator may name it"
        # What a head does before its last layer is between equal widths.
        head = re.fullmatch(settings.HEAD, name, re.IGNORECASE)
        if head and ("/" not in head.groups()[-1] or widths[0] != widths[1]):
            return f"a head or router by its name; {IF_NAMED}"
        return DROPPED if name in self.survey.ran - self.survey.uses.reached else ""

    def adapters(self, names: Iterable[str]) -> dict[str, AdapterSpec]:
        """The adapters of kernels, whose blocks share the budget of all."""
        found: dict[str, AdapterSpec] = {}
        shared: dict[str, AdapterSpec] = {}
        for name in names:
            config, axes = self.config.settings(name)
            found[name] = spec = self._adapter(name, config, axes)
            # The number of blocks follows from the rank alone, and may be another one.
            is_free = spec.rank is not None and config.multiple_of is None
            if isinstance(spec.operator, BlockDiagonal) and is_free:
                shared[name] = spec
        return found | balanced(shared)

    def _adapter(
        self, name: str, config: settings.KernelConfig, axes: str | None
    ) -> AdapterSpec:
        """The adapter of the kernel at `name`, if the model needs nothing beside it."""
        leaf, product = self.arrays[name], self.survey.products.get(name)
        check_kernel(leaf, name)
        with errors_of(name):
            axes = self._axes(name) if axes is None else axes
            own = config, tuple(leaf.shape), axes
            spec = AdapterSpec.from_config(*own, kernel_dtype=leaf.dtype, name=name)
            # An unknown layer's kernel has axes by an override, taken at its word.
            if product is not None:
                check_product(spec, product)
                if fault := self.survey.fault(name):
                    raise ValueError(fault)
        is_table = product is not None and product.takes_indices
        if is_table and not spec.operator.linear and spec.init == "zeros":
            spec = dataclasses.replace(spec, init="embedding")
        return spec

    def _axes(self, name: str) -> str:
        """The axes of a kernel, by its layer's product or by its name and shape."""
        if self.survey.by_names:
            return axes_by_name(name, self.arrays)
        if name not in self.survey.products:
            raise ValueError(self.survey.why_unknown(name))
        axes = self.survey.products[name].axes
        more = len(self.arrays[name].shape) - len(axes)
        (places, *_) = self.survey.places.get(name, [range(more)])
        return "".join(interleaved("s" * more, axes, places))

    def trained(self, targets: Sequence[str]) -> dict[str, TrainedArray]:
        names, found = matching("train", self.config.train, self.leaves), {}
        for name in filter(names.__contains__, self.leaves):
            if name in targets:
                both = f"train: {name!r} also gets an adapter"
                remedy = f"say exclude={name!r} to train the array itself"
                raise ValueError(f"{both}; {remedy}, or take it out of train")
            if name.endswith(SUFFIX):
                raise ValueError(f"train: {name!r} is an M, which is always trained")
            dtype = self.config.settings(name)[0].param_dtype
            found[name] = TrainedArray.of(name, self.leaves[name][1], dtype)
        return found

    def left_out(self, taken: Collection[str]) -> tuple[LeftOut, ...]:
        """The kinds of the arrays of two or more axes that are not `taken`."""
        survey, names = self.survey, [n for n in self.arrays if n not in taken]
        # Of a layer that did not run the kernel alone is of interest.
        ran = survey.uses.reached if survey.traced else self.arrays
        names = [name for name in names if name in ran or not name.endswith("bias")]
        reasons = [(name, *self._why_left_out(name)) for name in names]
        held = survey.no_params.items()
        reasons += [(n, f"held by a {cls}, not an nnx.Param", False) for n, cls in held]
        kinds = alike(reasons, lambda reason: reason)
        return tuple(LeftOut(paths, len(kind), *kind[0][1:]) for paths, kind in kinds)

    def _why_left_out(self, name: str) -> tuple[str, bool]:
        """The reason why an array gets no adapter, and if it multiplies inputs."""
        survey, product = self.survey, self.survey.products.get(name)
        named = self.by_default
        named |= any(re.fullmatch(pattern, name) for pattern in self.config.targets)
        if name in self.excluded:
            return "excluded", False
        if name.rpartition("/")[0] in self._quantized:
            return "quantized; see mora_jax.qwix", True
        if survey.by_names or not named:
            return "no target", False
        if self._left_idle(name):
            return survey.why_unknown(name), True
        if product and product.adapted_by_default:
            return self._why_no_default(name), False
        if product:
            return f"{product.label or 'left out by its rule'}; {IF_NAMED}", False
        if sum(size > 1 for size in self.arrays[name].shape) < 2:
            return "a vector, such as a token or a row of scales", False
        if survey.no_kernel(name):
            return "not multiplied with an input as it is", False
        return survey.why_unknown(name), True

    def _left_idle(self, name: str) -> bool:
        """True for a target that is left out since no traced call uses it."""
        if not self.survey.not_used(name) or self.survey.no_kernel(name):
            return False
        return not self.by_default or self._is_default(name)

    def surprises(self, kind: LeftOut) -> bool:
        """True if the user may not know that arrays of this kind are left out."""
        # Whoever named targets means them all, also those that no call used.
        named = self.by_default or kind.why.startswith(NOT_USED)
        return kind.multiplied and named

    @functools.cached_property
    def _quantized(self) -> set[str]:
        # The paths above integers: a quantized kernel's scales are beside its numbers.
        arrays = self.arrays.items()
        integers = [n for n, a in arrays if jnp.issubdtype(a.dtype, jnp.integer)]
        return {name.rpartition("/")[0] for name in integers}


def refuse_shared(shared: Iterable[Sequence[str]], arrays: Collection[str]) -> None:
    """Raise if one of `arrays` is, or is inside, what is at several paths."""
    # A step trains the copy at one path, and the model goes on to use the other one.
    several = [names for names in shared if len(names) > 1]
    for names, array in itertools.product(several, arrays):
        if any(f"{array}/".startswith(f"{name}/") for name in names):
            both = f"the model holds {names[0]!r} also as {names[1]!r}"
            remedy = "exclude it, take it out of train, or copy it"
            raise ValueError(f"{array} is shared: {both}; {remedy}")
