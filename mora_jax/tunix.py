"""Adapters for the models of Tunix; `pip install google-tunix`.

register              teach `nnx.plan` and `nnx.wrap` the layers of all its models
"""

import dataclasses
import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from mora_jax._common.warnings import warn
from mora_jax._flax.layer_rules import register_layer
from mora_jax.products import ATTEND, Folded, Lookup


def register() -> None:
    """Teach `nnx.plan` and `nnx.wrap` the layers of all of Tunix's models.

    These are Qwen2, Qwen3, Llama3 and Gemma 1 to 4, with their mixtures of experts: an
    expert has an M of its own. Embeddings and the heads that are tied to them are left
    out unless targets name them. Gemma scales what it looks up, so that its whole
    embedding is added to its delta in each call. A second call changes nothing.

    Raises:
      ImportError: Tunix is not installed.

    Warns:
      MoRAWarning: This version of Tunix lacks a class that the version 0.1.7 has.
        All other classes are registered.

    Example::

      >>> import mora_jax.tunix
      >>> try:
      ...     mora_jax.tunix.register()
      ... except ImportError as error:
      ...     print(error)  # doctest: +SKIP
      mora_jax.tunix needs Tunix: pip install google-tunix
    """
    if find_spec("tunix") is None:
        raise ImportError("mora_jax.tunix needs Tunix: pip install google-tunix")
    missing = []
    for layer in _LAYERS:
        try:
            cls = getattr(importlib.import_module(layer.module), layer.name)
        except (ImportError, AttributeError):
            missing.append(f"{layer.module}.{layer.name}")
            continue
        for rule in layer.rules:
            register_layer(cls, **rule)
    if missing:
        warn(
            f"this version of Tunix has no {' and no '.join(missing)}, which Tunix "
            "0.1.7 has; mora_jax.register_layer teaches what is there instead"
        )


def _equation(layer: Any, x: Any) -> str:
    return layer.einsum_str


def _scale(layer: Any) -> float | None:
    return layer.w_scale


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A class of Tunix, and the arguments of `register_layer` for it."""

    module: str
    name: str
    rules: tuple[Mapping[str, Any], ...]


def _einsum(model: str, **settings: Any) -> _Layer:
    rule = {"equation": _equation, "kernel": "w", **settings}
    return _Layer(f"tunix.models.{model}.model", "Einsum", (rule,))


def _embedder(model: str) -> _Layer:
    lookup = {"equation": Lookup(), "method": "encode"}
    head = {"equation": ATTEND, "method": "decode"}
    rules = tuple(rule | {"kernel": "input_embedding"} for rule in (lookup, head))
    return _Layer(f"tunix.models.{model}.model", "Embedder", rules)


def _folded(module: str, name: str, **kernels: Folded) -> _Layer:
    rules = tuple({"equation": p, "kernel": name} for name, p in kernels.items())
    return _Layer(f"tunix.models.{module}", name, rules)


_EXPERTS, _TABLE = Folded("sio"), Folded("io", by_default=False)
_LAYERS = (
    *(_einsum(model) for model in ("qwen2", "qwen3", "llama3", "gemma", "gemma3")),
    _einsum("gemma4", scale=_scale),
    *(_embedder(model) for model in ("qwen2", "qwen3", "llama3")),
    _folded("gemma.model", "Embedder", input_embedding=_TABLE),
    _folded("gemma3.model", "Embedder", input_embedding=_TABLE),
    _folded(
        "gemma4.model",
        "Embedder",
        input_embedding=_TABLE,
        per_layer_input_embedding=Folded("ioo", by_default=False),
    ),
    _folded(
        "qwen3.model",
        "MoELayer",
        gate_proj=_EXPERTS,
        up_proj=_EXPERTS,
        down_proj=_EXPERTS,
    ),
    _folded(
        "gemma4.moe",
        "MoERagged",
        gating_einsum=Folded("sooi"),
        linear=_EXPERTS,
        router_logits=Folded("io", by_default=False),
    ),
)
