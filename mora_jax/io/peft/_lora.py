"""MoRA as plain LoRA, for servers that know nothing else."""

import functools
import os
from typing import Any, Literal, NamedTuple

import numpy as np

from mora_jax._common.checks import check_number, positive_integer
from mora_jax._common.warnings import warn
from mora_jax._layer.equation import scaled
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._names import Names
from mora_jax.io.peft._read_mora import PREFIX
from mora_jax.io.peft._write import PeftFiles, free, modules
from mora_jax.operators import Operator

Rank = int | Literal["auto"] | None

LAYER_NAMES = "lora_A.weight", "lora_B.weight"
TABLE_NAMES = "lora_embedding_A", "lora_embedding_B"
"""PEFT's names of A and B of a layer, and of an embedding."""


def save_peft_lora(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    names: Names = None,
    *,
    rank: Rank = None,
    max_error: float | int = 0.1,
    base_model: str = "",
    task_type: str | None = "CAUSAL_LM",
    force: bool = False,
) -> dict[str, float]:
    r"""Write adapters as a LoRA that Hugging Face PEFT and servers load.

    The deltas of operators without blocks (sharing, signed_sharing, truncation,
    orthogonal, subspace and hadamard) have rank q and are LoRAs of that rank exactly:
    :math:`A = C`, :math:`B = \alpha M D`. The deltas of other operators have full rank,
    and only the `rank` largest of their singular values are kept. What each module
    loses by that is returned, and a loss of more than `max_error` is refused. An
    adapter of an embedding changes what is looked up, and not a head that is tied to
    it; a `MoRAWarning` says so.

    Args:
      directory: A path or a URL that `etils.epath` opens, new or empty. A local
        directory is there whole or not at all. On an object store the config is written
        last, so a killed process leaves a directory without a config.
      adapters: The adapters, as `init` makes them.
      plan: The plan that they follow.
      names: As in `load_peft_mora`.
      rank: The most singular values that a module keeps, PEFT's `r`. "auto" keeps of
        a delta of full rank the fewest that lose no more than `max_error`, and all of
        the others. None keeps all of them and refuses deltas of full rank.
      max_error: The largest share of its delta that a module may lose, between 0 and
        1, measured by the Frobenius norm. 1 accepts any loss.
      base_model: PEFT's `base_model_name_or_path`.
      task_type: PEFT's `task_type`.
      force: Whether to replace an adapter that is in the directory.

    Returns:
      {module: norm(delta - LoRA) / norm(delta)}; 0 where nothing is cut off.

    Raises:
      FileExistsError: The directory is not empty; with `force`, it holds something
        other than an adapter.
      ValueError: `names` lack a module for a kernel, a kernel is a convolution's, a
        delta of full rank is given without `rank`, a module would lose more than
        `max_error`, or the plan lacks adapters or trains arrays itself. Nothing is
        written then.
    """
    path = free(directory, force)
    files, lost = make_lora(adapters, plan, names, rank, max_error)
    files.write(path, base_model, task_type)
    return lost


def make_lora(
    adapters: Any, plan: Plan, names: Names, rank: Rank, max_error: float | int
) -> tuple[PeftFiles, dict[str, float]]:
    """Return adapters as a LoRA, and {module: the share of its delta that is lost}.

    Arguments and errors are as in `save_peft_lora`.
    """
    check_number("max_error", max_error)
    if not 0 <= max_error <= 1:
        raise ValueError(f"max_error must be between 0 and 1, got {max_error}")
    if rank is not None and rank != "auto":
        rank = positive_integer("rank", rank)
    files = PeftFiles()
    factors: dict[str, _Factors] = {}
    axes, full = set(), None
    for module, spec, m in modules(adapters, plan, names):
        a, b, values = factors[module.name] = _factors(
            spec, m, rank, max_error, module.outputs
        )
        if module.table:
            warn(
                f"{spec.name}: PEFT and servers adapt the lookup of {module.name}, and "
                "not a head that is tied to it; io.merge_checkpoint changes both"
            )
        else:
            axes.add(module.axes)
        if rank is None and len(values):
            full = spec
        if module.table and module.axes == "oi":  # the rows are its outputs
            a, b = b.T, a.T
        a_name, b_name = TABLE_NAMES if module.table else LAYER_NAMES
        files.tensors[f"{PREFIX}{module.name}.{a_name}"] = a.T
        files.tensors[f"{PREFIX}{module.name}.{b_name}"] = b.T
    if len(axes) > 1:
        raise ValueError("modules must be all Linear or all Conv1D")
    enough = max(f.enough(max_error) for f in factors.values())
    advice = (
        f"rank={enough} keeps every module within {max_error:.1%}, and max_error=1 "
        "accepts any loss"
    )
    if full is not None:
        raise ValueError(
            f"{full.name}: a delta of {full.operator.name} has full rank; rank must "
            f"say how much of it to keep, got None; {advice}"
        )
    lost = {module: f.lost for module, f in factors.items()}
    worst = max(lost, key=lost.__getitem__)
    if lost[worst] > max_error:
        raise ValueError(
            f"{worst} would lose {lost[worst]:.1%} of its delta at rank {rank}, more "
            f"than max_error={max_error:g}; {advice}"
        )
    files.ranks = {module: f.rank for module, f in factors.items()}
    files.axes = axes.pop() if axes else "oi"
    return files, lost


class _Factors(NamedTuple):
    """A module's part in a LoRA.

    Attributes:
      a: (in, r).
      b: (r, out); `a @ b` is what the LoRA keeps of the delta.
      values: All singular values of the delta, the largest first; empty if they are
        not known because nothing is cut off.
    """

    a: np.ndarray
    b: np.ndarray
    values: np.ndarray

    @property
    def rank(self) -> int:
        """The rank r of the LoRA."""
        return self.a.shape[1]

    @property
    def lost(self) -> float:
        """The share of the delta that is cut off."""
        return float(_cut_off(self.values)[self.rank]) if len(self.values) else 0.0

    def enough(self, max_error: float) -> int:
        """Return a rank that loses at most `max_error`, the least that is known."""
        return _enough(self.values, max_error) if len(self.values) else self.rank


def _cut_off(values: np.ndarray) -> np.ndarray:
    """Return the share of a delta that each rank, from 0 on, cuts off."""
    squares = np.cumsum(np.append(values, 0)[::-1] ** 2)[::-1]
    return np.sqrt(squares / squares[0]) if squares.any() else squares


def _enough(values: np.ndarray, max_error: float) -> int:
    """Return the least rank that cuts off at most `max_error`, but at least 1."""
    return max(1, int(np.sum(_cut_off(values) > max_error)))


@functools.singledispatch
def exact_factors(op: Operator, m: np.ndarray) -> tuple[Any, Any] | None:
    """Return A (in, r) and B (r, out) whose product is the delta; None if r is large.

    A delta without blocks is C M D, so that A = C and B = M D. An operator of another
    kind registers a function of its own.
    """
    return None if op.block else (op.compress_matrix(), op.decompress(m))


def _factors(
    spec: AdapterSpec, m: np.ndarray, rank: Rank, max_error: float, outputs: slice
) -> _Factors:
    """Return the factors of the delta's columns `outputs`.

    A delta of full rank is decomposed as a whole. Where less is to be kept of another
    one, A B, A is Q R: since Q is orthonormal, A B and R B have the same singular
    values.
    """
    op, m = spec.operator, scaled(spec, m)
    exact = exact_factors(op, m)
    if exact is None:
        b = np.asarray(op.delta_weight(m), np.float64)[:, outputs]
        basis = None
    else:
        a, b = (np.asarray(factor, np.float64) for factor in exact)
        b = b[:, outputs]
        if not isinstance(rank, int) or rank >= a.shape[1]:
            return _Factors(a.astype(np.float32), b.astype(np.float32), np.zeros(0))
        basis, triangle = np.linalg.qr(a)
        b = triangle @ b
    left, values, right = np.linalg.svd(b, full_matrices=False)
    a = left if basis is None else basis @ left
    if rank == "auto":
        rank = _enough(values, max_error)
    a, b = a[:, :rank], (values[:, None] * right)[:rank]
    return _Factors(a.astype(np.float32), b.astype(np.float32), values)
