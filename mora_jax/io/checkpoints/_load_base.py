"""A base checkpoint as the params of a Flax model, read tensor by tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common.checks import check_dtype, check_floating
from mora_jax._common.messages import nearest_paths
from mora_jax._common.trees import located_leaves, refuse_variables, replace_leaves
from mora_jax._common.types import Shape
from mora_jax.io._files import AdapterFileError, PathLike
from mora_jax.io._names import Names
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Leaf, Part, Source


def load_base(
    path: PathLike,
    like: Any,
    names: Names = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Any = None,
    skip: str | Sequence[str] = (),
) -> Any:
    """Read the params of a Flax model from a checkpoint as PyTorch's models have it.

    Each leaf of `like` gets its tensor in the leaf's layout: a kernel (in, out) is a
    weight (out, in) transposed, with heads split and layers stacked as in `like`.
    Beside the result, the host holds three leaves at most, or a device's parts of them.

    Args:
      path: A safetensors file, or a directory of them with or without an index; a path
        or a URL that `etils.epath` opens.
      like: The model's params as a tree of arrays or shapes: Linen's
        `jax.eval_shape(model.init, ...)["params"]`, or `nnx.state(model, nnx.Param)`.
      names: As in `load_peft`. A kernel's template also serves its bias, and one
        may name a tensor, as `{"out.bias": "out_bias"}` does. A leaf that is named as
        its tensor needs none.
      dtype: The dtype of the result, or "like" for the dtype of each leaf of `like`.
        None demands that the file has the dtypes of `like`.
      sharding: A sharding for all leaves, or a tree of them with the paths of `like`.
        None asks the leaves of `like`, and others come to the default device.
      skip: Regular expressions for whole names of tensors that `like` need not have.

    Returns:
      A tree like `like`, of `jax.Array`. Boxes and variables stay.

    Raises:
      AdapterFileError: The files are damaged, a leaf lacks a tensor, a tensor lacks a
        leaf, or a shape or a dtype does not fit. No tensor is read before.
      TypeError: `like` is a model or holds tracers, `skip` is of a wrong type, or a
        transformation of JAX is under way.
      ValueError: `names` are unknown, `skip` matches nothing, or shardings do not fit.

    Example::

      >>> import jax, numpy as np, safetensors.numpy, tempfile, mora_jax
      >>> file = tempfile.mkdtemp() + "/model.safetensors"
      >>> weight = np.ones((3, 2), np.float32)
      >>> safetensors.numpy.save_file({"fc.weight": weight}, file)
      >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
      >>> jax.tree.map(np.shape, mora_jax.io.load_base(file, like))
      {'fc': {'kernel': (2, 3)}}
    """
    if any(isinstance(a, Tracer) for a in (jnp.zeros(()), *jax.tree.leaves(like))):
        rule = "load_base must be called outside of jit, grad and eval_shape"
        raise TypeError(f"{rule}, since it reads files; give it the shapes as like")
    refuse_variables(like, "like")
    places = located_leaves(like, "like")
    # Linen's `unbox` would add constraints.
    arrays = {"/".join(p): jax.tree.leaves(leaf)[0] for p, leaf in places.items()}
    for name, array in arrays.items():
        check_floating(array, f"{name!r} in like")
    shardings = _shardings(sharding, arrays)
    source = Source(Checkpoint(path), names)
    stacks = {n: source.stack(n, tuple(a.shape)) for n, a in arrays.items()}
    source.check_missing()
    source.check_left(arrays, skip)
    leaves = {}
    for place, (name, array) in zip(places, arrays.items(), strict=True):
        wanted = _dtype(name, array.dtype, dtype, stacks[name])
        leaves[place] = Leaf(tuple(array.shape), wanted, shardings[name], stacks[name])
    return replace_leaves(like, {place: leaf.read() for place, leaf in leaves.items()})


def _dtype(name: str, own: Any, asked: Any, stack: Mapping[Shape, Part]) -> np.dtype:
    """The dtype of a leaf's result, where `own` is its dtype in `like`."""
    by_leaf = asked is None or isinstance(asked, str) and asked == "like"
    dtype = check_dtype(f"dtype of {name!r}", own if by_leaf else asked)
    for part in stack.values():
        stored = part.file.dtype(part.name)
        if stored != dtype and asked is None:
            base = f"{part.name!r} in the base is {stored}"
            remedy = f"dtype='like' or dtype='{stored}' converts"
            raise AdapterFileError(f"{base}, and {name!r} in like is {dtype}: {remedy}")
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        rule = "set jax_enable_x64, or give another dtype"
        raise AdapterFileError(f"{name!r} would be float64: {rule}")
    return dtype


def _shardings(sharding: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The sharding of each leaf, by which it can be placed, or None."""
    if sharding is None:
        # JAX has chosen the sharding of an array that is not committed.
        own = {n: a for n, a in arrays.items() if getattr(a, "committed", True)}
        given = {name: getattr(own.get(name), "sharding", None) for name in arrays}
    elif jax.tree_util.treedef_is_leaf(jax.tree.structure(sharding)):
        given = dict.fromkeys(arrays, sharding)
    else:
        places = located_leaves(sharding, "sharding")
        given = {"/".join(p): jax.tree.leaves(leaf)[0] for p, leaf in places.items()}
    for name, array in arrays.items():
        if name not in given:
            raise ValueError(f"sharding lacks {name!r}{nearest_paths(name, given)}")
        one, shape = given[name], tuple(array.shape)
        try:
            if one is not None:
                one.addressable_devices_indices_map(shape)
                one.shard_shape(shape)
        except Exception as error:  # some of JAX's errors are not ValueErrors
            rule = f"sharding must split {name!r}, of shape {shape}, evenly over"
            hint = "devices, as NamedSharding(mesh, spec) does"
            got = f"got {one!r}; a tree may have one for each leaf: {error}"
            raise ValueError(f"{rule} {hint}, {got}") from error
    return given
