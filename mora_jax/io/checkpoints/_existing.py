"""Directories that hold a checkpoint already, and may be replaced."""

import re

from mora_jax.io._files import entries
from mora_jax.io._locations import Location, size
from mora_jax.io.checkpoints._checkpoint import Checkpoint

BESIDE_A_MODEL = re.compile(
    r"(generation_|tokenizer_|(video_)?preprocessor_|processor_)?config\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|[\w.-]+\.model"
    r"|model[\w.-]*\.safetensors(\.index\.json)?"
)
"""Files that tools write beside a model, and never a person."""


def check_is_checkpoint(target: Location, checkpoint: Checkpoint) -> None:
    """Raise if a directory holds anything that a merged checkpoint does not.

    Args:
      target: A directory that is there.
      checkpoint: The base that is to be merged. Its tensors have the names that they
        will have, and copies of its other files are replaced by the same.

    Raises:
      FileExistsError: There is something else, such as an adapter.
    """
    tensors = {file.path.name for file in checkpoint.files}
    copied = {path.name: path for path in checkpoint.beside}

    def is_known(path: Location) -> bool:
        if not path.is_file():
            return False
        if path.name in tensors or BESIDE_A_MODEL.fullmatch(path.name):
            return True
        return path.name in copied and _are_equal(path, copied[path.name])

    found = entries(target)
    others = sorted(path.name for path in found if not is_known(path))
    if others or found and not any(p.name.endswith(".safetensors") for p in found):
        raise FileExistsError(
            f"force=True replaces a directory that holds nothing but a checkpoint, got "
            f"{target} with {others[:3] or 'no *.safetensors'}"
        )


def _are_equal(one: Location, other: Location) -> bool:
    return size(one) == size(other) and one.read_bytes() == other.read_bytes()
