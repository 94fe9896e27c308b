"""A base checkpoint as the params of a Flax model, read tensor by tensor."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Sharding
from jax.typing import DTypeLike

from mora_jax._common.checks import floating_dtype
from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Shape
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.paths import (
    is_boxed,
    located_leaves,
    refuse_variables,
    replace_leaves,
)
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._names import Names, Tensor
from mora_jax.io._tensors import TensorFile
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._leaf import Leaf
from mora_jax.io.checkpoints._matching import find_tensors


def load_base(
    path: str | os.PathLike[str],
    like: Any,
    names: Names = None,
    *,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    skip: str | Sequence[str] = (),
) -> Any:
    """Read the params of a Flax model from a checkpoint as PyTorch's models have it.

    Each leaf of `like` gets its tensor, found by name, in the leaf's layout: a kernel
    (in, out) is a weight (out, in) transposed, the axes of heads are split if the leaf
    has them, and layers are stacked if the leaf is. Beside the result, memory of the
    host holds three leaves at most; on a mesh, one device's parts of them.

    Args:
      path: A safetensors file, or a directory of them with or without an index; a path
        or a URL that `etils.epath` opens.
      like: The params of the model, as a tree of arrays or shapes: such as
        `jax.eval_shape(model.init, ...)["params"]` of a Linen model, or
        `nnx.state(model, nnx.Param)` of an NNX model, which may be abstract.
      names: The modules of PyTorch that are the leaves. A family ("llama", "gemma",
        "qwen", "gpt2" or "bert", with or without a version as in "qwen3") for models
        with the names of transformers' Flax models; "tunix" for Tunix's Qwen2, Qwen3,
        Llama3 and Gemma, "gm" for Google's gemma; otherwise templates as in
        `load_peft_mora`, such as
        `{"model.layers.{n}.{norm}": "layers/{norm}/scale[{n}]"}` for a stacked leaf.
        A kernel's template also serves its bias, and a template may name a
        tensor, as `{"out.bias": "out_bias"}` does. A leaf that is named as its tensor
        needs none. None tries all families.
      dtype: The dtype of the result, or "like" for the dtype of each leaf of `like`.
        None demands that the file has the dtypes of `like`.
      sharding: The place of the result: a sharding for all leaves, or a tree of them
        with the paths of `like`. None asks the leaves of `like`; leaves without a
        sharding come to the default device.
      skip: Regular expressions for whole names of tensors that `like` need not have.

    Returns:
      A tree like `like`, of `jax.Array`. Boxes and variables stay.

    Raises:
      AdapterFileError: The files are damaged, a leaf lacks a tensor, a tensor lacks a
        leaf, or a shape or a dtype does not fit. Names, shapes and dtypes are compared
        before any tensor is read.
      TypeError: `like` is a model or holds tracers, `sharding` holds something other
        than shardings, `skip` is not a text, or a transformation of JAX is under way.
      ValueError: `like` has adapters, `names` are unknown, `skip` matches nothing, or a
        leaf cannot be split as its sharding says.

    Example::

      >>> import jax, numpy as np, safetensors.numpy, tempfile, mora_jax
      >>> file = tempfile.mkdtemp() + "/model.safetensors"
      >>> weight = np.ones((3, 2), np.float32)
      >>> safetensors.numpy.save_file({"fc.weight": weight}, file)
      >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
      >>> jax.tree.map(np.shape, mora_jax.io.load_base(file, like))
      {'fc': {'kernel': (2, 3)}}
    """
    if isinstance(jnp.zeros(()), Tracer):
        raise TypeError(
            "load_base must be called outside of jit and eval_shape, since it reads "
            "files; give it the shapes as like"
        )
    refuse_variables(like, "like")
    places = located_leaves(like, "like")
    arrays = {"/".join(p): _unboxed(leaf, "/".join(p)) for p, leaf in places.items()}
    if adapted := [name for name in arrays if name.endswith(SUFFIX)]:
        raise ValueError(
            f"like must be a base without adapters, got {adapted[0]!r}: load the base "
            "first, and adapt it then"
        )
    shardings = _shardings(sharding, arrays)
    checkpoint, leaves = Checkpoint(path), []
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    for name, tensors in find_tensors(checkpoint, shapes, names, skip).items():
        files = {i: (checkpoint.place[t.name], t) for i, t in tensors.items()}
        wanted = _dtype(name, arrays[name].dtype, dtype, files.values())
        leaf = Leaf(name, shapes[name], wanted, shardings[name], files)
        leaf.check()
        leaves.append(leaf)
    made = {place: leaf.read() for place, leaf in zip(places, leaves, strict=True)}
    return replace_leaves(like, made)


def _unboxed(leaf: Any, name: str) -> Any:
    """Return the array or the shape in `leaf`."""
    if is_boxed(leaf):  # without the constraints that Linen's `unbox` would add
        (leaf,) = jax.tree.leaves(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"like must hold arrays, got {type(leaf).__name__} at {name!r}")
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"like must hold arrays or shapes, got a tracer at {name!r}; load_base is "
            "for use outside of jit and grad"
        )
    return leaf


def _dtype(
    name: str, own: Any, asked: Any, tensors: Iterable[tuple[TensorFile, Tensor]]
) -> np.dtype:
    """Return the dtype of a leaf's result, checked against its tensors."""
    if isinstance(asked, str) and asked == "like":
        asked = own
    try:
        wanted = floating_dtype(own if asked is None else asked, "dtype")
    except TypeError as error:
        raise TypeError(
            f"dtype must be 'like' or a floating-point dtype, which {name!r} gets: "
            f"{error}"
        ) from None
    for file, tensor in tensors:
        stored = file.dtype(tensor.name, "dequantise it first")
        if asked is None and stored != wanted:
            raise AdapterFileError(
                f"{tensor.name!r} in the base is {stored}, and {name!r} in like is "
                f"{wanted}: dtype='like' or dtype='{stored}' converts"
            )
    if wanted == np.float64 and not jax.config.read("jax_enable_x64"):
        raise AdapterFileError(
            f"{name!r} would be float64: set jax_enable_x64, or give another dtype"
        )
    return wanted


def _shardings(sharding: Any, arrays: Mapping[str, Any]) -> dict[str, Sharding | None]:
    """Return the place of each leaf, checked."""
    if sharding is None:
        shardings = {name: _own_sharding(array) for name, array in arrays.items()}
    elif jax.tree_util.treedef_is_leaf(jax.tree.structure(sharding)):
        shardings = dict.fromkeys(arrays, sharding)
    else:
        given = located_leaves(sharding, "sharding")
        shardings = {
            "/".join(place): jax.tree.leaves(leaf)[0] if is_boxed(leaf) else leaf
            for place, leaf in given.items()
        }
    for name, array in arrays.items():
        if name not in shardings:
            raise ValueError(
                f"sharding lacks the leaf {name!r}{nearest_paths(name, shardings)}"
            )
        if shardings[name] is not None:
            _check_sharding(name, tuple(array.shape), shardings[name])
    return shardings


def _own_sharding(array: Any) -> Sharding | None:
    """Return the sharding that a leaf of `like` has, unless JAX chose it."""
    if isinstance(array, jax.Array) and not array.committed:
        return None
    return getattr(array, "sharding", None)


def _check_sharding(name: str, shape: Shape, sharding: Any) -> None:
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"sharding must hold shardings, such as NamedSharding(mesh, spec), got "
            f"{sharding!r} for {name!r}"
        )
    if isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        raise ValueError(
            f"sharding must name devices, got a mesh without them for {name!r}"
        )
    spec = getattr(sharding, "spec", ())
    if len(spec) > len(shape):
        raise ValueError(
            f"sharding must name no more axes than {name!r} has, of shape {shape}, got "
            f"{spec}; a tree may have one for each leaf"
        )
    try:
        sharding.shard_shape(shape)
    except Exception as error:  # some of JAX's errors are not ValueErrors
        raise ValueError(f"sharding must split {name!r} evenly: {error}") from error
