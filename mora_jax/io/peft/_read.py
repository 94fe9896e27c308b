"""Reading PEFT directories: a LoRA's, and those that the reference wrote."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Shape
from mora_jax._flax.planning import plan
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import MoRAConfig
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.paths import adapter_path, named_leaves
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, as_path, read_bytes
from mora_jax.io._json import read_json, short
from mora_jax.io._names import Names, pairs, split_index, suggestion, to_kernel
from mora_jax.io._tensors import TensorFile, to_jax
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Leaf, Source
from mora_jax.io.peft._modules import PREFIX, ByIndex, Factors, LoRA, Reference

READERS = {True: Reference, False: LoRA}
"""{True if the config has `use_mora`: who reads the modules}."""


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
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise AdapterFileError(f"{CONFIG} must be an object, got {short(config)}")
    reader = READERS[config.get("use_mora") is True](config)
    arrays = TensorFile(path / TENSORS, read_bytes(path / TENSORS)).arrays()
    modules, others = _by_module(arrays)
    kernels = _by_kernel(modules, model, names)
    template, specs, adapters = _template(model, kernels), [], {}
    for spec in template.specs:
        if spec.name in kernels:
            try:
                spec, m = reader.adapter(spec, kernels[spec.name])
            except ValueError as error:
                raise AdapterFileError(f"{spec.name} in {TENSORS}: {error}") from error
            specs.append(spec)
            adapters[adapter_path(spec)] = to_jax(spec.name, m)
    trained = []
    if others:
        source = Source(Checkpoint(path / TENSORS), names, tied=False)
        for array, leaf in _trained(source, model, others, kernels):
            trained.append(array)
            adapters[array.path] = leaf.read()
    numbers = template.base_parameters, template.traced
    return nest(adapters), Plan(tuple(specs), *numbers, trained=tuple(trained))


def _by_module(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, Factors], list[str]]:
    """Return {module: its two matrices}, and the names of all other tensors."""
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    tables, others = set(), []
    for key, array in arrays.items():
        form = r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))"
        if named := re.fullmatch(re.escape(PREFIX) + form, key):
            found[named[1]][named[2] or named[3]] = array
            tables |= {named[1]} if named[3] else set()
        elif key.startswith(PREFIX) and ".lora_" not in key:
            others.append(key)
        else:
            raise AdapterFileError(
                f"tensors in {TENSORS} must be like {PREFIX}*.lora_A.weight, "
                f"got {short(key)}"
            )
    modules = {}
    for name, two in found.items():
        if len(two) < 2 or any(array.ndim != 2 for array in two.values()):
            raise AdapterFileError(
                f"{TENSORS} must have lora_A and lora_B of {name}, two matrices"
            )
        modules[name] = Factors(name, two["A"].T, two["B"].T, name in tables)
    return modules, others


def _by_kernel(
    modules: Mapping[str, Factors], model: Any, names: Names
) -> dict[str, ByIndex]:
    """Return the matrices of each kernel, by the names of their modules."""
    known, unknown = pairs(names), []
    kernels: dict[str, ByIndex] = defaultdict(dict)
    for module, factors in modules.items():
        if (kernel := to_kernel(module, known)) is None:
            unknown.append(module)
            continue
        path, index = split_index(kernel[0])
        if index in kernels[path]:
            raise AdapterFileError(f"{TENSORS} has two modules for {kernel[0]}")
        kernels[path][index] = factors
    if unknown:
        paths = list(model) if isinstance(model, Plan) else []
        if not isinstance(model, Plan) and jax.tree.leaves(model):
            leaves = named_leaves(model).items()
            paths = [name for name, (_, leaf) in leaves if len(leaf.shape) >= 2]
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


def _shape(modules: ByIndex) -> jax.ShapeDtypeStruct:
    """Return the shape of a kernel by the matrices of its modules."""
    factors = next(iter(modules.values()))
    stack: Shape = tuple(max(sizes) + 1 for sizes in zip(*modules, strict=True))
    shape = *stack, len(factors.a), factors.b.shape[-1]
    return jax.ShapeDtypeStruct(shape, np.float32)


def _trained(
    source: Source, model: Any, tensors: list[str], kernels: Iterable[str]
) -> Iterable[tuple[TrainedArray, Leaf]]:
    """Yield the arrays that the file has whole, which are the model's of such names."""
    leaves: dict[str, Any] = {}
    if isinstance(model, Plan):
        leaves = {a.name: (a.path, a) for a in model.trained}
    elif model is not None:
        leaves = {n: leaf for n, leaf in named_leaves(model).items()}
    misfit = "{!r} of shape {} does not fit {} in " + TENSORS
    for name, (path, leaf) in leaves.items():
        if name not in kernels:
            stack = source.stack(name, tuple(leaf.shape), misfit)
            source.missing.clear()
            for part in list(stack.values())[:1]:
                dtype = part.file.dtype(part.name)
                base = getattr(leaf, "base_dtype", leaf.dtype)
                array = TrainedArray(path, tuple(leaf.shape), dtype, base)
                yield array, Leaf(array.shape, dtype, None, stack)
    if left := [name for name in tensors if name not in source.taken]:
        raise AdapterFileError(
            f"{TENSORS} has {short(left[0])}, an array that was trained whole, and the "
            f"model has none of this name{nearest_paths(left[0], leaves)}; give the "
            "model's params, or a plan with train= for it"
        )
