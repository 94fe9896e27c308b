"""Adapters in a form that a server of language models loads."""

import os
import shlex
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from mora_jax._common.checks import check_choice
from mora_jax._layer.rounding import Rounding
from mora_jax._tree.paths import adapters_in
from mora_jax.io._files import ADAPTER, PathLike, as_path, check_free
from mora_jax.io._merge_files import merge_checkpoint
from mora_jax.io._names import Names, bijection, stack_first
from mora_jax.io.checkpoints._checkpoint import Checkpoint
from mora_jax.io.checkpoints._matching import Source
from mora_jax.io.peft._write import make_lora, write_peft

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
        matrices, lost = make_lora(adapters, names, "auto", max_error)
        worst, *_, rank, _, _ = max(matrices, key=lambda pair: pair.rank)
        if len({pair.factor for pair in matrices}) > 1:
            # vLLM has one lora_alpha / r for all modules: 1, with the rest in B.
            matrices = [p._replace(b=p.factor * p.b, factor=1) for p in matrices]
        if rank <= RANKS[-1]:
            check_free("directory", path, ADAPTER, force)
            write_peft(path, matrices, base_model, "CAUSAL_LM")
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
        shape, axes = stack_first(adapter.spec.kernel_shape, adapter.spec.axes)
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
