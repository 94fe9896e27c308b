"""MoRA as plain LoRA, for servers that know nothing else."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mora_jax._common.checks import check_number, positive_integer
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._files import ADAPTER, PathLike, check_free
from mora_jax.io._names import Names
from mora_jax.io.peft._modules import MatrixPair, rows_looked_up
from mora_jax.io.peft._write import modules, whole_modules, write_peft
from mora_jax.operators import LowRank
from mora_jax.operators.low_rank import cut_off, least_rank

Rank = int | Literal["auto"] | None


def save_peft_lora(
    directory: PathLike,
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
    orthogonal, subspace and hadamard) are LoRAs of rank q exactly: :math:`A = C`,
    :math:`B = \alpha M D`. Others have full rank, and only the `rank` largest of their
    singular values are kept. A LoRA ("low_rank") keeps its matrices bit for bit, and
    its alpha is PEFT's `lora_alpha / r`. An adapter of an embedding changes what is
    looked up, and not a head that is tied to it; a `MoRAWarning` says so.

    Args:
      directory: A path or a URL that `etils.epath` opens, new or empty. A local one is
        there whole or not at all.
      adapters: The adapters, as `init` makes them.
      plan: The plan that they follow.
      names: As in `load_peft`.
      rank: The most singular values that a module keeps, PEFT's `r`. "auto" keeps of
        a delta of full rank the fewest that lose no more than `max_error`, and all of
        the others. None keeps all of them and refuses deltas of full rank.
      max_error: The largest share of its delta that a module may lose, between 0 and
        1, measured by the Frobenius norm. 1 accepts any loss.
      base_model: PEFT's `base_model_name_or_path`.
      task_type: PEFT's `task_type`.
      force: True to replace an adapter that is in the directory.

    Returns:
      {module: norm(delta - LoRA) / norm(delta)}; 0 where nothing is cut off.

    Raises:
      FileExistsError, NotADirectoryError: The directory holds files, with `force` more
        than an adapter; or it is a file.
      ValueError: `names` lack a kernel's module or a trained array's, a kernel is a
        convolution's, the plan lacks adapters, a delta of full rank lacks a `rank`, or
        a module would lose more than `max_error`. Nothing is written.
    """
    path = check_free("directory", directory, ADAPTER, force)
    matrices, lost = make_lora(adapters, plan, names, rank, max_error)
    whole = whole_modules(adapters, plan, names)
    write_peft(path, matrices, base_model, task_type, whole)
    return lost


def make_lora(
    adapters: Any, plan: Plan, names: Names, rank: Rank, max_error: float | int
) -> tuple[list[MatrixPair], dict[str, float]]:
    """Return what `save_peft_lora` writes, and what it returns."""
    check_number("max_error", max_error)
    if not 0 <= max_error <= 1:
        raise ValueError(f"max_error must be between 0 and 1, got {max_error}")
    if rank is not None and rank != "auto":
        rank = positive_integer("rank", rank)
    matrices, lost, full, enough = [], {}, None, 1
    for module, spec, m in modules(adapters, plan, names):
        args = spec, m, module.outputs, rank, max_error
        a, b, factor, lost[module.name], own = _factors(*args)
        enough = max(enough, own)
        full = spec if rank is None and spec.operator.block else full
        if module.table:
            also = "io.merge_checkpoint changes both"
            a, b = rows_looked_up(spec, module.name, a, b, also)
        name, table, axes = module.name, module.table, module.axes
        matrices.append(MatrixPair(name, table, a, b, len(b), factor, axes))
    advice = f"rank={enough} keeps every module within {max_error:.1%}, and "
    advice += "max_error=1 accepts any loss"
    if full is not None:
        raise ValueError(
            f"{full.name}: a delta of {full.operator.name} has full rank; rank must "
            f"say how much of it to keep, got None; {advice}"
        )
    worst = max(lost, key=lost.__getitem__)
    if lost[worst] > max_error:
        raise ValueError(
            f"{worst} would lose {lost[worst]:.1%} of its delta at rank {rank}, more "
            f"than max_error={max_error:g}; {advice}"
        )
    return matrices, lost


def _factors(
    spec: AdapterSpec, m: np.ndarray, outputs: slice, rank: Rank, max_error: float
) -> tuple[np.ndarray, np.ndarray, float, float, int]:
    """Return A (in, r), B (r, out), a factor, what is lost, and the least rank to do.

    Factor times A B is what the LoRA keeps of the delta's columns `outputs`.
    """
    op, factor, basis = spec.operator, 1.0, None
    if isinstance(op, LowRank):  # a LoRA's matrices stay as they are
        factor = spec.factor
    else:
        m = op.scaled(m.astype(np.float32), spec.factor)
    if op.block:
        product = np.asarray(op.delta_weight(m), np.float64)[:, outputs]
    else:
        # The delta is C M D, so that A = C and B = M D keep all of it.
        a, b = map(np.asarray, op.factors(jnp.asarray(m)))
        if (b := b[:, outputs]).shape[1] < op.out_features:
            # Of a kernel that is several modules, each may have rows of its own.
            own = b.any(1) if b.any() else slice(1)
            a, b = a[:, own], b[own]
        if not isinstance(rank, int) or rank >= len(b):
            return a, b, factor, 0.0, len(b)
        # The basis is orthonormal: A B and R B, where A is Q R, have the same values.
        basis, triangle = np.linalg.qr(a.astype(np.float64))
        product = triangle @ b.astype(np.float64)
    left, values, right = np.linalg.svd(product, full_matrices=False)
    cut = cut_off(values)
    enough = least_rank(cut, max_error)
    rank = enough if rank == "auto" else rank
    a = left if basis is None else basis @ left
    a, b = a[:, :rank], (values[:, None] * right)[:rank]
    # At once in 32 bits, since the matrices of all modules are in memory together.
    a, b = a.astype(np.float32), b.astype(np.float32)
    return a, b, factor, float(cut[len(b)]), enough
