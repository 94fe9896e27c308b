"""Reading PEFT directories: a LoRA's, and those that the reference wrote."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from mora_jax._common.axes import axes_by_name, features, may_be_conv1d, sizes
from mora_jax._common.checks import check_finite, check_kernel
from mora_jax._common.messages import nearest_paths
from mora_jax._common.types import Path, Shape
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec, TrainedArray
from mora_jax._tree.paths import Found, Tree, named_leaves
from mora_jax._tree.plan import Plan
from mora_jax.io import _files
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, read_bytes
from mora_jax.io._json import read_json, short
from mora_jax.io._names import KERNELS, Names, bijection, split_index, templates
from mora_jax.io._tensors import TensorFile, to_jax
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Leaf, Source
from mora_jax.io.peft._modules import Config, MatrixPair, checked, modules_in, turned
from mora_jax.operators import LowRank, Operator, Rotation, Sharing
from mora_jax.operators.sharing import REFERENCE_GROUPS

Place = dict[str, Any]  # shape, axes and layout of a kernel
ByIndex = dict[Shape, MatrixPair]  # by index in a stack, or in a first output axis
Kernels = dict[str, ByIndex]  # by the names of kernels
Leaves = Mapping[str, tuple[Path, Any]]  # by name: arrays of params, specs of a plan


def load_peft(
    directory: _files.PathLike, model: Plan | Any = None, names: Names = None
) -> Tree:
    """Read a LoRA of Hugging Face PEFT, or what the paper's authors' code saved.

    Adapters of a LoRA have the operator "low_rank" at the rank of their modules and an
    alpha of `lora_alpha / r` (with rsLoRA, `lora_alpha / sqrt(r)`); `modules_to_save`
    and biases train themselves. The reference's (peft-mora) have sharing for types 1 to
    4, rotation for type 6, and an alpha of 1. DoRA and other types are refused.

    Args:
      directory: As in `load`, with adapter_config.json and adapter_model.safetensors;
        or "user/name" on the Hub, from where huggingface_hub copies these two.
      model: The params of the model, or their shapes. If kernels have other axes than
        (in, out), a plan by `linen.plan` or `nnx.plan` with all kernels of the file; of
        GPT-2's names params with a c_attn do. None takes the shapes of a LoRA's own
        matrices, with the axes of FlaxConv1D for GPT-2's Conv1D.
      names: The modules of PyTorch that are the kernels. A family ("llama", "gemma",
        "qwen", "gpt2", "gptj", "gpt_neo", "bloom" or "bert", also with a version as in
        "qwen3") for the names of transformers' models; "tunix" for Tunix's Qwen2,
        Qwen3, Llama3 and Gemma, "gm" for Google's gemma; otherwise templates, such as
        `{"model.layers.{layer}.mlp.{name}": "layer_{layer}/{name}/kernel"}`, with
        `"mlp/{name}/kernel[{layer}]"` for a stacked kernel. None tries all families. A
        module of another name is the kernel whose path is that name, with slashes.

    Raises:
      AdapterFileError: The files are damaged, of another type, or do not fit the model.
    """
    path_of = _files.as_path("directory", directory)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(directory))
    if is_name and not path_of.exists() and find_spec("huggingface_hub"):
        path_of = _copy_of_hub(str(directory))
    config, file = checked(read_json(path_of / CONFIG)), path_of / TENSORS
    if config["use_mora"] and model is None:
        raise AdapterFileError(f"the base is needed: {path_of} lacks sizes of kernels")
    modules, others = modules_in(TensorFile(file, read_bytes(file)).arrays(), config)
    leaves: Leaves = {}
    if isinstance(model, Plan):
        leaves = {"/".join(path): (path, spec) for path, spec in model.parts.items()}
    elif jax.tree.leaves(model):
        leaves = named_leaves(model)
    kernels = _kernels(modules, leaves, names)
    adapters = Found()
    for name, by_index in kernels.items():
        try:
            known = None if model is None else leaves
            path, place = _kernel(name, known, by_index, config)
            adapters[path] = _adapter_of(name, place, by_index, config)
        except ValueError as error:
            raise AdapterFileError(f"{name} in {TENSORS}: {error}") from error
    if others:
        source = Source(Checkpoint(file), names, tied=False)
        adapters |= dict(_trained(source, leaves, others, kernels))
    return adapters.tree()


def _copy_of_hub(name: str) -> _files.Location:
    """The directory that holds a copy of an adapter on the Hub."""
    from huggingface_hub import snapshot_download

    try:
        copy = snapshot_download(name, allow_patterns=[CONFIG, TENSORS])
    except Exception as error:  # of names, rights and networks, which have many classes
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        missing = f"there is no directory {name!r}, and none from the Hub"
        raise AdapterFileError(f"{missing}: {told}") from error
    return _files.as_path("directory", copy)


def _kernels(modules: list[MatrixPair], leaves: Leaves, names: Names) -> Kernels:
    """The matrices of each kernel, by the names of their modules."""
    known = bijection(names)
    paths = [name for name, (_, leaf) in leaves.items() if len(leaf.shape) >= 2]
    kernels: Kernels = defaultdict(dict)
    missing = []
    for pair in modules:
        found = [split_index(p.kernel) for p in known.of_module(pair.module)]
        # A port has PyTorch's names, with slashes. Templates of the user's come first.
        if not (found and isinstance(names, Mapping)):
            own = (f"{pair.module.replace('.', '/')}/{leaf}" for leaf in KERNELS)
            found += [(path, ()) for path in own if path in paths]
        if not found:
            missing.append(pair.module)
            continue
        path, index = next((one for one in found if one[0] in paths), found[0])
        if index in kernels[path]:
            raise AdapterFileError(f"{TENSORS} has two modules for {path}{[*index]}")
        kernels[path][index] = pair
    if missing:
        near = nearest_paths(missing[0].replace(".", "/"), paths)
        module = f"the module {short(missing[0])}, which {TENSORS} adapts{near}"
        # A stranger's file may have any names, and any number of them.
        remedy = templates(f"{n:.200}/kernel".replace(".", "/") for n in missing[:64])
        raise AdapterFileError(f"names have no kernel for {module}; {remedy}")
    if not kernels:
        raise AdapterFileError(f"{TENSORS} holds no adapter")
    return kernels


def _kernel(
    name: str, leaves: Leaves | None, modules: ByIndex, config: Config
) -> tuple[Path, Place]:
    """A kernel's path, shape, axes and layout in a model, or by its modules' shapes."""
    if leaves is None:
        last, pair = max(modules.items(), key=lambda item: item[0])
        # PEFT says so of Conv1D, and FlaxConv1D has the transpose of its weight.
        turn = -1 if may_be_conv1d(name) and config.get("fan_in_fan_out") is True else 1
        shape = *(k + 1 for k in last), *(len(pair.a), pair.b.shape[1])[::turn]
        axes = "s" * len(last) + "io"[::turn]
        return tuple(name.split("/")), {"kernel_shape": shape, "axes": axes}
    path, leaf = leaves.get(name, ((), None))
    if isinstance(leaf, AdapterSpec):
        return path, {k: getattr(leaf, k) for k in ("kernel_shape", "axes", "layout")}
    if leaf is None or isinstance(leaf, TrainedArray):
        raise ValueError(f"the model lacks this kernel{nearest_paths(name, leaves)}")
    check_kernel(leaf, name)
    arrays = {other: array for other, (_, array) in leaves.items()}
    return path, {"kernel_shape": tuple(leaf.shape), "axes": axes_by_name(name, arrays)}


def _adapter_of(name: str, place: Place, by_index: ByIndex, config: Config) -> Adapter:
    """The adapter of a kernel, whose layers are one module, or several by outputs."""
    shape, axes = place["kernel_shape"], place["axes"]
    stack, features_of = sizes(shape, axes, "s"), features(shape, axes)
    mora_type = config["use_mora"] and config["mora_type"]
    parts = 1 if mora_type else len(by_index) // math.prod(stack)
    places = (*stack, parts) if parts > 1 else stack
    # Numbers first: without a model the file's names alone say how deep a stack is.
    if len(by_index) != math.prod(places) or by_index.keys() != set(np.ndindex(places)):
        got = short(sorted(by_index))
        raise ValueError(f"the kernel is stacked {stack}, got modules for {got}")
    widths, modules = (features_of[0], features_of[1] // parts), []
    for index in np.ndindex(places):
        pair = turned(by_index[index], name, axes, "here both change")
        module, _, a, b, rank, *_ = pair
        left, right = (widths[0], rank), (rank, widths[1])
        if mora_type:
            left = right = reference_operator(mora_type, *widths, rank).m_shape
        if (a.shape, b.shape) != (left, right):
            shapes = f"{left[::-1]} and {right[::-1]}"
            rule = f"lora_A and lora_B of {module} must be of shape {shapes}"
            kernel = f"a kernel of {widths[0]} -> {widths[1]} features"
            raise ValueError(f"{rule} for {kernel}, got {a.T.shape} and {b.T.shape}")
        check_finite(a, module)
        check_finite(b, module)
        if mora_type and not np.array_equal(a, b):
            raise ValueError(f"lora_A and lora_B of {module} must be the same M")
        modules.append(pair)
    if not mora_type:
        alpha, ms = modules[0].factor, _low_rank(modules, parts)
        operator: Operator = LowRank(*features_of, ms[0].shape[1])
    elif len({pair.a.shape for pair in modules}) == 1:
        alpha, ms = 1.0, [pair.a for pair in modules]
        operator = reference_operator(mora_type, *features_of, modules[0].rank)
    else:  # the M's are to be one array
        raise ValueError("a stacked kernel must have one rank in all its layers")
    m = np.stack(ms).reshape(*stack, *ms[0].shape)
    settings: Any = {"alpha": alpha, "dropout": config["lora_dropout"]}
    spec = AdapterSpec(operator, **place, **settings, param_dtype=m.dtype)
    return Adapter(to_jax(name, m), spec)


def _low_rank(modules: list[MatrixPair], parts: int) -> list[np.ndarray]:
    """The trained array of each layer of a LoRA: A above the transpose of B."""
    alpha, blocks = modules[0].factor, []
    for k, (_, _, a, b, _, factor, _) in enumerate(modules):
        # All layers and parts have one alpha here, and columns of their own.
        b = b if factor == alpha else b * (factor / alpha)
        rows = [n * b.shape[1] for n in (k % parts, parts - 1 - k % parts)]
        blocks.append(np.concatenate([a, np.pad(b.T, (rows, (0, 0)))]))
    starts = range(0, len(blocks), parts)
    layers = [np.concatenate(blocks[k : k + parts], axis=1) for k in starts]
    rank = max(layer.shape[1] for layer in layers)
    return [np.pad(layer, ((0, 0), (0, rank - layer.shape[1]))) for layer in layers]


def reference_operator(mora_type: int, ins: int, outs: int, rank: int) -> Operator:
    """The operator of the reference for a type that is in its config."""
    # It rounds q to the nearest number, so M may have more parameters than a LoRA of
    # that rank, unlike in this library.
    q = int(((ins + outs) * rank) ** 0.5 + 0.5)
    if mora_type == 6:  # a rotation turns pairs of numbers
        return Rotation(ins, outs, q // 2 * 2, truncate=True)
    return Sharing(ins, outs, q, *REFERENCE_GROUPS[mora_type], normalised=False)


def _trained(
    source: Source, leaves: Leaves, tensors: list[str], kernels: Collection[str]
) -> Iterator[tuple[Path, Adapter]]:
    """The arrays that the file has whole, which are the model's of such names."""
    for name, (path, leaf) in leaves.items():
        if name in kernels or isinstance(leaf, AdapterSpec):
            continue
        if not (stack := source.stack(name, shape := tuple(leaf.shape))):
            source.missing.clear()
            continue
        source.check_missing()  # all of a stack was trained, or none
        part = next(iter(stack.values()))
        dtype = part.file.dtype(part.name)
        spec = TrainedArray(shape, dtype, getattr(leaf, "base_dtype", leaf.dtype))
        yield path, Adapter(Leaf(shape, dtype, None, stack).read(), spec)
    if left := [name for name in tensors if name not in source.taken]:
        whole = f"{TENSORS} has {short(left[0])}, an array that was trained whole"
        lacks = f"the model has none of this name{nearest_paths(left[0], leaves)}"
        remedy = "give the model's params, or a plan with train= for it"
        raise AdapterFileError(f"{whole}, and {lacks}; {remedy}")
