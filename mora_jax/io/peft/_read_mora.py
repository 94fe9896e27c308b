"""Reading PEFT directories that the reference (peft-mora) wrote."""

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._common.checks import check_finite
from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Shape
from mora_jax._flax.planning import plan
from mora_jax._plan.plan import Plan
from mora_jax._plan.settings import AdapterSettings, MoRAConfig
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.paths import adapter_path, named_leaves
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, as_path, read_bytes
from mora_jax.io._json import read_json, short
from mora_jax.io._names import Names, pairs, split_index, suggestion, to_kernel
from mora_jax.io._tensors import TensorFile, to_jax
from mora_jax.io.peft._reference import REFERENCE_GROUPS, reference_operator
from mora_jax.operators import Operator

PREFIX = "base_model.model."
"""The beginning of the names of tensors in PEFT."""

ByIndex = dict[Shape, tuple[str, np.ndarray]]
"""{index in a kernel's stack: the module there and its M}."""


def load_peft_mora(
    directory: str | os.PathLike[str], model: Plan | Any, names: Names = None
) -> tuple[Tree, Plan]:
    """Read adapters that the paper's authors' code (peft-mora) saved.

    Args:
      directory: A path or a URL that `etils.epath` opens, of a directory with
        adapter_config.json and adapter_model.safetensors.
      model: The params of the model, or their shapes. If kernels have other axes than
        (in, out), a plan by `linen.plan` or `nnx.plan` with all kernels of the file.
      names: The modules of PyTorch that are the kernels. A family ("llama", "gemma",
        "qwen", "gpt2" or "bert", also with a version as in "qwen3") for the names of
        transformers' models; "tunix" for Tunix's Qwen2, Qwen3, Llama3 and Gemma, "gm"
        for Google's gemma; otherwise templates, such as
        `{"model.layers.{layer}.mlp.{name}": "layer_{layer}/{name}/kernel"}`, with
        `"mlp/{name}/kernel[{layer}]"` for a stacked kernel. None tries all families.

    Returns:
      (adapters, plan), with operators by `reference_operator` and an alpha of 1.

    Raises:
      AdapterFileError: The files are damaged or without MoRA, or do not fit the model.
    """
    path = as_path("directory", directory)
    config = _checked(read_json(path / CONFIG))
    arrays = TensorFile(path / TENSORS, read_bytes(path / TENSORS)).arrays()
    kernels = _by_kernel(_matrices(arrays), model, names)
    template = _template(model, kernels)
    specs, adapters = [], {}
    for spec in template.specs:
        if spec.name in kernels:
            try:
                operator, m = _adapter(spec, kernels[spec.name], config)
            except ValueError as error:
                raise AdapterFileError(f"{spec.name} in {TENSORS}: {error}") from error
            dropout = config["lora_dropout"]
            settings = AdapterSettings(dropout=dropout, param_dtype=m.dtype)
            specs.append(dataclasses.replace(spec, operator=operator, **vars(settings)))
            adapters[adapter_path(spec)] = to_jax(spec.name, m)
    return nest(adapters), Plan(tuple(specs), template.base_parameters, template.traced)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_pattern(value: Any) -> bool:
    # PEFT takes regular expressions; a stranger's may take forever to match.
    return isinstance(value, dict) and all(
        re.fullmatch(r"[\w.-]+", key) and _is_rank(rank) for key, rank in value.items()
    )


_TYPES = *REFERENCE_GROUPS, 6
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "use_mora": ("true, not that of a plain LoRA", lambda value: value is True),
    "bias": ("'none'", lambda value: value == "none"),
    "use_dora": ("false", lambda value: value is False),
    "mora_type": ("1, 2, 3, 4 or 6", lambda v: type(v) is int and v in _TYPES),
    "r": ("a positive integer", _is_rank),
    "rank_pattern": ("names of modules with positive integers", _is_pattern),
    "lora_dropout": ("in [0, 1)", lambda v: type(v) in (int, float) and 0 <= v < 1),
}
"""{setting in the reference's config: the rule for its values, and a check}."""


def _checked(content: Any) -> dict[str, Any]:
    """Return a parsed config, checked."""
    if not isinstance(content, dict):
        raise AdapterFileError(f"{CONFIG} must be an object, got {short(content)}")
    config = {"bias": "none", "use_dora": False, "lora_dropout": 0.0} | content
    config["rank_pattern"] = config.get("rank_pattern") or {}  # it may be null
    for key, (rule, is_right) in _RULES.items():
        if not is_right(value := config.get(key)):
            raise AdapterFileError(
                f"{key} in {CONFIG} must be {rule}, got {short(value)}"
            )
    return config


def _matrices(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each module with its M."""
    # The reference's layers are LoRA's: M is stored for A and for B, and transposed.
    twins: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, array in arrays.items():
        named = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if named is None:
            raise AdapterFileError(
                f"tensors in {TENSORS} must be like {PREFIX}*.lora_A.weight, "
                f"got {short(key)}"
            )
        twins[named[1]][named[2]] = array
    for name, pair in twins.items():
        if len(pair) < 2 or not np.array_equal(pair["A"], pair["B"]):
            raise AdapterFileError(
                f"{TENSORS} must have lora_A and lora_B of {name}, the same matrix"
            )
        yield name, pair["A"].T


def _by_kernel(
    matrices: Iterable[tuple[str, np.ndarray]], model: Any, names: Names
) -> dict[str, ByIndex]:
    """Return the M's of each kernel, by the names of their modules."""
    known, unknown = pairs(names), []
    kernels: dict[str, ByIndex] = defaultdict(dict)
    for module, m in matrices:
        if (kernel := to_kernel(module, known)) is None:
            unknown.append(module)
            continue
        path, index = split_index(kernel[0])
        if index in kernels[path]:
            raise AdapterFileError(f"{TENSORS} has two modules for {kernel[0]}")
        kernels[path][index] = module, m
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


def _template(model: Any, kernels: Iterable[str]) -> Plan:
    """Return a plan with the kernels, of any operators."""
    if isinstance(model, Plan):
        for name in kernels:
            if name not in model:
                raise AdapterFileError(
                    f"the plan has no kernel {name!r}, which {TENSORS} adapts"
                    f"{nearest_paths(name, model)}"
                )
        return model
    # The smallest operator fits every kernel.
    targets = [re.escape(name) for name in kernels]
    config = MoRAConfig(operator="truncation", square_rank=1, targets=targets)
    try:
        return plan(model, config)
    except ValueError as error:
        raise AdapterFileError(f"{TENSORS} does not fit the model: {error}") from error


def _adapter(
    spec: AdapterSpec, modules: ByIndex, config: Mapping[str, Any]
) -> tuple[Operator, np.ndarray]:
    """Return the operator of a kernel, and its M, (*stack, q, q)."""
    stack, widths = spec.stack_shape, (spec.in_features, spec.out_features)
    if missing := set(np.ndindex(stack)) ^ set(modules):
        raise ValueError(f"the kernel is stacked {stack}, and does not fit {missing}")
    ranks, operators = config["rank_pattern"], set()
    for module, m in modules.values():
        # By names or, as in PEFT, by ends of names.
        ends = (key for key in ranks if f".{module}".endswith(f".{key}"))
        rank = ranks.get(next(ends, ""), config["r"])
        operator = reference_operator(config["mora_type"], *widths, rank)
        operators.add(operator)
        check_finite(m, module)
        if m.shape != operator.m_shape:
            raise ValueError(
                f"{module} must be of shape {operator.m_shape} for a kernel of "
                f"{widths[0]} -> {widths[1]} features, got {m.shape}"
            )
    if len(operators) > 1:  # the M's are to be one array
        raise ValueError("a stacked kernel must have one rank in all its layers")
    ms = [modules[index][1] for index in np.ndindex(stack)]
    return operators.pop(), np.stack(ms).reshape(*stack, *ms[0].shape)
