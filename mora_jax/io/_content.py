"""What the two files of an adapter hold."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.paths import adapter_path
from mora_jax.io._arrays import to_jax
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS
from mora_jax.io._format import layer_path, restore
from mora_jax.io._json import dump, parse, short
from mora_jax.io._tensors import decode
from mora_jax.io._trained import restore_trained

FORMAT, VERSION, VERSION_WITHOUT_TRAINED = "mora_jax adapter", 3, 2
"""Version 2 added `base_digest` to each layer, and version 3 arrays that train
themselves. All are read; files without such arrays are still written as version 2."""

KEYS = frozenset(
    {
        "format",
        "format_version",
        "library_version",
        "base_parameters",
        "traced",
        "layers",
        "metadata",
        "tensors_bytes",
        "tensors_sha256",
        "sha256",
    }
)


def digest_of(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()


def parse_config(data: bytes) -> dict[str, Any]:
    """The parsed config, with its format, version, digest and types checked."""
    content = parse(data, CONFIG)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterFileError(
            f"{CONFIG} is not of mora_jax: its format must be {FORMAT!r}; "
            "io.load_peft_mora reads the reference's"
        )
    written = content.get("format_version")
    if type(written) is not int or written < 1:
        raise AdapterFileError(
            f"format_version in {CONFIG} must be a positive integer, "
            f"got {short(written)}"
        )
    if written > VERSION:
        raise AdapterFileError(
            f"{CONFIG} is of format version {written}, and this mora_jax reads up to "
            f"{VERSION}: a newer mora_jax is needed"
        )
    keys = KEYS | {"trained"} if written > VERSION_WITHOUT_TRAINED else KEYS
    if content.keys() != keys:
        raise AdapterFileError(
            f"{CONFIG} must hold {sorted(keys)}; "
            f"it lacks {sorted(keys - content.keys())}, "
            f"and also holds {short(sorted(content.keys() - keys))}"
        )
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if content["sha256"] != digest_of(dump(rest)):
        raise AdapterFileError(f"{CONFIG} is damaged or edited: its SHA-256 differs")
    kinds = {
        "library_version": str,
        "base_parameters": int,
        "traced": bool,
        "layers": list,
        "metadata": dict,
        "tensors_bytes": int,
        "tensors_sha256": str,
    }
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} in {CONFIG} must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    if not _is_digest(content["tensors_sha256"]):
        raise AdapterFileError(f"tensors_sha256 in {CONFIG} must be 64 hex digits")
    return content


def decode_adapter(
    config: bytes, tensors: bytes, base: Mapping[str, Any] | None
) -> tuple[Tree, Plan]:
    """The adapters and their plan, everything checked.

    Args:
      config: The content of the config.
      tensors: The content of the file of tensors.
      base: {path of a kernel: array or shape} of the model that the adapters must fit;
        None for any model.

    Raises:
      AdapterFileError: Something in the files is wrong.
    """
    content, arrays = parse_config(config), decode(tensors, TENSORS)
    if not content["layers"]:
        raise AdapterFileError(f"{CONFIG} must have an adapter, got none")
    specs, adapters = [], {}
    for number, layer in enumerate(content["layers"]):
        where = f"layers[{number}] in {CONFIG}"
        digests = None
        if content["format_version"] > 1:
            layer, digests = _without_digest(layer, where)
        path = layer_path(layer, where)
        name = "/".join(path)
        m = arrays.pop(f"{name}{SUFFIX}", None)
        if m is None:
            raise AdapterFileError(f"{TENSORS} lacks {name}{SUFFIX}")
        if not np.isfinite(m).all():
            raise AdapterFileError(f"{name}{SUFFIX} in {TENSORS} holds NaN or infinity")
        given = _given(arrays, f"{name}{SUFFIX}/")
        try:
            spec = _known_base(restore(layer, m, base, given), digests)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{name} in {CONFIG}: {error}") from error
        specs.append(spec)
        adapters[adapter_path(spec)] = to_jax(name, m)
    if len(specs) > len(adapters):
        raise AdapterFileError(f"{CONFIG} has a layer twice")
    trained = ()
    if "trained" in content:
        where = f"trained in {CONFIG}"
        trained = restore_trained(content["trained"], where, base)
    for one in trained:
        adapters[one.path] = to_jax(one.name, _trained_copy(arrays, one))
    if arrays:
        raise AdapterFileError(
            f"{TENSORS} holds {short(sorted(arrays))}, about which {CONFIG} knows "
            "nothing"
        )
    traced = content["traced"]
    plan = Plan(tuple(specs), content["base_parameters"], traced, trained=trained)
    return nest(adapters), plan


def _trained_copy(arrays: dict[str, np.ndarray], one: TrainedArray) -> np.ndarray:
    """The numbers of an array that trains itself: taken out of `arrays`, checked."""
    copy = arrays.pop(one.name, None)
    if copy is None:
        raise AdapterFileError(f"{TENSORS} lacks {one.name}")
    try:
        one.check(copy, f" in {TENSORS}")
    except (TypeError, ValueError) as error:
        raise AdapterFileError(str(error)) from error
    if not np.isfinite(copy).all():
        raise AdapterFileError(f"{one.name} in {TENSORS} holds NaN or infinity")
    return copy


def _given(arrays: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """The arrays of an operator, whose names start so: taken out of `arrays`."""
    names = [name for name in arrays if name.startswith(start)]
    return {name.removeprefix(start): arrays.pop(name) for name in names}


def _without_digest(layer: Any, where: str) -> tuple[Any, Any]:
    """A layer without the field that version 2 added, and that field."""
    if not isinstance(layer, dict) or "base_digest" not in layer:
        raise AdapterFileError(f"{where} must hold base_digest, got {short(layer)}")
    rest = {key: value for key, value in layer.items() if key != "base_digest"}
    return rest, layer["base_digest"]


def _known_base(spec: AdapterSpec, digests: Any) -> AdapterSpec:
    """`spec` with the digests of its base, if they are known."""
    if digests is None:
        return spec
    count = math.prod(spec.stack_shape)
    if (
        not isinstance(digests, list)
        or len(digests) != count
        or not all(_is_digest(digest) for digest in digests)
    ):
        raise ValueError(
            f"base_digest must be null or {count} times 64 hex digits, "
            f"got {short(digests)}"
        )
    return dataclasses.replace(spec, base_digest=tuple(digests))


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None
