"""MoRA as plain LoRA, for servers that know only that."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mora_jax._checks import check_number, positive_integer
from mora_jax._compute.delta import scaled
from mora_jax._plan import Plan
from mora_jax._spec import AdapterSpec
from mora_jax.io._names import Names, pairs
from mora_jax.io._peft_read import PREFIX
from mora_jax.io._peft_write import free, modules, peft_config, write


def save_peft_lora(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    names: Names = None,
    *,
    rank: int | None = None,
    max_error: float | int = 0.1,
    base_model: str = "",
    task_type: str | None = "CAUSAL_LM",
    force: bool = False,
) -> dict[str, float]:
    r"""Write adapters as a LoRA that Hugging Face PEFT, and servers, load.

    Sharing, truncation, orthogonal and hadamard have updates of rank q and are LoRAs
    of that rank exactly: :math:`A = C`, :math:`B = \alpha M D`. Other updates have full
    rank, and are cut to `rank` by singular values: that loses something, which is
    returned, and refused where it is more than `max_error`.

    Args:
      directory: A path or a URL that `etils.epath` opens, new or empty. A local one is
        there whole or not at all. On an object store the config is written last, so a
        killed process leaves a directory without one.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      names: as in `load_peft_mora`.
      rank: at most this many singular values of each layer are kept. None keeps
        all, which a full-rank update refuses.
      max_error: The largest share of its update that a module may lose, between 0 and
        1, measured by the Frobenius norm. 1 accepts any cut.
      base_model: what the config gives as `base_model_name_or_path`.
      task_type: the same in PEFT.
      force: Replace an adapter that is in the directory.

    Returns:
      {module: norm(update - LoRA) / norm(update)}; 0 where nothing is cut.

    Raises:
      FileExistsError: a directory that holds something, or with `force` anything but
        an adapter.
      ValueError: a kernel that `names` have no module for, a full-rank update without
        `rank`, a module that would lose more than `max_error`, or a plan without
        adapters. Nothing is written then.
    """
    check_number("max_error", max_error)
    if not 0 <= max_error <= 1:
        raise ValueError(f"max_error must be between 0 and 1, got {max_error}")
    if rank is not None:
        positive_integer("rank", rank)
    path = free(directory, force)
    tensors: dict[str, np.ndarray] = {}
    kept: dict[str, _Kept] = {}
    layouts, full = set(), None
    for module, layout, spec, m in modules(adapters, plan, pairs(names)):
        a, b, kept[module] = _factors(spec, m, rank)
        layouts.add(layout)
        if spec.operator.block and rank is None:
            full = spec
            continue
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.T
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.T
    if len(layouts) > 1:
        raise ValueError("modules must be all Linear or all Conv1D")
    if full is not None:
        raise ValueError(
            f"{full.name}: an update by {full.operator.name} has full rank; rank must "
            f"say how much of it to keep, got None; {_enough(kept, max_error)}"
        )
    lost = {module: one.lost for module, one in kept.items()}
    worst = max(lost, key=lost.__getitem__)
    if lost[worst] > max_error:
        raise ValueError(
            f"{worst} would lose {lost[worst]:.1%} of its update at rank {rank}, more "
            f"than max_error={max_error:g}; {_enough(kept, max_error)}"
        )
    ranks = {module: one.rank for module, one in kept.items()}
    config = peft_config(ranks, 0.0, layouts.pop(), base_model, task_type)
    write(path, config, tensors)
    return lost


class _Kept(NamedTuple):
    """What a LoRA keeps of an update.

    Attributes:
      rank: The LoRA's.
      values: The update's singular values, the largest first; empty where they are
        not known because nothing is cut off.
    """

    rank: int
    values: np.ndarray

    @property
    def lost(self) -> float:
        """The share of the update that is cut off."""
        tails = self._tails()
        return float(tails[self.rank]) if self.rank < len(tails) else 0.0

    def enough(self, max_error: float) -> int:
        """A rank that loses no more than `max_error`, the smallest if values say so."""
        tails = self._tails()
        return max(1, int(np.sum(tails > max_error))) if len(tails) else self.rank

    def _tails(self) -> np.ndarray:
        """The share of the update that each rank, from 0 on, cuts off."""
        squares = np.cumsum(self.values[::-1] ** 2)[::-1]
        return np.sqrt(squares / squares[0]) if squares.any() else squares


def _enough(kept: Mapping[str, _Kept], max_error: float) -> str:
    """Which arguments would do."""
    rank = max(one.enough(max_error) for one in kept.values())
    return (
        f"rank={rank} keeps every module within {max_error:.1%}, and max_error=1 "
        "accepts any loss"
    )


def _factors(
    spec: AdapterSpec, m: np.ndarray, rank: int | None
) -> tuple[np.ndarray, np.ndarray, _Kept]:
    """(in, r) and (r, out) whose product is the update, and what they keep of it."""
    op, m = spec.operator, scaled(spec, m)
    if op.block:
        delta = np.asarray(op.delta_weight(m), np.float64)
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        a, b = left, values[:, None] * right
    else:
        a = np.asarray(op.compress_matrix(), np.float64)
        b = np.asarray(op.decompress(m), np.float64)
        if rank is None or rank >= op.square_rank:
            return _float32(a, b, np.zeros(0))
        basis, triangle = np.linalg.qr(a)
        left, values, right = np.linalg.svd(triangle @ b, full_matrices=False)
        a, b = basis @ left, values[:, None] * right
    return _float32(a[:, :rank], b[:rank], values)


def _float32(
    a: np.ndarray, b: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, _Kept]:
    return a.astype(np.float32), b.astype(np.float32), _Kept(a.shape[1], values)
