"""Adapters as plain LoRAs, for PEFT and for servers of language models."""

import dataclasses
import math
import os
import pathlib
import re
import shlex
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from mora_jax._common.axes import may_be_conv1d
from mora_jax._common.checks import check_choice, check_number, positive_integer
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.paths import adapters_in
from mora_jax.io import _files, _names
from mora_jax.io._files import ADAPTER, CONFIG, TENSORS, PathLike, check_free
from mora_jax.io._json import dump, read_json
from mora_jax.io._names import Names, bijection
from mora_jax.io._tensors import encode, to_numpy
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Source
from mora_jax.io.peft._modules import PREFIX, MatrixPair, turned
from mora_jax.io.peft._squares import Module, write_squares
from mora_jax.operators import LowRank
from mora_jax.operators.low_rank import nearest_factors

Program = Literal["peft", "vllm", "sglang"]

# What vLLM 0.32 takes for `--max-lora-rank`. SGLang takes any number, but a rank above
# the last of these is not written for it either, since it costs as much as the kernel.
RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512

MERGE = (
    "io.merge_checkpoint(base, adapters, out, names), or mora-jax merge BASE ADAPTER "
    "OUT, makes a checkpoint that holds all of it"
)
"""The remedy where a LoRA does not do, as the end of a message."""


class Export(NamedTuple):
    """A LoRA that `export` wrote.

    Attributes:
      rank: The largest rank of its modules.
      lost: {module: norm(delta - LoRA) / norm(delta)}; 0 where nothing is cut off.
      command: A line that loads it: of Python for PEFT, of the shell for a server.
    """

    rank: int
    lost: dict[str, float]
    command: str


def export(
    directory: PathLike,
    adapters: Any,
    program: Program,
    names: Names = None,
    *,
    rank: int | None = None,
    max_error: float | int = 0.1,
    base_model: PathLike = "",
    task_type: str | None = None,
    native: bool = False,
    force: bool = False,
) -> Export:
    r"""Write adapters as a LoRA that Hugging Face PEFT or a server loads.

    The deltas of operators without blocks (sharing, signed_sharing, truncation,
    orthogonal, subspace and hadamard) are LoRAs of rank q exactly: :math:`A = C`,
    :math:`B = \alpha M D`. Others have full rank, and only the largest of their
    singular values are kept. A LoRA ("low_rank") keeps its matrices bit for bit, and
    its alpha is PEFT's `lora_alpha / r`; for servers, which have one such factor, other
    factors are multiplied into B. An adapter of an embedding changes what is looked up,
    and not a head that is tied to it; a `MoRAWarning` says so.

    Args:
      directory: As in `load`, new or empty. A local one is there whole or not at all.
      adapters: The adapters, as `init` makes them.
      program: "peft", or the server "vllm" or "sglang".
      names: As in `load_peft`.
      rank: The most singular values that a module keeps, PEFT's `r`. None keeps all,
        and of a delta of full rank the fewest that lose no more than `max_error`.
      max_error: The largest share of its delta that a module may lose, between 0 and
        1, measured by the Frobenius norm. 1 accepts any loss.
      base_model: The base, a directory or a name on the Hub. It is PEFT's
        `base_model_name_or_path`, and the model in a server's command. A kernel that
        `names` lack is the module of its path if a directory has such a tensor.
      task_type: PEFT's `task_type`. None is "CAUSAL_LM" if `base_model` is a directory
        with the config of a causal model, and otherwise leaves it out, for any model.
      native: True to write M's as they are, without loss, for a vLLM that has this
        library beside it (docs/vllm.md). `max_error` and `task_type` mean nothing then.
      force: True to replace an adapter that is in the directory.

    Raises:
      FileExistsError, NotADirectoryError: The directory holds files, with `force` more
        than an adapter; or it is a file.
      ValueError: `program` is unknown; `names` lack a kernel's module or a trained
        array's, a kernel is a convolution's, no kernel is adapted, or a module would
        lose more than `max_error`; for a server also if arrays train themselves, or a
        module needs more than rank 512; with `native` if `program` is not "vllm", a
        rank is given, or a kernel is an embedding's or has a LoRA. Nothing is written.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> config = mora_jax.MoRAConfig(rank=2, operator="signed_sharing")
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((64, 64))}}, config)
      >>> out, names = tempfile.mkdtemp(), {"fc": "fc/kernel"}
      >>> done = mora_jax.io.export(out, mora_jax.init(plan), "peft", names)
      >>> done.rank, done.lost
      (16, {'fc': 0.0})
    """
    check_choice("program", program, get_args(Program))
    max_error = check_number(
        "max_error", max_error, lambda error: 0 <= error <= 1, "be from 0 to 1"
    )
    rank = None if rank is None else positive_integer("rank", rank)
    if isinstance(base_model, os.PathLike):
        base_model = os.fspath(base_model)
    if not isinstance(base_model, str):
        rule = "base_model must be a directory or a name on the Hub"
        raise TypeError(f"{rule}, got {base_model!r:.80}")
    if not isinstance(task_type, str | None):
        rule = "task_type must be one of PEFT's, such as 'CAUSAL_LM'"
        raise TypeError(f"{rule}, got {task_type!r:.80}")
    path = check_free("directory", directory, ADAPTER, force)
    whole = _trained(adapters, names, program)
    modules = _modules(adapters, names, base_model)
    if native:
        if program != "vllm" or rank is not None:
            rule = "native=True must be for 'vllm' and without a rank"
            raise ValueError(f"{rule}, got {program!r} and {rank}")
        write_squares(path, modules, base_model)
        lost = {pair.module: 0.0 for pair, *_ in modules}
        return Export(1, lost, _command(program, base_model, 1, str(path)))
    matrices, lost = _make_lora(modules, names, rank, max_error)
    worst, *_, most, _, _ = max(matrices, key=lambda pair: pair.rank)
    if program != "peft":
        if most > (limit := RANKS[-1]):
            needs = f"needs rank {most} to lose at most {max_error:.1%} of its delta"
            cut = f"servers take {limit} at most; rank={limit} with a larger max_error"
            raise ValueError(f"{worst} {needs}, and {cut} cuts it, and {MERGE}")
        if len({pair.factor for pair in matrices}) > 1:
            # vLLM has one lora_alpha / r for all modules: 1, with the rest in B.
            matrices = [p._replace(b=p.factor * p.b, factor=1) for p in matrices]
    task = task_type or _task_of(base_model)
    of_base = {"base_model_name_or_path": base_model, "task_type": task}
    _files.write_directory(path, _contents(matrices, whole, of_base))
    return Export(most, lost, _command(program, base_model, most, str(path)))


def _command(program: Program, model: str, rank: int, adapter: str) -> str:
    if program == "peft":
        return f"peft.PeftModel.from_pretrained(model, {adapter!r})"
    base = os.path.expanduser(model) or "<BASE: its directory, or its name on the Hub>"
    if program == "vllm":
        words = ["vllm", "serve", base]
        limit, option = next(n for n in RANKS if n >= rank), "--lora-modules"
    else:
        words = ["python", "-m", "sglang.launch_server", "--model-path", base]
        limit, option = rank, "--lora-paths"
    named = f"{adapter.rpartition('/')[2]}={adapter}"
    words += ["--enable-lora", "--max-lora-rank", str(limit), option, named]
    return shlex.join(words)


def _task_of(base_model: str) -> str | None:
    """PEFT's task of a causal model in a directory; None of any other base."""
    config = pathlib.Path(os.path.expanduser(base_model), "config.json")
    found = read_json(config) if base_model and config.is_file() else None
    names = found.get("architectures") if isinstance(found, dict) else None
    causal = re.search(r"(ForCausalLM|LMHeadModel)\b", str(names))
    return "CAUSAL_LM" if causal else None


def _make_lora(
    modules: list[Module], names: Names, rank: int | None, max_error: float | int
) -> tuple[list[MatrixPair], dict[str, float]]:
    """The modules that `export` writes, and the share of its delta that each loses."""
    matrices, lost, enough = [], {}, 1
    for pair, kernel, spec, m, outputs in modules:
        name = pair.module
        a, b, factor, lost[name], own = _factors(spec, m, outputs, rank, max_error)
        enough = max(enough, own)
        # Of names with either order the weight is the kernel's transpose.
        either = may_be_conv1d(name) and not isinstance(names, str)
        order = pair.kernel_axes[::-1] if either else pair.axes
        found = MatrixPair(name, pair.is_table, a, b, len(b), factor, order)
        also = "io.merge_checkpoint changes both"
        matrices.append(turned(found, kernel, spec.axes, also))
    worst = max(lost, key=lost.__getitem__)
    if lost[worst] > max_error:
        loses = f"would lose {lost[worst]:.1%} of its delta at rank {rank}"
        remedy = f"rank={enough} keeps all within it, and max_error=1 accepts any loss"
        raise ValueError(f"{worst} {loses}, more than {max_error=:g}; {remedy}")
    return matrices, lost


def _factors(
    spec: AdapterSpec, m: np.ndarray, outputs: slice, rank: int | None, max_error: float
) -> tuple[np.ndarray, np.ndarray, float, float, int]:
    """A (in, r), B (r, out), a factor, the share that is lost, and the least rank."""
    # Factor times A B is what the LoRA keeps of the delta's columns `outputs`.
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
        if rank is None or rank >= len(b):
            return a, b, factor, 0.0, len(b)
        # The basis is orthonormal: A B and R B, where A is Q R, have the same values.
        basis, triangle = np.linalg.qr(a.astype(np.float64))
        product = triangle @ b.astype(np.float64)
    a, b, lost, enough = nearest_factors(product, max_error, rank)
    a = a if basis is None else basis @ a
    # At once in 32 bits, since the matrices of all modules are in memory together.
    return a.astype(np.float32), b.astype(np.float32), factor, lost, enough


def _contents(
    matrices: list[MatrixPair], whole: dict[str, np.ndarray], of_base: dict[str, Any]
) -> _files.Files:
    """The tensors of modules, and of `whole` by their names, and then the config."""
    tensors, ranks, alphas = {}, {}, {}
    for name, table, a, b, r, factor, _ in matrices:
        start, end = ("embedding_", "") if table else ("", ".weight")
        for letter, matrix in ("A", a), ("B", b):
            tensors[f"{PREFIX}{name}.lora_{start}{letter}{end}"] = matrix.T
        ranks[name], alphas[name] = r, factor * r
    saved, biases = set(), set()
    for name, array in whole.items():
        module, _, last = name.rpartition(".")
        # PEFT saves modules with all that they have, and biases alone by themselves.
        alone = last == "bias" and f"{module}.weight" not in whole
        (biases if alone else saved).add(module)
        own = f"{module}.base_layer.bias" if module in ranks else name
        tensors[f"{PREFIX}{own}"] = array
    bias = "lora_only" if biases <= ranks.keys() else "all"
    # Servers make room for `r`, so it is the largest rank.
    rank, alpha = max(zip(ranks.values(), alphas.values(), strict=True))
    config = of_base | {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": bias if biases else "none",
        # PEFT corrects the order where a module is of the other kind.
        "fan_in_fan_out": {pair.axes for pair in matrices if not pair.table} == {"io"},
    }
    if saved:
        config["modules_to_save"] = sorted(saved)
    return (TENSORS, [encode(tensors, {"format": "pt"})]), (CONFIG, [dump(config)])


def _modules(adapters: Any, names: Names, base_model: str) -> list[Module]:
    """PyTorch's modules, each with path and spec of its kernel, M and outputs."""
    known, items, missing = bijection(names), [], []
    folder, base = pathlib.Path(os.path.expanduser(base_model)), None
    for path, adapter in adapters_in(adapters).kernels.items():
        # A convolution's axes are a window's, then "io" or "oi". With a window of two
        # axes or more no dense layer has the same. With a window of one axis some do: a
        # layer from heads to a width has "iio". Only names tell these apart.
        spec, kernel = adapter.spec, "/".join(path)
        axes = spec.axes.replace("s", "")
        called = re.search("conv", kernel, re.IGNORECASE)
        if re.fullmatch("ii+(io|oi)", axes) or called and axes in ("iio", "ioi"):
            rule = "what PEFT can have must be of dense layers and embeddings"
            got = f"got axes {spec.axes!r} of a convolution; mora_jax.merge merges it"
            raise ValueError(f"{kernel}: {rule}, {got}")
        place = _names.stack_first(spec.kernel_shape, spec.axes)
        found = known.layers(kernel, *place)
        if None in found.values() and base_model and any(folder.glob("*.safetensors")):
            base = base or Source(Checkpoint(folder), names)
            found = known.layers(kernel, *place, there=base.named)
            base.stack(kernel, *place)  # compares shapes
        stack, m = spec.stack_shape, to_numpy(kernel, adapter.m)
        width = spec.out_features * math.prod(stack) // len(found)
        for number, (index, pair) in enumerate(found.items()):
            if pair is None:
                missing.append(_names.join_index(kernel, index))
                continue
            start = number * width % spec.out_features
            index = index[: len(stack)]
            one = dataclasses.replace(spec, operator=spec.operator.at(index))
            items.append((pair, kernel, one, m[index], slice(start, start + width)))
    if missing:
        what = f"names have no module for the kernel {missing[0]!r}"
        remedy = "base_model=<a directory> finds those that are called as they are here"
        raise ValueError(f"{what}; {remedy}; {_names.templates(missing)}")
    if not items:
        raise ValueError("adapters must hold one of a kernel to write, got none")
    return items


def _trained(adapters: Any, names: Names, program: Program) -> dict[str, np.ndarray]:
    """{tensor: numbers} of the arrays that train themselves, as PyTorch has them."""
    known, whole = bijection(names), {}
    for path, adapter in adapters_in(adapters).trained.items():
        name, shape = "/".join(path), adapter.spec.shape
        if program != "peft":
            why = "which a LoRA for a server cannot hold"
            raise ValueError(f"{name} trains itself, {why}; {MERGE}")
        pair = next(known.of_leaf(name), None)
        # A vector is the same in both, whatever its template says of axes.
        axes = pair.kernel_axes if pair else ""
        if pair is None or len(axes) > 2 or len(shape) > len(axes):
            lacks = f"names have no tensor of the shape {shape} for this trained array"
            raise ValueError(f"{name}: {lacks}; {MERGE}")
        numbers = to_numpy(name, adapter.m)
        whole[pair.tensor] = numbers.T if pair.transposed else numbers
    return whole
