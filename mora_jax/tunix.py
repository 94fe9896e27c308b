"""Adapters for the models of Tunix; `pip install google-tunix`.

register              teach `nnx.plan` and `nnx.wrap` the layers of all its models
"""

import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mora_jax._common.warnings import warn
from mora_jax._flax.layer_rules import register_layer
from mora_jax.products import ATTEND, Folded, Lookup


def register() -> None:
    """Teach `nnx.plan` and `nnx.wrap` the layers of all of Tunix's models.

    These are Qwen2, Qwen3, Llama3 and Gemma 1 to 4, with their mixtures of experts. A
    second call changes nothing.

    Raises:
      ImportError: Tunix is not installed.

    Warns:
      MoRAWarning: This version of Tunix lacks a class that the version 0.1.7 has. All
        other classes are registered.

    Example: see docs/tunix.md, which also says what is adapted by default.
    """
    if find_spec("tunix") is None:
        raise ImportError("mora_jax.tunix needs Tunix: pip install google-tunix")
    missing = []
    for path, rules in _LAYERS.items():
        module, _, name = f"tunix.models.{path}".rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
            continue
        for rule in rules:
            register_layer(cls, **rule)
    if missing:
        warn(
            f"this version of Tunix has no {' and no '.join(missing)}, which Tunix "
            "0.1.7 has; mora_jax.register_layer teaches what is there instead"
        )


def _folded(**kernels: Folded) -> list[dict[str, Any]]:
    return [{"equation": p, "kernel": name} for name, p in kernels.items()]


_EINSUM = {"equation": lambda layer, x: layer.einsum_str, "kernel": "w"}
_EMBEDDER = [
    {"equation": Lookup(), "kernel": "input_embedding", "method": "encode"},
    {"equation": ATTEND, "kernel": "input_embedding", "method": "decode"},
]
# Experts are bare arrays, whose method sorts tokens and multiplies groups of them.
_EXPERTS, _LEFT_OUT = Folded("sio"), Folded("io", adapted_by_default=False)
# Gemma scales what it looks up, so that each call adds its whole table to its delta.
_SCALED_TABLE = _folded(input_embedding=_LEFT_OUT)
_QWEN_AND_LLAMA, _GEMMA = ("qwen2", "qwen3", "llama3"), ("gemma", "gemma3")
_LAYERS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    **{f"{model}.model.Einsum": [_EINSUM] for model in (*_QWEN_AND_LLAMA, *_GEMMA)},
    **{f"{model}.model.Embedder": _EMBEDDER for model in _QWEN_AND_LLAMA},
    **{f"{model}.model.Embedder": _SCALED_TABLE for model in _GEMMA},
    "gemma4.model.Einsum": [_EINSUM | {"scale": lambda layer: layer.w_scale}],
    "gemma4.model.Embedder": _SCALED_TABLE
    + _folded(per_layer_input_embedding=Folded("ioo", adapted_by_default=False)),
    "qwen3.model.MoELayer": _folded(
        gate_proj=_EXPERTS, up_proj=_EXPERTS, down_proj=_EXPERTS
    ),
    "gemma4.moe.MoERagged": _folded(
        gating_einsum=Folded("sooi"), linear=_EXPERTS, router_logits=_LEFT_OUT
    ),
}
"""{path of a class in tunix.models: the arguments of `register_layer` for it}."""
