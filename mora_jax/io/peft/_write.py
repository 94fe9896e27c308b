"""Writing PEFT directories: the reference's, and what all of them share."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import refuse_trained
from mora_jax._tree.adapters import adapter_items, trained_items
from mora_jax.io import _files, _names
from mora_jax.io._files import CONFIG, TENSORS, Location, write_directory
from mora_jax.io._json import dump
from mora_jax.io._names import Module, Names
from mora_jax.io._tensors import encode, to_numpy
from mora_jax.io.peft._modules import PREFIX, MatrixPair
from mora_jax.io.peft._reference import REFERENCE_GROUPS, reference_square_rank
from mora_jax.operators import Rotation, Sharing


def save_peft_mora(
    directory: _files.PathLike,
    adapters: Any,
    plan: Plan,
    names: Names = None,
    *,
    base_model: str = "",
    task_type: str | None = "CAUSAL_LM",
    force: bool = False,
) -> None:
    """Write adapters so that the paper's authors' code (peft-mora) loads them.

    That code computes q from a rank, has only sharing and rotation, and ignores alpha.
    So alpha and the normalisation are multiplied into M, and other adapters are
    refused.

    Args:
      directory: As in `save_peft_lora`.
      adapters: As in `save_peft_lora`.
      plan: As in `save_peft_lora`.
      names: As in `save_peft_lora`.
      base_model: As in `save_peft_lora`.
      task_type: As in `save_peft_lora`.
      force: As in `save_peft_lora`.

    Raises:
      FileExistsError, NotADirectoryError: As `save_peft_lora`.
      ValueError: The reference lacks an operator or a square rank, a kernel is an
        embedding's, or as `save_peft_lora`.
    """
    path = _files.check_free("directory", directory, _files.ADAPTER, force)
    refuse_trained(
        plan.trained,
        "which the reference cannot hold; mora_jax.save and io.save_peft_lora hold it",
    )
    squares, settings = [], set()
    for module, spec, m in modules(adapters, plan, names):
        if module.table or module.outputs != slice(0, spec.out_features):
            kind = "an embedding" if module.table else "a part of this kernel"
            raise ValueError(
                f"{spec.name}: the reference has no squares for embeddings or parts of "
                f"kernels, and {module.name} is {kind}; io.save_peft_lora writes it as "
                "a LoRA, and io.merge_checkpoint merges it"
            )
        mora_type, rank, scale = _reference(spec)
        settings.add((mora_type, spec.dropout))
        m = spec.operator.scaled(m.astype(np.float32), spec.factor)
        m = np.asarray(scale * m, np.float32)
        # PEFT multiplies by lora_alpha / r, which is 1: alpha is in M.
        squares.append(MatrixPair(module.name, False, m, m, rank, 1, module.axes))
    if len(settings) > 1:
        rule = "the reference has one mora_type and dropout for all layers"
        raise ValueError(f"{rule}, got {sorted(settings)}")
    ((mora_type, dropout),) = settings
    special = {"use_mora": True, "mora_type": mora_type, "lora_dropout": dropout}
    write_peft(path, squares, base_model, task_type, **special)


def _reference(spec: AdapterSpec) -> tuple[int, int, float]:
    """Return the reference's type and rank, and a factor of alpha M."""
    op, scale = spec.operator, 1.0
    ins, outs, q = op.in_features, op.out_features, op.square_rank
    if isinstance(op, Rotation) and (op.truncate or -(-ins // q) <= -(-outs // q)):
        mora_type = 6
    elif type(op) is Sharing:  # not with signs
        groups = op.compress_groups, op.decompress_groups
        mora_type = {v: k for k, v in REFERENCE_GROUPS.items()}[groups]
        scale = math.sqrt(q / ins * q / outs) if op.normalised else 1.0
    else:
        raise ValueError(
            f"{spec.name}: the reference has sharing and truncated rotation, got {op}"
        )
    # sqrt((in + out) r) rounds to q or more from (q - 1/2)^2 = q^2 - q + 1/4 on.
    rank = -(-(q * q - q + 1) // (ins + outs))
    near = [reference_square_rank(mora_type, ins, outs, rank - k) for k in (1, 0)]
    if near[1] != q:
        rule = f"no rank gives the reference a square_rank of {q}"
        raise ValueError(f"{spec.name}: {rule}; the nearest are {near}")
    return mora_type, rank, scale


def write_peft(
    path: Location,
    matrices: Sequence[MatrixPair],
    base_model: str,
    task_type: str | None,
    whole: Mapping[str, np.ndarray] | None = None,
    **special: Any,
) -> None:
    """Write a directory, its config last, in which `special` settings prevail.

    `whole` are {tensor: numbers} of modules that were trained themselves.
    """
    axes = {pair.axes for pair in matrices if not pair.table}
    if len(axes) > 1:
        raise ValueError("modules must be all Linear or all Conv1D")
    tensors, ranks, alphas = {}, {}, {}
    for name, table, a, b, r, factor, _ in matrices:
        start, end = ("embedding_", "") if table else ("", ".weight")
        for letter, matrix in ("A", a), ("B", b):
            tensors[f"{PREFIX}{name}.lora_{start}{letter}{end}"] = matrix.T
        ranks[name], alphas[name] = r, factor * r
    tensors |= {f"{PREFIX}{name}": array for name, array in (whole or {}).items()}
    # Servers make room for `r`, so it is the largest rank.
    rank, alpha = max(zip(ranks.values(), alphas.values(), strict=True))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "io" in axes,
    }
    if whole:
        config["modules_to_save"] = sorted({n.rpartition(".")[0] for n in whole})
    content = encode(tensors, {"format": "pt"})
    write_directory(path, [(TENSORS, [content]), (CONFIG, [dump(config | special)])])


def modules(
    adapters: Any, plan: Plan, names: Names
) -> list[tuple[Module, AdapterSpec, np.ndarray]]:
    """Return PyTorch's modules, with the spec and the M of each; no convolutions."""
    if not len(plan):
        raise ValueError("plan must have an adapter to write, got none")
    known, items, unknown = _names.pairs(names), [], []
    for spec, m in adapter_items(adapters, plan):
        # A convolution's axes are a window's, then "io" or "oi". With a window of two
        # axes or more no dense layer has the same. With a window of one axis some do: a
        # layer from heads to a width has "iio". Only names tell these apart.
        axes = spec.axes.replace("s", "")
        called = re.search("conv", spec.name, re.IGNORECASE)
        if re.fullmatch("ii+(io|oi)", axes) or called and axes in ("iio", "ioi"):
            raise ValueError(
                f"{spec.name}: what is written here for PEFT must be of dense layers "
                f"and embeddings, got axes {spec.axes!r}, those of a convolution; "
                "mora_jax.merge merges it"
            )
        named, m = _names.modules_of(spec, known), to_numpy(spec.name, m)
        items += [(module, spec, m[module.index]) for module in named]
        unknown += [module.place for module in named if not module.name]
    if unknown:
        hint = _names.suggestion(unknown, ())
        raise ValueError(f"names have no module for the kernel {unknown[0]!r}; {hint}")
    return items


def whole_modules(adapters: Any, plan: Plan, names: Names) -> dict[str, np.ndarray]:
    """Return {tensor: numbers} of the arrays that the plan trains, as PyTorch has them.

    PEFT calls their modules `modules_to_save`.
    """
    known, whole = _names.pairs(names), {}
    for array, copy in trained_items(adapters, plan):
        tensor = next(_names.to_tensors(array.name, known), None)
        # A vector is the same in both, whatever its template says of axes.
        ndim, order = len(array.shape), tensor and tensor.order
        if tensor is None or ndim > 2 or order or ndim > len(tensor.axes):
            raise ValueError(
                f"{array.name}: names have no tensor of the shape {array.shape} for "
                "this trained array; io.merge_checkpoint merges it, and mora_jax.save "
                "holds it"
            )
        numbers = to_numpy(array.name, copy)
        whole[tensor.name] = numbers.T if tensor.axes == "oi" else numbers
    return whole
