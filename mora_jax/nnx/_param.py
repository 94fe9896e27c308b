"""M as a variable of a module, and an array of the base that trains itself."""

import dataclasses
from typing import Any

from flax import nnx

from mora_jax._layer.slots import Selected
from mora_jax._plan.spec import AdapterSpec, check_same
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._tree.paths import unboxed


class MoRAParam(nnx.LoRAParam[Any]):
    """The square matrix M of one kernel; its metadata `spec` says how it is adapted.

    It is a subclass of `nnx.LoRAParam`, so that code that filters adapters by this type
    works as it is. Where Flax copies a whole variable (`nnx.update`, `nnx.merge`,
    `copy_from`), it copies the spec with the numbers, and they keep their meaning.
    Assigning a variable that has another spec raises an error.
    """

    spec: AdapterSpec

    @classmethod
    def of(cls, spec: AdapterSpec, m: Any) -> "MoRAParam":
        """M with its spec, without the path, so that equal layers can be stacked."""
        return cls(m, spec=dataclasses.replace(spec, path=spec.path[-1:]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check(value)
        super().__setitem__(key, value)

    def set_value(self, value: Any, **kwargs: Any) -> None:
        self._check(value)
        super().set_value(value, **kwargs)

    def _check(self, value: Any) -> None:
        if isinstance(value, MoRAParam):
            check_same(value.spec, self.spec)


class TrainedParam(MoRAParam):
    """Array of the base that trains itself, instead of the base's variable.

    It is a subclass of `MoRAParam`, so that what trains, saves or counts adapters by
    that type does so with it too. It has the metadata of the base's variable, with a
    `spec` that says which dtype the base has, and the base's type as `base_type`.
    """

    spec: TrainedArray  # type: ignore[assignment]

    @classmethod
    def in_place_of(
        cls, variable: nnx.Variable[Any], spec: TrainedArray, copy: Any
    ) -> "TrainedParam":
        """The trained copy of what `variable` holds."""
        spec = dataclasses.replace(spec, path=spec.path[-1:])
        own = {"spec": spec, "base_type": type(variable)}
        return cls.from_metadata(copy, {**variable.get_metadata(), **own})  # type: ignore[return-value]

    def plain(self) -> nnx.Variable[Any]:
        """A variable as the base has it, with the trained numbers rounded."""
        metadata = dict(self.get_metadata())
        spec, base_type = metadata.pop("spec"), metadata.pop("base_type")
        return base_type.from_metadata(self[...].astype(spec.base_dtype), metadata)

    def _check(self, value: Any) -> None:
        if isinstance(value, MoRAParam) and value.spec != self.spec:
            raise ValueError(
                f"{self.spec.name} is trained as {self.spec}, got a variable of "
                f"{value.spec}"
            )


def value_of(m: MoRAParam) -> Any:
    """The numbers of an M; or the slots of many, as `serving.select` puts them."""
    held = unboxed(m)
    return held if isinstance(held, Selected) else m[...]


def is_m(value: Any) -> bool:
    """True if `value` is the variable of an M, and not of an array that trains."""
    return isinstance(value, MoRAParam) and not isinstance(value, TrainedParam)
