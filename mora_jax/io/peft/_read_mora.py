"""Reading PEFT directories that the reference (peft-mora) wrote."""

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._common.types import Shape
from mora_jax._plan.config import MoRAConfig
from mora_jax._plan.plan import Plan
from mora_jax._plan.planning import plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.paths import adapter_path, named_leaves, nearest_paths
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS, read_bytes
from mora_jax.io._json import read_json, short
from mora_jax.io._locations import as_path
from mora_jax.io._names import Names, pairs, split_index, to_kernel
from mora_jax.io._suggest import suggestion_for
from mora_jax.io._tensors import decode, to_jax
from mora_jax.io.peft._reference import REFERENCE_GROUPS, reference_operator
from mora_jax.operators import Operator

PREFIX = "base_model.model."
"""The beginning of the names of tensors in PEFT."""


def load_peft_mora(
    directory: str | os.PathLike[str], model: Plan | Any, names: Names = None
) -> tuple[Tree, Plan]:
    """Adapters that the paper's authors' code (peft-mora) saved.

    Args:
      directory: A path or a URL that `etils.epath` opens, of a directory with
        adapter_config.json and adapter_model.safetensors.
      model: The params of the model that gets the adapters, or their shapes. If kernels
        have other axes than (in, out), a plan by `linen.plan` or `nnx.plan` that has
        all kernels that the file adapts.
      names: Which PyTorch module is which kernel. A family ("llama", "gemma", "qwen",
        "gpt2" or "bert") for models with the names of transformers' Flax models;
        "tunix" for Tunix's Qwen2, Qwen3, Llama3 and Gemma, "gm" for Google's gemma;
        otherwise templates, such as
        `{"model.layers.{layer}.mlp.{name}": "layer_{layer}/{name}/kernel"}`, with
        `"mlp/{name}/kernel[{layer}]"` for a stacked kernel. None tries all families.

    Returns:
      (adapters, plan), as `load` does. `reference_operator` makes the operators. Alpha
      is 1, since the reference ignores it.

    Raises:
      AdapterFileError: The files are damaged or hold no MoRA adapter, or they do not
        fit the model.
    """
    path = as_path("directory", directory)
    config = _Config.parse(read_json(path / CONFIG))
    arrays = decode(read_bytes(path / TENSORS), TENSORS)
    found: dict[str, dict[Shape, tuple[str, np.ndarray]]] = defaultdict(dict)
    known, matrices = pairs(names), dict(_matrices(arrays))
    unknown = [module for module in matrices if to_kernel(module, known) is None]
    if unknown:
        raise AdapterFileError(
            f"names have no kernel for the module {short(unknown[0])}, which {TENSORS} "
            f"adapts; {suggestion_for(unknown, _kernels(model))}"
        )
    for module, m in matrices.items():
        kernel = to_kernel(module, known)
        assert kernel is not None
        path, index = split_index(kernel[0])
        if index in found[path]:
            raise AdapterFileError(f"{TENSORS} has two modules for {kernel[0]}")
        found[path][index] = module, m
    template = _template(model, found)
    specs, adapters = [], {}
    for spec in template.specs:
        if spec.name not in found:
            continue
        try:
            operator, m = _adapter(spec, found.pop(spec.name), config)
        except ValueError as error:
            raise AdapterFileError(f"{spec.name} in {TENSORS}: {error}") from error
        spec = dataclasses.replace(
            spec,
            operator=operator,
            alpha=1.0,
            dropout=config.dropout,
            init="zeros",
            param_dtype=m.dtype,
            execution="auto",
        )
        specs.append(spec)
        adapters[adapter_path(spec)] = to_jax(spec.name, m)
    if found:
        name = next(iter(found))
        raise AdapterFileError(
            f"the plan has no kernel {name!r}, which {TENSORS} adapts"
            + nearest_paths(name, [spec.name for spec in template.specs])
        )
    return nest(adapters), Plan(tuple(specs), template.base_parameters, template.traced)


@dataclasses.dataclass(frozen=True)
class _Config:
    """The settings that are used from the reference's config."""

    mora_type: int
    rank: int
    rank_pattern: Mapping[str, int]
    dropout: float

    @classmethod
    def parse(cls, content: Any) -> "_Config":
        """The settings in a parsed config, checked."""
        if not isinstance(content, dict) or content.get("peft_type") != "LORA":
            raise AdapterFileError(f"peft_type in {CONFIG} must be 'LORA'")
        if content.get("use_mora") is not True:
            raise AdapterFileError(
                f"{CONFIG} is of a plain LoRA: use_mora must be true, "
                f"got {short(content.get('use_mora'))}"
            )
        for key, default in (("bias", "none"), ("use_dora", False)):
            if content.get(key, default) != default:
                raise AdapterFileError(
                    f"{key} in {CONFIG} must be {default!r}, got {short(content[key])}"
                )
        mora_type = content.get("mora_type")
        if type(mora_type) is not int or mora_type not in (*REFERENCE_GROUPS, 6):
            raise AdapterFileError(
                f"mora_type in {CONFIG} must be 1, 2, 3, 4 or 6, got {short(mora_type)}"
            )
        patterns = content.get("rank_pattern") or {}
        ranks = {"r": content.get("r"), **_mapping("rank_pattern", patterns)}
        for key, rank in ranks.items():
            if type(rank) is not int or not 0 < rank < 2**31:
                raise AdapterFileError(
                    f"{short(key)} in {CONFIG} must be a positive integer, "
                    f"got {short(rank)}"
                )
        dropout = content.get("lora_dropout", 0.0)
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise AdapterFileError(
                f"lora_dropout in {CONFIG} must be in [0, 1), got {short(dropout)}"
            )
        return cls(mora_type, ranks["r"], patterns, float(dropout))

    def rank_of(self, module: str) -> int:
        """The rank of a module. A key is its name or the end of it, as in PEFT."""
        for key, rank in self.rank_pattern.items():
            if module == key or module.endswith(f".{key}"):
                return rank
        return self.rank


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise AdapterFileError(
            f"{name} in {CONFIG} must be an object, got {short(value)}"
        )
    for key in value:  # PEFT takes patterns; a stranger's may take forever to match
        if not re.fullmatch(r"[\w.-]+", key):
            raise AdapterFileError(
                f"{name} in {CONFIG} must have names of modules, got {short(key)}"
            )
    return value


def _matrices(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Each module with its M, which the reference stores twice and transposed."""
    for key in arrays:
        if not re.fullmatch(rf"{re.escape(PREFIX)}.+\.lora_[AB]\.weight", key):
            raise AdapterFileError(
                f"tensors in {TENSORS} must be like {PREFIX}*.lora_A.weight, "
                f"got {short(key)}"
            )
    modules = dict.fromkeys(key.rsplit(".", 2)[0] for key in arrays)
    for module in modules:
        name = module.removeprefix(PREFIX)
        a, b = (arrays.get(f"{module}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None:
            raise AdapterFileError(f"{TENSORS} must have lora_A and lora_B of {name}")
        if a.shape != b.shape or not np.array_equal(a, b):
            raise AdapterFileError(
                f"lora_A and lora_B of {name} in {TENSORS} must be the same matrix"
            )
        if not np.isfinite(a).all():
            raise AdapterFileError(f"{name} in {TENSORS} holds NaN or infinity")
        yield name, a.T


def _kernels(model: Any) -> list[str]:
    """The paths of all arrays that can be kernels."""
    if isinstance(model, Plan):
        return list(model)
    leaves = named_leaves(model) if jax.tree.leaves(model) else {}
    return [name for name, (_, leaf) in leaves.items() if len(leaf.shape) >= 2]


def _template(model: Any, found: Mapping[str, Any]) -> Plan:
    """A plan with the found kernels, whose operators will be replaced."""
    if not found:
        raise AdapterFileError(f"{TENSORS} holds no adapter")
    if isinstance(model, Plan):
        return model
    config = MoRAConfig(
        operator="truncation",
        square_rank=1,
        scale="paper",
        targets=[re.escape(name) for name in found],
    )
    try:
        return plan(model, config)
    except ValueError as error:
        raise AdapterFileError(f"{TENSORS} does not fit the model: {error}") from error


def _adapter(
    spec: AdapterSpec, by_index: Mapping[Shape, tuple[str, np.ndarray]], config: _Config
) -> tuple[Operator, np.ndarray]:
    """The operator of a kernel, and its M, (*stack, q, q)."""
    stack = spec.stack_shape
    if missing := set(np.ndindex(stack)) ^ set(by_index):
        raise ValueError(f"the kernel is stacked {stack}, and does not fit {missing}")
    operators = {
        reference_operator(
            config.mora_type,
            spec.in_features,
            spec.out_features,
            config.rank_of(module),
        )
        for module, _ in by_index.values()
    }
    if len(operators) > 1:
        raise ValueError("a stacked kernel must have one rank in all its layers")
    (operator,) = operators
    q = operator.square_rank
    for module, m in by_index.values():
        if m.shape != (q, q):
            raise ValueError(
                f"{module} must be of shape {(q, q)} for a kernel of "
                f"{spec.in_features} -> {spec.out_features} features, got {m.shape}"
            )
    rows = [by_index[index][1] for index in np.ndindex(stack)]
    return operator, np.stack(rows).reshape(*stack, q, q)
