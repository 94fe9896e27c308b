"""Arrays of a model that train themselves, beside the M's."""

import functools
from typing import Any

from flax import nnx

from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax.nnx._folded import on_copies
from mora_jax.nnx._param import TrainedParam


def train_array(module: nnx.Module, trained: TrainedArray, copy: Any) -> None:
    """Put the trained copy of an array into `module`, in place of the base's."""
    name = trained.path[-1]
    setattr(
        module, name, TrainedParam.in_place_of(getattr(module, name), trained, copy)
    )
    if trained.dtype != trained.base_dtype:
        object.__setattr__(module, "__class__", _rounding_class(type(module)))


def restore_array(module: nnx.Module, name: str) -> None:
    """Put a plain variable in place of a trained one, with its numbers."""
    setattr(module, name, _plain(getattr(module, name)))


@functools.cache  # nnx.jit would compile a program for each of several classes
def _rounding_class(cls: type) -> type:
    """A subclass of `cls` whose methods see trained arrays in the base's dtype.

    The dtype of what a layer computes often follows from its parameters. So a float32
    copy in a bfloat16 model would make all that comes after it float32.
    """
    plain = getattr(cls, "plain_class", cls)
    return on_copies(cls, _rounded, plain)


def _rounded(module: nnx.Module) -> dict[str, Any]:
    return {
        name: _plain(value) if isinstance(value, TrainedParam) else value
        for name, value in vars(module).items()
    }


def _plain(variable: Any) -> nnx.Variable[Any]:
    """A variable as the base has it, with the rounded numbers of a trained one."""
    metadata = dict(variable.get_metadata())
    spec, plain = metadata.pop("spec"), metadata.pop("plain")
    return plain.from_metadata(variable[...].astype(spec.base_dtype), metadata)
