"""A base checkpoint, whose headers alone are in memory."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from mora_jax._common.axes import features, may_be_conv1d, order_by_c_attn
from mora_jax._common.types import Shape
from mora_jax.io._files import CONFIG, AdapterFileError, Location, PathLike, as_path
from mora_jax.io._json import read_json, short
from mora_jax.io._names import Names, Pair, bijection
from mora_jax.io._tensors import DTYPES, TensorFile

# Suffixes of a base's other files that are copied: configs, tokenizers and templates.
# Never pickles, which may run anything, and not its card, which is of another model.
COPIED = (".json", ".txt", ".model", ".jinja")
INDEX = ".safetensors.index.json"  # so ends the file that says where each tensor is

ORDERS = {"gpt2": "io", "gpt_neo": "oi", "gpt_bigcode": "oi"}
"""{model_type in a config: the order of axes of weights with GPT-2's names}."""


class Checkpoint:
    """A base in one or several safetensors files, whose headers are in memory.

    Args:
      path: As in `load_base`. Of a directory all files are read that its index names.

    Attributes:
      files: The files that hold tensors.
      beside: The other files of the directory that a copy needs, such as its config.
      place: {tensor: the file that holds it}.

    Raises:
      AdapterFileError: A file is missing, or two files hold the same tensor.
    """

    def __init__(self, path: PathLike) -> None:
        path = as_path("path", path)
        folder, listed, files = path.parent, [], [path]
        if path.is_dir():
            folder, listed = path, sorted(path.iterdir())
            files = _tensor_files(folder, listed)
        self.files = [TensorFile(file) for file in files]
        # With an adapter's config beside it, a merged model would be adapted twice.
        copied = (p for p in listed if p.suffix in COPIED and p.name != CONFIG)
        self.beside = [entry for entry in copied if entry.is_file()]
        self._config = folder / "config.json"
        self.place: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.entries:
                if (other := self.place.setdefault(name, file)) is not file:
                    both = f"{other.path.name} and in {file.path.name}"
                    raise AdapterFileError(f"{short(name)} is in {both}")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json there or beside the file, empty if it is missing."""
        found = read_json(self._config) if self._config.is_file() else {}
        return found if isinstance(found, dict) else {}

    def axes(self, tensor: str, pair: Pair, names: Names, array: Shape = ()) -> str:
        """The order of a weight's axes, for an array or to find its features."""
        if isinstance(names, str) or not may_be_conv1d(pair.module):
            return pair.axes
        widths = features(array, pair.kernel_axes) if array else (0, 0)
        if widths[0] != widths[1]:
            return "io" if self.place[tensor].entries[tensor].shape == widths else "oi"
        order = order_by_c_attn({n: file.entries[n] for n, file in self.place.items()})
        if order := order or ORDERS.get(str(self.config.get("model_type"))):
            return order
        rule = f"names must tell if {tensor!r} is a Conv1D's or a Linear's"
        why = f"since no c_attn and no model_type of {[*ORDERS]} there does"
        raise AdapterFileError(f"{rule}, by 'gpt2' or 'gpt_neo', {why}")

    def shapes(self, names: Names = None) -> dict[str, Any]:
        """The shapes (in_features, out_features) of kernels, as a params tree.

        Args:
          names: As in `load_peft`. Tensors without a path are left out, and a weight
            is refused if the order of its axes is not known.
        """
        known, leaves = bijection(names), {}
        for name, file in self.place.items():
            entry, module = file.entries[name], name.removesuffix(".weight")
            pair = next(known.of_module(module), None) if module != name else None
            is_matrix = len(entry.shape) == 2 and entry.dtype in DTYPES
            # One layer does not tell how large its stack is.
            if pair and is_matrix and "[" not in pair.kernel:
                order = self.axes(name, pair, names)
                shape = entry.shape if order == "io" else entry.shape[::-1]
                leaves[pair.kernel] = jax.ShapeDtypeStruct(shape, DTYPES[entry.dtype])
        return unflatten_dict(leaves, sep="/")


def _tensor_files(folder: Location, listed: Sequence[Location]) -> list[Location]:
    """The files that a directory's index names, or else all safetensors."""
    indices = [entry for entry in listed if entry.name.endswith(INDEX)]
    if not indices:
        if files := [file for file in listed if file.name.endswith(".safetensors")]:
            return files
        raise AdapterFileError(f"there is no *.safetensors in {folder}")
    index = read_json(indices[0])
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise AdapterFileError(f"{indices[0].name} must have a weight_map")
    files = sorted({str(name) for name in names.values()})
    for name in files:  # an index from a stranger may name any file of the machine
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            rule = f"{indices[0].name} must name files next to it"
            raise AdapterFileError(f"{rule}, got {short(name)}")
    return [folder / name for name in files]
