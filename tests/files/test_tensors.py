"""Headers of safetensors files: what we accept, the library accepts, too."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mora_jax.io import AdapterFileError
from mora_jax.io._tensors import TensorFile, encode

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4}
"""The dtypes of the format, and the bits of their numbers."""


def file_of(header, size):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(text).to_bytes(8, "little") + text + bytes(size)


def ours(data):
    return TensorFile(Path("x.safetensors"), data).entries


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_its_size(dtype):
    """One byte more or less is refused."""
    size = 6 * BITS[dtype] // 8
    header = {"a": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, size]}}
    assert ours(file_of(header, size))["a"].shape == (2, 3)
    assert safetensors.deserialize(file_of(header, size))
    for other in (size - 1, size + 1):
        header["a"]["data_offsets"][1] = other
        with pytest.raises(AdapterFileError, match="not a safetensors file"):
            ours(file_of(header, other))
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(file_of(header, other))


@pytest.mark.parametrize("dtype", ["F8", "X16", "F" + "9" * 5000])
def test_a_dtype_that_the_format_lacks_is_refused(dtype):
    header = {"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}}
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        ours(file_of(header, 1))


def mutants(chance, data):
    """The file with a changed byte, a changed number, or an end that is cut off."""
    size = int.from_bytes(data[:8], "little")
    yield from (data[:8], data[: 8 + size], data[:-1], data + b"\0", b"", b"\0" * 8)
    while True:
        changed = bytearray(data)
        changed[chance.randrange(8 + size)] ^= 1 << chance.randrange(8)
        yield bytes(changed)
        header = json.loads(data[8 : 8 + size])
        entry = header[chance.choice(["a", "b", "c"])]
        values = [0, -1, 1.5, True, None, "4", 4, 16, 24, 2**63, [], {}, "F32", "X9"]
        key, value = chance.choice(list(entry)), chance.choice(values)
        if isinstance(entry[key], list) and entry[key] and chance.random() < 0.8:
            entry[key][chance.randrange(len(entry[key]))] = value
        else:
            entry[key] = value
        yield file_of(header, len(data) - 8 - size)


def test_what_we_accept_the_library_reads_alike():
    rng, accepted = np.random.default_rng(0), 0
    arrays = {"a": (2, 2), "b": (6,), "c": ()}
    data = encode({k: rng.random(s, np.float32) for k, s in arrays.items()}, {"x": "y"})
    for _, mutant in zip(range(2000), mutants(random.Random(0), data), strict=False):
        try:
            file = TensorFile(Path("x.safetensors"), mutant)
        except AdapterFileError:
            continue
        theirs = dict(safetensors.deserialize(mutant))
        assert file.entries.keys() == theirs.keys()
        for name, entry in file.entries.items():
            assert entry.dtype == theirs[name]["dtype"]
            assert list(entry.shape) == theirs[name]["shape"]
            assert b"".join(file.chunks(name)) == theirs[name]["data"]
        accepted += 1
    assert 0 < accepted < 500
