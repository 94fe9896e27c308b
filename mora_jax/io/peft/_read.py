"""Reading PEFT directories: a LoRA's, and those that the reference wrote."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._common.suggestions import nearest_paths
from mora_jax._flax.planning import plan
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import MoRAConfig
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.paths import adapter_path, named_leaves
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, as_path, read_bytes
from mora_jax.io._json import read_json, short
from mora_jax.io._names import Names, pairs, split_index, suggestion, to_kernels
from mora_jax.io._tensors import TensorFile, to_jax
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Leaf, Source
from mora_jax.io.peft._kernels import ByIndex, adapter_of
from mora_jax.io.peft._modules import MatrixPair, checked, modules_in


def load_peft(
    directory: str | os.PathLike[str], model: Plan | Any = None, names: Names = None
) -> tuple[Tree, Plan]:
    """Read a LoRA of Hugging Face PEFT, or what the paper's authors' code saved.

    A LoRA has the operator "low_rank" at its own rank, and an alpha of `lora_alpha / r`
    (with rsLoRA, `lora_alpha / sqrt(r)`). `modules_to_save` are trained arrays of the
    plan. The reference's adapters (peft-mora) have the operators of
    `reference_operator`, and an alpha of 1. DoRA and other types are refused.

    Args:
      directory: A path or a URL that `etils.epath` opens, of a directory with
        adapter_config.json and adapter_model.safetensors.
      model: The params of the model, or their shapes. If kernels have other axes than
        (in, out), a plan by `linen.plan` or `nnx.plan` with all kernels of the file.
        None takes the shapes of a LoRA's own matrices.
      names: The modules of PyTorch that are the kernels. A family ("llama", "gemma",
        "qwen", "gpt2" or "bert", also with a version as in "qwen3") for the names of
        transformers' models; "tunix" for Tunix's Qwen2, Qwen3, Llama3 and Gemma, "gm"
        for Google's gemma; otherwise templates, such as
        `{"model.layers.{layer}.mlp.{name}": "layer_{layer}/{name}/kernel"}`, with
        `"mlp/{name}/kernel[{layer}]"` for a stacked kernel. None tries all families.

    Returns:
      (adapters, plan).

    Raises:
      AdapterFileError: The files are damaged or of another type, or do not fit the
        model.
    """
    path = as_path("directory", directory)
    config = checked(read_json(path / CONFIG))
    if config["use_mora"] and model is None:
        raise AdapterFileError(
            f"{path} is the reference's, and does not say how large kernels are: "
            "the base is needed too"
        )
    arrays = TensorFile(path / TENSORS, read_bytes(path / TENSORS)).arrays()
    modules, others = modules_in(arrays, config)
    kernels = _by_kernel(modules, model, names)
    template, specs, adapters = _template(model, kernels), [], {}
    for spec in template.specs:
        if spec.name in kernels:
            try:
                spec, m = adapter_of(spec, kernels[spec.name], config)
            except ValueError as error:
                raise AdapterFileError(f"{spec.name} in {TENSORS}: {error}") from error
            specs.append(spec)
            adapters[adapter_path(spec)] = to_jax(spec.name, m)
    trained: dict[TrainedArray, jax.Array] = {}
    if others:
        source = Source(Checkpoint(path / TENSORS), names, tied=False)
        trained = dict(_trained(source, model, others, kernels))
    adapters |= {array.path: copy for array, copy in trained.items()}
    numbers = template.base_parameters, template.traced
    return nest(adapters), Plan(tuple(specs), *numbers, trained=tuple(trained))


def _by_kernel(
    modules: Iterable[MatrixPair], model: Any, names: Names
) -> dict[str, ByIndex]:
    """Return the matrices of each kernel, by the names of their modules."""
    known, unknown = pairs(names), []
    paths = [*model] if isinstance(model, Plan) else []
    if not isinstance(model, Plan) and jax.tree.leaves(model):
        leaves = named_leaves(model).items()
        paths = [name for name, (_, leaf) in leaves if len(leaf.shape) >= 2]
    kernels: dict[str, ByIndex] = defaultdict(dict)
    for pair in modules:
        found = [split_index(kernel) for kernel, _ in to_kernels(pair.module, known)]
        if not found:
            unknown.append(pair.module)
            continue
        path, index = next((one for one in found if one[0] in paths), found[0])
        if index in kernels[path]:
            raise AdapterFileError(f"{TENSORS} has two modules for {path}{[*index]}")
        kernels[path][index] = pair
    if unknown:
        # A checkpoint that was read by the same names lacks paths.
        paths = paths or [m.replace(".", "/") + "/kernel" for m in unknown]
        raise AdapterFileError(
            f"names have no kernel for the module {short(unknown[0])}, which {TENSORS} "
            f"adapts; {suggestion(paths, unknown)}"
        )
    if not kernels:
        raise AdapterFileError(f"{TENSORS} holds no adapter")
    return kernels


def _template(model: Any, kernels: Mapping[str, ByIndex]) -> Plan:
    """Return a plan with the kernels, of any operators."""
    if isinstance(model, Plan):
        for name in kernels:
            if name not in model:
                raise AdapterFileError(
                    f"the plan has no kernel {name!r}, which {TENSORS} adapts"
                    f"{nearest_paths(name, model)}"
                )
        return model
    if model is None:
        model = nest({tuple(n.split("/")): _shape(k) for n, k in kernels.items()})
    # The smallest operator fits every kernel.
    targets = [re.escape(name) for name in kernels]
    config = MoRAConfig(operator="truncation", square_rank=1, targets=targets)
    try:
        return plan(model, config)
    except ValueError as error:
        raise AdapterFileError(f"{TENSORS} does not fit the model: {error}") from error


def _shape(by_index: ByIndex) -> jax.ShapeDtypeStruct:
    """Return the shape of a kernel by the matrices of its last module."""
    last = max(by_index)
    stack, (_, _, a, b, *_) = (number + 1 for number in last), by_index[last]
    return jax.ShapeDtypeStruct((*stack, len(a), b.shape[1]), np.float32)


def _trained(
    source: Source, model: Any, tensors: list[str], kernels: Collection[str]
) -> Iterator[tuple[TrainedArray, jax.Array]]:
    """Yield the arrays that the file has whole, which are the model's of such names."""
    leaves: dict[str, Any] = {}
    if isinstance(model, Plan):
        leaves = {a.name: (a.path, a) for a in model.trained}
    elif model is not None:
        leaves = named_leaves(model)
    misfit = "{!r} of shape {} does not fit {} in " + TENSORS
    for name, (path, leaf) in leaves.items():
        shape = tuple(leaf.shape)
        if name in kernels or not (stack := source.stack(name, shape, misfit)):
            source.missing.clear()
            continue
        source.check_missing()  # all of a stack was trained, or none
        part = next(iter(stack.values()))
        dtype = part.file.dtype(part.name)
        base_dtype = getattr(leaf, "base_dtype", leaf.dtype)
        array = TrainedArray(path, shape, dtype, base_dtype)
        yield array, Leaf(shape, dtype, None, stack).read()
    if left := [name for name in tensors if name not in source.taken]:
        raise AdapterFileError(
            f"{TENSORS} has {short(left[0])}, an array that was trained whole, and the "
            f"model has none of this name{nearest_paths(left[0], leaves)}; give the "
            "model's params, or a plan with train= for it"
        )
