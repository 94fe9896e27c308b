"""Adapters as plain LoRAs, for PEFT and for servers of language models."""

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from mora_jax._common.axes import sizes
from mora_jax._common.checks import check_choice, check_number, positive_integer
from mora_jax._layer.rounding import Rounding
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.paths import adapters_in
from mora_jax.io import _files, _names
from mora_jax.io._files import ADAPTER, CONFIG, TENSORS, PathLike, as_path, check_free
from mora_jax.io._json import dump
from mora_jax.io._merge_files import merge_checkpoint
from mora_jax.io._names import Names, Pair, bijection
from mora_jax.io._tensors import encode, to_numpy
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Source
from mora_jax.io.peft._modules import PREFIX, MatrixPair, rows_looked_up
from mora_jax.operators import LowRank
from mora_jax.operators.low_rank import nearest_factors

Rank = int | Literal["auto"] | None


def save_peft_lora(
    directory: PathLike,
    adapters: Any,
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
        convolution's, no kernel is adapted, a delta of full rank lacks a `rank`, or
        a module would lose more than `max_error`. Nothing is written.
    """
    path = check_free("directory", directory, ADAPTER, force)
    matrices, lost = _make_lora(adapters, names, rank, max_error)
    whole = _whole_modules(adapters, names)
    _write_peft(path, matrices, base_model, task_type, whole)
    return lost


def _make_lora(
    adapters: Any, names: Names, rank: Rank, max_error: float | int
) -> tuple[list[MatrixPair], dict[str, float]]:
    """The modules that `save_peft_lora` writes, and its result."""
    check_number("max_error", max_error)
    if not 0 <= max_error <= 1:
        raise ValueError(f"max_error must be between 0 and 1, got {max_error}")
    if rank is not None and rank != "auto":
        rank = positive_integer("rank", rank)
    matrices, lost, full, enough = [], {}, None, 1
    for pair, kernel, spec, m, outputs in _modules(adapters, names):
        name, table = pair.module, pair.is_table
        a, b, factor, lost[name], own = _factors(spec, m, outputs, rank, max_error)
        enough = max(enough, own)
        full = (kernel, spec) if rank is None and spec.operator.block else full
        if table:
            also = "io.merge_checkpoint changes both"
            a, b = rows_looked_up(kernel, spec.axes, name, a, b, also)
        matrices.append(MatrixPair(name, table, a, b, len(b), factor, pair.axes))
    advice = f"rank={enough} keeps every module within {max_error:.1%}, and "
    advice += "max_error=1 accepts any loss"
    if full is not None:
        raise ValueError(
            f"{full[0]}: a delta of {full[1].operator.name} has full rank; rank must "
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
    """A (in, r), B (r, out), a factor, the share that is lost, and the least rank.

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
    given = rank if isinstance(rank, int) else None
    a, b, lost, enough = nearest_factors(product, max_error, given)
    a = a if basis is None else basis @ a
    # At once in 32 bits, since the matrices of all modules are in memory together.
    return a.astype(np.float32), b.astype(np.float32), factor, lost, enough


def _write_peft(
    path: _files.Location,
    matrices: Sequence[MatrixPair],
    base_model: str,
    task_type: str | None,
    whole: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a directory, its config last.

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
    files = (TENSORS, [encode(tensors, {"format": "pt"})]), (CONFIG, [dump(config)])
    _files.write_directory(path, files)


def _modules(
    adapters: Any, names: Names
) -> list[tuple[Pair, str, AdapterSpec, np.ndarray, slice]]:
    """PyTorch's modules, each with the path and the spec of its kernel, M and outputs.

    Convolutions are refused.
    """
    known, items, unknown = bijection(names), [], []
    for path, adapter in adapters_in(adapters).kernels.items():
        # A convolution's axes are a window's, then "io" or "oi". With a window of two
        # axes or more no dense layer has the same. With a window of one axis some do: a
        # layer from heads to a width has "iio". Only names tell these apart.
        spec, kernel = adapter.spec, "/".join(path)
        axes = spec.axes.replace("s", "")
        called = re.search("conv", kernel, re.IGNORECASE)
        if re.fullmatch("ii+(io|oi)", axes) or called and axes in ("iio", "ioi"):
            raise ValueError(
                f"{kernel}: what is written here for PEFT must be of dense layers "
                f"and embeddings, got axes {spec.axes!r}, those of a convolution; "
                "mora_jax.merge merges it"
            )
        found = known.layers(kernel, *_names.stack_first(spec.kernel_shape, spec.axes))
        stack, m = sizes(spec.kernel_shape, spec.axes, "s"), to_numpy(kernel, adapter.m)
        width = spec.out_features * math.prod(stack) // len(found)
        for number, (index, pair) in enumerate(found.items()):
            if pair is None:
                unknown.append(_names.join_index(kernel, index))
                continue
            start = number * width % spec.out_features
            outputs = slice(start, start + width)
            items.append((pair, kernel, spec, m[index[: len(stack)]], outputs))
    if not items and not unknown:
        raise ValueError("adapters must hold one of a kernel to write, got none")
    if unknown:
        hint = _names.suggestion(unknown, ())
        raise ValueError(f"names have no module for the kernel {unknown[0]!r}; {hint}")
    return items


def _whole_modules(adapters: Any, names: Names) -> dict[str, np.ndarray]:
    """{tensor: numbers} of the arrays that train themselves, as PyTorch has them.

    PEFT calls their modules `modules_to_save`.
    """
    known, whole = bijection(names), {}
    for path, adapter in adapters_in(adapters).trained.items():
        name, shape = "/".join(path), adapter.spec.shape
        pair = next(known.of_leaf(name), None)
        # A vector is the same in both, whatever its template says of axes.
        axes = pair.kernel_axes if pair else ""
        if pair is None or len(axes) > 2 or len(shape) > len(axes):
            raise ValueError(
                f"{name}: names have no tensor of the shape {shape} for "
                "this trained array; io.merge_checkpoint merges it, and mora_jax.save "
                "holds it"
            )
        numbers = to_numpy(name, adapter.m)
        whole[pair.tensor] = numbers.T if pair.transposed else numbers
    return whole


# --- For servers ---

Server = Literal["vllm", "sglang"]

# SGLang takes any number. There a rank above the last of these is not written either,
# since it costs as much as the kernel.
RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512
"""The numbers that vLLM 0.32 takes for `--max-lora-rank`."""


class Export(NamedTuple):
    """Files that `export` wrote for a server.

    Attributes:
      rank: The largest rank of the LoRA; None if it is a merged checkpoint.
      lost: {module: the share of its delta that the LoRA cuts off}; for a merged
        checkpoint {tensor: the share that rounding lost}.
      command: A line for the shell that serves it.
    """

    rank: int | None
    lost: dict[str, float]
    command: str


def export(
    directory: PathLike,
    adapters: Any,
    server: Server,
    names: Names = None,
    *,
    base: PathLike | None = None,
    base_model: str = "",
    max_error: float | int = 0.1,
    force: bool = False,
    any_base: bool = False,
    rounding: Rounding = "dither",
    progress: Callable[[int], object] = lambda size: None,
) -> Export:
    """Write adapters as what vLLM or SGLang serves best, and say how.

    That is a LoRA as `save_peft_lora` writes it with `rank="auto"`. Where that takes
    more than rank 512, arrays of the base are trained themselves, or `base` shows that
    an adapted embedding is also the head, it is the base with the adapters merged in.

    Args:
      directory: The directory to make, a path or a URL.
      adapters: As in `save_peft_lora`.
      server: "vllm" or "sglang".
      names: As in `save_peft_lora`.
      base: The base's safetensors, for adapters that have to be merged. A base that has
        an embedding and no head is taken to be tied.
      base_model: The model that the server loads: a directory or a name on the Hub.
        `base` by default.
      max_error: As in `save_peft_lora`.
      force: True to replace an adapter by a LoRA, or a checkpoint by a merged one.
      any_base: As in `merge_checkpoint`.
      rounding: As in `merge_checkpoint`.
      progress: As in `merge_checkpoint`.

    Raises:
      ValueError: `server` is unknown, or the adapters have to be merged and `base` is
        None; or as `save_peft_lora`.
      AdapterFileError, OSError: As `merge_checkpoint`.
    """
    check_choice("server", server, get_args(Server))
    trained = [*map("/".join, adapters_in(adapters).trained)]
    path = as_path("directory", directory)
    if not force:
        check_free("directory", path, ADAPTER, force)  # before minutes are spent
    model = os.path.expanduser(base_model)
    if not model and base is not None:  # servers load the directory, not one file of it
        source = as_path("base", base)
        model = str(source.parent if source.is_file() else source)
    model = model or "<BASE: its directory, or its name on the Hub>"
    if trained:
        why = f"{trained[0]} trains itself, which a LoRA cannot hold, so"
    elif base is not None and _is_tied(base, adapters, names):
        why = ""  # the base is known
    else:
        matrices, lost = _make_lora(adapters, names, "auto", max_error)
        worst, *_, rank, _, _ = max(matrices, key=lambda pair: pair.rank)
        if len({pair.factor for pair in matrices}) > 1:
            # vLLM has one lora_alpha / r for all modules: 1, with the rest in B.
            matrices = [p._replace(b=p.factor * p.b, factor=1) for p in matrices]
        if rank <= RANKS[-1]:
            check_free("directory", path, ADAPTER, force)
            _write_peft(path, matrices, base_model, "CAUSAL_LM")
            return Export(rank, lost, _command(server, model, rank, str(path)))
        why = (
            f"{worst} needs rank {rank} to lose at most {max_error:.1%} of its "
            f"delta, and servers take {RANKS[-1]} at most; a larger max_error needs "
            "less, else"
        )
    if base is None:
        raise ValueError(f"{why} base must be given, to merge into it, got None")
    settings = {"any_base": any_base, "rounding": rounding, "progress": progress}
    lost = merge_checkpoint(base, adapters, path, names, force=force, **settings)
    return Export(None, lost, _command(server, str(path)))


def _is_tied(base: PathLike, adapters: Any, names: Names) -> bool:
    """True if an adapted embedding is the head, too, which a LoRA would miss."""
    known, tables = bijection(names), []
    for path, adapter in adapters_in(adapters).kernels.items():
        shape, axes = _names.stack_first(adapter.spec.kernel_shape, adapter.spec.axes)
        pairs = known.layers("/".join(path), shape, axes).values()
        tables += [pair.tensor for pair in pairs if pair and pair.is_table]
    # A base that nothing is merged into need not be of safetensors.
    source = Source(Checkpoint(base), names) if tables else None
    return source is not None and any(map(source.stands_for_two, tables))


def _command(server: Server, model: str, rank: int = 0, adapter: str = "") -> str:
    if server == "vllm":
        words = ["vllm", "serve", model]
        limit, option = next(n for n in RANKS if n >= rank), "--lora-modules"
    else:
        words = ["python", "-m", "sglang.launch_server", "--model-path", model]
        limit, option = rank, "--lora-paths"
    if adapter:
        named = f"{adapter.rpartition('/')[2]}={adapter}"
        words += ["--enable-lora", "--max-lora-rank", str(limit), option, named]
    return shlex.join(words)
