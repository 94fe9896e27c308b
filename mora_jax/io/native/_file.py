"""The file of an adapter: one safetensors file that holds all that counts.

Its tensors are what is trained. Its metadata hold a text, the config: the plan, what
the user wants to keep, and digests. `adapter_config.json` beside it is that text again
for people to read, and no reader needs it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mora_jax._plan.plan import Plan
from mora_jax._tree.adapters import Tree, adapter_items, nest, trained_items
from mora_jax._tree.paths import adapter_path
from mora_jax.io import _tensors
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS
from mora_jax.io._json import dump, parse, read_json, short
from mora_jax.io._locations import Location
from mora_jax.io._tensors import metadata_of, read_header, to_jax, to_numpy
from mora_jax.io.native._layers import Base
from mora_jax.io.native._records import check_plan_record, describe_plan, restore_plan

FORMAT = "mora_jax adapter"

KEY = "mora_jax"
"""The only key of the file's metadata, whose text is the config."""

WHERE = f"the config in {TENSORS}"
"""The name of the config in messages."""


def encode(adapters: Any, plan: Plan, metadata: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return the content of the file, and its config.

    `metadata` are the values that the user wants to keep, as JSON holds them.
    """
    arrays: dict[str, np.ndarray] = {}
    dtypes = {}
    for spec, m in adapter_items(adapters, plan):
        name = "/".join(adapter_path(spec))
        arrays[name] = to_numpy(name, m)
        dtypes[spec.name] = m.dtype
        if spec.operator.given:
            fields = spec.operator.arrays
            arrays |= {f"{name}/{f}": getattr(spec.operator, f) for f in fields}
    for array, copy in trained_items(adapters, plan):
        arrays[array.name] = to_numpy(array.name, copy)
    content = describe_plan(plan, FORMAT, dtypes)
    content |= {"metadata": metadata, "tensors_sha256": _digest_of(arrays)}
    config = dump(content | {"sha256": _sha256(dump(content))})
    return _tensors.encode(arrays, {KEY: config.decode()}), config


def decode(data: bytes, content: Mapping[str, Any], base: Base) -> tuple[Tree, Plan]:
    """Return the adapters in a file and their plan, everything checked.

    `data` is the content of the file, `content` its config, as `parse_config` gives
    it, and `base` the model that the adapters must fit.
    """
    arrays = _tensors.decode(data, TENSORS)
    if not content["layers"]:
        raise AdapterFileError(f"{WHERE} must have an adapter, got none")
    if content["tensors_sha256"] != _digest_of(arrays):
        raise AdapterFileError(f"{TENSORS} is damaged: the SHA-256 of tensors differs")
    plan, leaves = restore_plan(content, WHERE, base, arrays)
    if arrays:
        raise AdapterFileError(
            f"{TENSORS} holds {short(sorted(arrays))}, about which its config knows "
            "nothing"
        )
    return nest({path: to_jax("/".join(path), a) for path, a in leaves.items()}), plan


def parse_config(data: bytes) -> dict[str, Any]:
    """Return the config of a file, its format, version, types and digest checked.

    `data` is the content of the file, or its header alone.
    """
    texts, hint = metadata_of(data, TENSORS), "io.load_peft_mora reads PEFT's"
    if texts.keys() != {KEY} or not isinstance(texts[KEY], str):
        raise AdapterFileError(
            f"{TENSORS} is not of mora_jax: its metadata must hold {KEY!r} alone, got "
            f"{short(sorted(texts))}; {hint}"
        )
    kinds = {"metadata": dict, "tensors_sha256": str, "sha256": str}
    content = parse(texts[KEY].encode(), WHERE)
    content = check_plan_record(content, FORMAT, kinds, WHERE, hint)
    signed = {key: value for key, value in content.items() if key != "sha256"}
    if content["sha256"] != _sha256(dump(signed)):
        raise AdapterFileError(f"{WHERE} is damaged or edited: its SHA-256 differs")
    return content


def check_copy(directory: Location, content: Mapping[str, Any]) -> None:
    """Raise if the readable copy of the config is there and says something else.

    Someone has edited it then, or has replaced one of the two files.
    """
    path = directory / CONFIG
    if path.exists() and dump(read_json(path)) != dump(content):
        raise AdapterFileError(
            f"{CONFIG} in {directory} is edited, damaged or of another adapter: it "
            f"differs from the config in {TENSORS}, which alone is read; delete the "
            "copy, and the next save writes it again"
        )


def is_ours(directory: Location, name: str) -> bool:
    """Return True if a file of a directory says that it is of this format.

    `name` is that of the config or of the tensors. If the file is so damaged that it
    says nothing, that is an `AdapterFileError`.
    """
    if name == TENSORS:
        return KEY in metadata_of(read_header(directory / name), name)
    content = read_json(directory / name)
    return isinstance(content, dict) and content.get("format") == FORMAT


def _digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the bytes of all arrays in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
