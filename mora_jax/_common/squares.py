"""The files that a server reads M's from: their version, and the digest in them."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

KEY = "mora_jax"
"""The entry of `adapter_config.json` that describes the modules."""

VERSION = 2
"""The version of that entry. The digest of version 1 did not cover the entry itself."""

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def digest(tensors: bytes, config: Mapping[str, Any]) -> str:
    """SHA-256 of the file of tensors and of all that the config says of modules.

    Args:
      tensors: the bytes of `adapter_model.safetensors`.
      config: the content of `adapter_config.json`. The digest that it holds already is
        left out, and so are entries that say nothing of modules, such as the base's
        name.
    """
    record = {key: value for key, value in config[KEY].items() if key != "sha256"}
    covered = {
        "tensors": hashlib.sha256(tensors).hexdigest(),
        "target_modules": config.get("target_modules"),
        "record": record,
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def read_checked(directory: str) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Read {module: its entry} and the bytes of the tensors, both as exported.

    Raises:
      ValueError: the directory is of another version of the format, or a module's entry
        or the tensors have changed since the export.
    """
    folder = pathlib.Path(directory)
    config = json.loads((folder / CONFIG).read_bytes())
    record = config[KEY]
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{directory} must have version {VERSION} of the format, got {version!r}: "
            "export it again with io.export(..., 'vllm', native=True), or update "
            "mora_jax"
        )
    tensors = (folder / TENSORS).read_bytes()
    expected = record.get("sha256")
    found = digest(tensors, config)
    if found != expected:
        raise ValueError(
            f"{directory} is damaged: {TENSORS} and the modules in {CONFIG} must be as "
            f"they were exported, with the digest {expected!r}, got {found!r}: export "
            "it again with io.export(..., 'vllm', native=True)"
        )
    return record["modules"], tensors
