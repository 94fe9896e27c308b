"""MoRA as plain LoRA, for servers that know only that."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.io._names import Names, pairs
from mora_jax.io._peft_read import PREFIX
from mora_jax.io._peft_write import modules, peft_config, write
from mora_jax.planning import Plan
from mora_jax.spec import AdapterSpec


def save_peft_lora(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    names: Names = None,
    *,
    rank: int | None = None,
    base_model: str = "",
    task_type: str | None = "CAUSAL_LM",
) -> dict[str, float]:
    r"""Write adapters as a LoRA that Hugging Face PEFT, and servers, load.

    Sharing, truncation, orthogonal and hadamard have updates of rank q and are LoRAs
    of that rank exactly: :math:`A = C`, :math:`B = \alpha M D`. Other updates have full
    rank, and are cut to `rank` by singular values: that loses something, which is
    returned.

    Args:
      directory: new or empty.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      names: as in `load_peft_mora`.
      rank: at most this many singular values of each layer are kept. None keeps
        all, which a full-rank update refuses.
      base_model: what the config gives as `base_model_name_or_path`.
      task_type: the same in PEFT.

    Returns:
      {module: norm(update - LoRA) / norm(update)}; 0 where nothing is cut.

    Raises:
      FileExistsError: a directory that holds something.
      ValueError: a kernel that `names` have no module for, a full-rank update without
        `rank`, or a plan without adapters.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    lost: dict[str, float] = {}
    layouts = set()
    for module, layout, spec, m in modules(adapters, plan, pairs(names)):
        a, b, lost[module] = _factors(spec, m, rank)
        layouts.add(layout)
        ranks[module] = a.shape[1]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.T
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.T
    if len(layouts) > 1:
        raise ValueError("modules must be all Linear or all Conv1D")
    config = peft_config(ranks, 0.0, layouts.pop(), base_model, task_type)
    write(Path(directory), config, tensors)
    return lost


def _factors(
    spec: AdapterSpec, m: np.ndarray, rank: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """(in, r) and (r, out) whose product is the update, and the share that is cut."""
    op = spec.operator
    if op.block:
        if rank is None:
            raise ValueError(
                f"{spec.name}: an update by {op.name} has full rank; rank must say how "
                "much of it to keep, got None"
            )
        delta = np.asarray(op.delta_weight(m), np.float64)
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        a, b = left, values[:, None] * right
    else:
        a = np.asarray(op.compress_matrix(), np.float64)
        b = np.asarray(op.decompress(m), np.float64)
        if rank is None or rank >= op.square_rank:
            return _float32(a, spec.alpha * b, 0.0)
        basis, triangle = np.linalg.qr(a)
        left, values, right = np.linalg.svd(triangle @ b, full_matrices=False)
        a, b = basis @ left, values[:, None] * right
    norm = np.linalg.norm(values)
    lost = np.linalg.norm(values[rank:]) / norm if norm else 0.0
    return _float32(a[:, :rank], spec.alpha * b[:rank], float(lost))


def _float32(a: np.ndarray, b: np.ndarray, lost: float) -> Any:
    return a.astype(np.float32), b.astype(np.float32), lost
