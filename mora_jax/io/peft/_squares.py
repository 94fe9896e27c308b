"""Adapters as they are, for vLLM with the plug-in `mora_jax.vllm`."""

import math
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._common.squares import KEY, VERSION, digest
from mora_jax._common.types import Shape
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io._files import CONFIG, TENSORS, Location, write_directory
from mora_jax.io._json import dump
from mora_jax.io._names import Pair
from mora_jax.io._tensors import Arrays, encode
from mora_jax.operators import Damped, LowRank

CHUNK = 256  # rows of a map that are in memory at once
DENSE = 8  # a map is a matrix where an output sums more than one in so many inputs
Module = tuple[Pair, str, AdapterSpec, np.ndarray, slice]  # names, kernel, M, outputs


def write_squares(path: Location, modules: Iterable[Module], base_model: str) -> None:
    """Write M's, with C and D as maps of numbers: a server need not know operators."""
    tensors: dict[str, np.ndarray] = {}
    names: dict[Hashable, str] = {}
    entries: dict[str, dict[str, Any]] = {}

    def once(key: Hashable, make: Callable[[], Arrays]) -> str:
        if key not in names:
            name = names[key] = f"shared.{len(names)}"
            tensors.update({f"{name}.{part}": a for part, a in make().items()})
        return names[key]

    for pair, kernel, spec, m, outs in modules:
        op, m = spec.operator.absorbed(jnp.asarray(m, jnp.float32), spec.factor)
        inner = op.inner if isinstance(op, Damped) else op
        if pair.is_table or isinstance(inner, LowRank):
            rule = "a linear layer" if pair.is_table else "of a square, and not a LoRA"
            raise ValueError(f"{kernel} must be {rule}, with native=True")
        m = np.asarray(m)
        tensors[f"{pair.module}.m"] = m.reshape(-1, *m.shape[-2:])
        key, enter = _compressing(op)
        h = *inner.compressed_shape[:-1], inner.m_shape[-1]
        entries[pair.module] = {
            "in": op.in_features,
            "out": outs.stop - outs.start,
            "compress": once(key, partial(_map, enter, (op.in_features,))),
            "decompress": once((inner, str(outs)), partial(_map, inner.leave, h, outs)),
        }
        if isinstance(op, Damped) and op.directions is not None:
            v = {"v": np.asarray(op.columns("float32"))}
            entries[pair.module]["damped"] = once(str(op.digests), partial(dict, v))
    data = encode(tensors, {})
    config: dict[str, Any] = {
        "peft_type": "MORA",
        "base_model_name_or_path": base_model,
        "target_modules": sorted(entries),
        "r": 1,
        "lora_alpha": 1,
        KEY: {"version": VERSION, "modules": entries},
    }
    config[KEY]["sha256"] = digest(data, config)
    write_directory(path, [(TENSORS, [data]), (CONFIG, [dump(config)])])


def _compressing(op: Any) -> tuple[Hashable, Callable[[Any], Any]]:
    """A key of the map C of F x, and the map."""
    if not isinstance(op, Damped):
        return op, op.enter
    if op.diagonal is None:
        return op.inner, op.inner.enter
    key = op.inner, op.digests["diagonal"]
    return key, lambda x: op.inner.enter(op.scaled_inputs(x))


def _map(call: Callable[[Any], Any], shape: Shape, outs: slice = slice(None)) -> Arrays:
    """A linear map as the numbers that each output sums, or as a matrix."""
    found, counts, ins = [], np.array(0), math.prod(shape)
    for start in range(0, ins, CHUNK):
        units = jnp.eye(min(CHUNK, ins - start), ins, start)
        rows = np.asarray(call(units.reshape(-1, *shape)))
        rows = rows.reshape(len(units), -1)[:, outs]
        source, target = np.nonzero(rows)
        found.append((target, start + source, rows[source, target]))
        counts = counts + np.bincount(target, minlength=rows.shape[1])
    target, source, weight = map(np.concatenate, zip(*found, strict=True))
    if counts.max() * DENSE > ins:
        matrix = np.zeros((len(counts), ins), "float32")
        matrix[target, source] = weight
        return {"weight": matrix}
    # Output k sums in the first counts[k] places; the others add zero.
    order = np.argsort(target, kind="stable")
    place = np.arange(len(target)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.zeros((len(counts), max(1, counts.max())), "int32")
    weights = np.zeros(index.shape, "float32")
    index[target[order], place] = source[order]
    weights[target[order], place] = weight[order]
    return {"index": index, "weight": weights}
